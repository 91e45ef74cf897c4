"""An embedding of integer codes, and the output head that shares them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ... import kernels
from ...errors import RecipeError
from ..rotation.hadamard import HadamardPlan
from .gradient import StraightThrough, needs_gradient
from .input import InputQuantizer, InputScheme, Weight
from .linear import PackedWeight
from .prepared import QuantizedWeight
from .rotation import OnlineHadamard

__all__ = [
    "Int4Embedding",
    "Int8Embedding",
    "QuantizedEmbedding",
    "SharedHead",
    "block_rotation",
    "embedding_factor",
    "int8_rows",
    "packed_rows",
]

_ROWS = 16384


def embedding_factor(embedding: nn.Module) -> float:
    """What a model multiplies the rows of its embedding by: 1, or Gemma's ``sqrt(hidden)``.

    Raises:
        RecipeError: the embedding does something else, which nothing is known of.
    """
    factor = getattr(embedding, "scalar_embed_scale", None)
    if isinstance(factor, float):
        return factor
    if type(embedding) is nn.Embedding:
        return 1.0
    raise RecipeError(
        f"The embedding of this model is a {type(embedding).__name__}, which cannot be quantized. Use --set"
        " embedding.bits=16."
    )


def block_rotation(channels: int, blocks: int) -> OnlineHadamard | None:
    """The rotation of rows of so many channels in blocks (:attr:`rrsq.recipe.Embedding.blocks`), or None."""
    block = math.gcd(blocks, channels)
    return OnlineHadamard(HadamardPlan(channels, block, 1)) if block > 1 else None


def int8_rows(weight_int8: Tensor, weight_scale: Tensor, index: Tensor | slice) -> Tensor:
    """Rows ``index`` (int64 ``[n]``) of an :class:`Int8Embedding`, float32 ``[n, channels]``."""
    return weight_int8[index].float() * weight_scale[index].unsqueeze(1)


def packed_rows(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    rotation: OnlineHadamard | None,
    index: Tensor | slice,
) -> Tensor:
    """Rows ``index`` (int64 ``[n]``) of an :class:`Int4Embedding`, float32 ``[n, channels]``."""
    codes = kernels.unpack_int4(weight_packed[index])
    if weight_multiplier is not None:
        multiplier = weight_multiplier[index]
        grouped = codes.view(*multiplier.shape, codes.shape[1] // multiplier.shape[1])
        codes = (grouped * multiplier.unsqueeze(-1)).view(codes.shape)  # Within int8: 8 times 15.
    rows = codes.float() * weight_scale[index].unsqueeze(1)
    return rows if rotation is None or not rows.shape[0] else rotation.inverse(rows)


class QuantizedEmbedding(QuantizedWeight):
    """Rows of integer codes, of which only those asked for are dequantized; ``h Êᵀ`` for a tied head.

    Attributes:
        num_embeddings, embedding_dim: rows, and channels of one.
        dtype: of what is looked up; follows the model's.
        factor: what rows are multiplied by as they are looked up. It is rounded to ``dtype`` first, as
            transformers does, which multiplies by a tensor of that dtype.
        weight: uint8 ``[1]``, for whoever looks for a weight; see :class:`~.linear.QuantizedLinear`.
    """

    num_embeddings: int
    embedding_dim: int
    dtype: torch.dtype
    factor: float

    def _describe(self, shape: tuple[int, int], factor: float, dtype: torch.dtype) -> None:
        self.num_embeddings, self.embedding_dim = shape
        self.factor = factor
        self._cast(dtype)
        self.register_buffer("weight", torch.zeros(1, dtype=torch.uint8))

    def _cast(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._rounded = float(torch.tensor(self.factor, dtype=dtype, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        """Rows ``[..., channels]`` of tokens ``[...]``; of hidden states ``[..., channels]``, their logits.

        A tied head asks here and not for the codes, so that what moves a module's tensors to it as it is
        called (offloading) does so.
        """
        if x.is_floating_point():
            return self._logits(x)
        rows = self._values(x.reshape(-1)).to(self.dtype)
        if self._rounded != 1:
            rows = rows * self._rounded
        return rows.view(*x.shape, self.embedding_dim)

    def _logits(self, x: Tensor) -> Tensor:
        stays = not is_compiling() and self._stays()
        if needs_gradient(x):
            return StraightThrough.apply(x, self._multiply, self._input_gradient)
        if not stays or not x.numel():
            return self._multiply(x)
        rows = x.reshape(-1, self.embedding_dim)
        return self._prepared.find(rows, self._prepare)(rows).view(*x.shape[:-1], self.num_embeddings)

    def _multiply(self, x: Tensor) -> Tensor:
        """``[..., channels]`` to logits ``[..., rows]``."""
        raise NotImplementedError

    def _prepare(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        """The same for tokens like ``rows`` ``[tokens, channels]``, all that stays the same looked up."""
        raise NotImplementedError

    def _values(self, index: Tensor | slice) -> Tensor:
        """What some rows stand for: float32 ``[n, channels]``."""
        raise NotImplementedError

    def _input_gradient(self, grad: Tensor) -> Tensor:
        result = grad.new_zeros((*grad.shape[:-1], self.embedding_dim), dtype=torch.float32)
        for first in range(0, self.num_embeddings, _ROWS):
            rows = slice(first, first + _ROWS)
            result += grad[..., rows].float() @ self._values(rows)
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._cast(fn(torch.empty(0, dtype=self.dtype)).dtype)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


class Int8Embedding(QuantizedEmbedding):
    """One scale a row.

    Args:
        shape: rows, and channels of one.
        factor, dtype: see :class:`QuantizedEmbedding`.

    Attributes:
        weight_int8: int8 ``[rows, channels]`` in [-127, 127].
        weight_scale: float32 ``[rows]``.
    """

    codes = "weight_int8"
    weight_int8: Tensor

    def __init__(self, shape: tuple[int, int], *, factor: float, dtype: torch.dtype) -> None:
        super().__init__()
        self._describe(shape, factor, dtype)
        self.register_buffer("weight_int8", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.zeros(shape[0], dtype=torch.float32))

    def set_rows(self, rows: slice, codes: Tensor, scale: Tensor) -> None:
        """Store int8 codes ``[n, channels]`` and float32 scales ``[n]`` of some rows."""
        self.weight_int8[rows] = codes.to(self.weight_int8.device)
        self.weight_scale[rows] = scale.to(self.weight_scale.device)
        self._forget()

    def _multiply(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.embedding_dim)
        y = kernels.linear_w8a16(rows, self.weight_int8, self.weight_scale, None)
        return y.view(*x.shape[:-1], self.num_embeddings)

    def _prepare(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        return kernels.linear_w8a16.prepare(rows, self.weight_int8, self.weight_scale, None)

    def _values(self, index: Tensor | slice) -> Tensor:
        return int8_rows(self.weight_int8, self.weight_scale, index)


class Int4Embedding(QuantizedEmbedding, PackedWeight):
    """One scale a row, with signed multipliers of groups of its channels; rows are rotated in blocks.

    Outliers among the channels of a row are spread over a block by it. What is looked up is rotated back;
    for a tied head the hidden states are rotated instead, as ``h Eᵀ = (h R) (E R)ᵀ``.

    Args:
        shape: rows, and channels of one.
        group_size: channels a multiplier covers, a divisor of the channels; None for no multipliers.
        blocks: see :func:`block_rotation`.
        factor, dtype: see :class:`QuantizedEmbedding`.

    Attributes:
        weight_packed, weight_scale, weight_multiplier: see :class:`~.linear.PackedWeight`.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        group_size: int | None,
        blocks: int,
        factor: float,
        dtype: torch.dtype,
    ) -> None:
        PackedWeight.__init__(
            self,
            shape,
            group_size=group_size,
            signed=True,
            input_quantizer=InputQuantizer(InputScheme(shape[1]), block_rotation(shape[1], blocks)),
        )
        self._describe(shape, factor, dtype)

    @property
    def rotation(self) -> OnlineHadamard | None:
        """Of the rows."""
        return self.input_quantizer.rotation

    def _multiply(self, x: Tensor) -> Tensor:
        y = self.input_quantizer(x).multiply(self._weight(), x.dtype)
        return y.view(*x.shape[:-1], self.num_embeddings)

    def _prepare(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        rotate, multiply = self.input_quantizer.prepare_linear(rows, self._weight())
        return lambda rows: multiply(*rotate(rows))

    def _weight(self) -> Weight:
        weight = self.weight_packed, self.weight_scale, self.weight_multiplier
        return Weight(*weight, None, self._cpu_operand())

    def _values(self, index: Tensor | slice) -> Tensor:
        weight = self.weight_packed, self.weight_scale, self.weight_multiplier
        return packed_rows(*weight, self.rotation, index)


class SharedHead(nn.Module):
    """The output head of a model whose embedding is tied to it: it has no tensors of its own.

    Args:
        embedding: a :class:`QuantizedEmbedding`, owned by the model.
    """

    bias = None

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self._embedding = (embedding,)

    @property
    def embedding(self) -> nn.Module:
        """The embedding whose codes these are."""
        return self._embedding[0]

    @property
    def weight(self) -> Any:
        """The embedding's, for whoever looks for one."""
        return self.embedding.weight

    @weight.setter
    def weight(self, tied: Tensor) -> None:
        """Nothing: transformers ties by the weight, and this is tied by what it is."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., channels]`` to logits ``[..., rows]`` in the dtype of ``x``."""
        logits: Tensor = self.embedding(x)
        return logits
