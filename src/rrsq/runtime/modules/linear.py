"""Linear layers with INT4 weights and integer arithmetic, one by one or all of one input at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ... import kernels
from .deferred import DeferredInput
from .gradient import StraightThrough, needs_gradient
from .input import InputQuantizer, PreparedLinear, Weight
from .prepared import Prepared, QuantizedWeight

__all__ = ["FusedLinears", "PackedWeight", "Projections", "QuantizedLinear", "multiplier_dtype"]


def multiplier_dtype(signed: bool) -> torch.dtype:
    """Of the multipliers of a weight's groups; what is not signed is the same bytes in either."""
    return torch.int8 if signed else torch.uint8


class PreparedDeferred(dict[tuple[Any, ...], Prepared[PreparedLinear]]):
    """The same of deferred inputs, by their constants."""

    def multiply(self, x: DeferredInput, quantizer: InputQuantizer, weight: Callable[[], Weight]) -> Tensor:
        """The products of a deferred input: ``[..., out]``."""
        key = x.operation.name, *x.arguments
        prepared = self.get(key)
        if prepared is None:
            prepared = self[key] = Prepared()
        quantize, multiply = prepared.find(
            x.activations[0], lambda _: quantizer.prepare_deferred(x, weight())
        )
        operand, scale, *others = quantize(*x.activations)
        x.others = tuple(others)
        return multiply(operand, scale)


class PackedWeight(QuantizedWeight):
    """Packed INT4 codes with their scales, and the quantizer of what they multiply.

    The input quantizer may be shared with other linears and is owned by their parent, so it is no submodule
    here.

    Args:
        shape: ``[..., out, in]`` of the weight; ``in`` is even.
        group_size: channels an integer multiplier covers, a divisor of ``in``; None for none.
        signed: whether multipliers have a sign.
        input_quantizer: quantizer of the input.

    Attributes:
        weight_packed: uint8 ``[..., out, in/2]``, layout of :mod:`rrsq.kernels.packing`.
        weight_scale: float32 ``[..., out]``.
        weight_multiplier: ``[..., out, in/group_size]``, uint8 in 1..15 or, signed, int8 in ±1..±15; or None.
    """

    codes = "weight_packed"
    weight_packed: Tensor
    weight_multiplier: Tensor | None

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        group_size: int | None,
        signed: bool = False,
        input_quantizer: InputQuantizer,
    ) -> None:
        super().__init__()
        *leading, in_features = shape
        self.group_size = group_size
        self.register_buffer("weight_packed", torch.zeros(*leading, in_features // 2, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.zeros(*leading, dtype=torch.float32))
        multiplier = None
        if group_size is not None:
            groups = in_features // group_size
            multiplier = torch.ones(*leading, groups, dtype=multiplier_dtype(signed))
        self.register_buffer("weight_multiplier", multiplier)
        self._input = (input_quantizer,)

    def _unprepare(self) -> None:
        super()._unprepare()
        self._prepared_deferred = PreparedDeferred()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_prepared_deferred": PreparedDeferred()}

    @property
    def input_quantizer(self) -> InputQuantizer:
        """The shared quantizer of this weight's input."""
        return self._input[0]

    def set_weight(
        self, codes: Tensor, scale: Tensor, multiplier: Tensor | None, index: tuple[int, ...] = ()
    ) -> None:
        """Store one matrix: int codes ``[out, in]`` in [-8, 7], float32 scales ``[out]``, multipliers.

        ``index`` says which one where there are several.
        """
        self.weight_packed = self.weight_packed.detach()  # Another object: see FusedLinears.
        self.weight_packed[index] = kernels.pack_int4(codes).to(self.weight_packed.device)
        self.weight_scale[index] = scale.to(self.weight_scale.device)
        if self.weight_multiplier is not None and multiplier is not None:
            self.weight_multiplier[index] = multiplier.to(self.weight_multiplier.device)
        self._forget()

    def dequantized_weight(self) -> Tensor:
        """The weight the codes stand for: float32 ``[..., out, in]``, columns in the stored channel order."""
        return self._unpacked().float() * self.weight_scale.unsqueeze(-1)

    def _unpacked(self) -> Tensor:
        """The int8 operand ``[..., out, in]``."""
        packed, multiplier = self.weight_packed, self.weight_multiplier
        rows = packed.reshape(-1, packed.shape[-1])
        groups = None if multiplier is None else multiplier.reshape(-1, multiplier.shape[-1])
        return kernels.weight_operand(rows, groups).view(*packed.shape[:-1], -1)

    def _cpu_operand(self) -> Tensor | None:
        """The unpacked int8 weight, kept on CPU: unpacking at each call would cost more than the product.

        Not before the second call with a weight: one that is offloaded is another tensor in each.
        """
        if is_compiling():
            return self._operand
        packed = self.weight_packed
        if packed.device.type != "cpu":
            return None
        if self._prepared_for is not packed:
            return self._unpacked()
        if self._operand is None:
            self._operand = self._unpacked()
        return self._operand

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        module = super()._apply(fn, recurse)
        if self.input_quantizer.rotation is not None:
            self.input_quantizer.rotation.follow(self.weight_packed.device)
        return module

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.weight_packed = self.weight_packed.detach()  # Another object: see FusedLinears.


class QuantizedLinear(PackedWeight):
    """``y = x̂ Ŵᵀ + b`` from packed INT4 codes.

    Args:
        in_features: channels in; even.
        out_features: channels out.
        group_size: channels an integer multiplier covers, a divisor of ``in_features``; None for none.
        signed: whether multipliers have a sign.
        bias: whether there is a bias.
        input_quantizer: quantizer of the input.
        dtype: dtype of the bias.

    Attributes:
        bias: ``[out]`` or None; for the others see :class:`PackedWeight`.
        weight: uint8 ``[1]``, for whoever looks for a weight: a loader that does not know the format finds a
            tensor of another shape than the model's, and stops, where it would make up a missing one.
        place: which of :attr:`Projections.outputs` is this linear's.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group_size: int | None,
        signed: bool = False,
        bias: bool,
        input_quantizer: InputQuantizer,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(
            (out_features, in_features), group_size=group_size, signed=signed, input_quantizer=input_quantizer
        )
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("weight", torch.zeros(1, dtype=torch.uint8))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype) if bias else None)
        self.place = 0

    def forward(self, x: Tensor | Projections | DeferredInput) -> Tensor:
        """``[..., in]`` to ``[..., out]`` in the dtype of ``x``; of projections, this linear's."""
        if isinstance(x, Projections):
            return x.outputs[self.place]
        stays = not is_compiling() and self._stays()
        if isinstance(x, DeferredInput):
            if stays and x.activations[0].numel():
                return self._prepared_deferred.multiply(x, self.input_quantizer, self._weight)
            x = x.tensor()
        if needs_gradient(x):
            return StraightThrough.apply(x, self._multiply, self._input_gradient)
        if not stays or not x.numel():
            return self._multiply(x)
        quantize, multiply = self._prepared.find(x, self._prepare)
        return multiply(*quantize(x))

    def _prepare(self, x: Tensor) -> PreparedLinear:
        return self.input_quantizer.prepare_linear(x, self._weight())

    def _multiply(self, x: Tensor) -> Tensor:
        y = self.input_quantizer(x).multiply(self._weight(), x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _weight(self) -> Weight:
        unpacked = self._cpu_operand()
        return Weight(self.weight_packed, self.weight_scale, self.weight_multiplier, self.bias, unpacked)

    def _input_gradient(self, grad: Tensor) -> Tensor:
        return self.input_quantizer.undo(grad.float() @ self.dequantized_weight())

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )


class Projections:
    """An input's products with all linears that read it, given to their parent in place of that input.

    Attributes:
        input: what was multiplied, for linears of the input that are in full precision.
        joined: ``[..., out]`` of all quantized linears side by side.
        rows: how many channels of it are each linear's.
        shape, dtype, device: of the input.
    """

    __slots__ = ("_input", "_outputs", "device", "dtype", "joined", "rows", "shape")

    def __init__(self, x: Tensor | DeferredInput, joined: Tensor, rows: list[int]) -> None:
        self._input = x
        self.joined = joined
        self.rows = rows
        self._outputs: tuple[Tensor, ...] | None = None
        self.shape = x.shape
        self.dtype = x.dtype
        self.device = x.device

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """``[..., out]`` of each quantized linear, when one asks: a gate may take them together."""
        if self._outputs is None:
            self._outputs = self.joined.split_with_sizes(
                self.rows, -1
            )  # split() costs the host four times it.
        return self._outputs

    @property
    def input(self) -> Tensor:
        """What was multiplied."""
        return self._input.tensor() if isinstance(self._input, DeferredInput) else self._input

    def size(self) -> torch.Size:
        """The input's shape, as a tensor says it."""
        return self.shape


def _take_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before a linear in full precision: the input itself in place of projections."""
    return tuple(x.input if isinstance(x, Projections) else x for x in args)


class FusedLinears(nn.Module):
    """All quantized linears of one input as one: one quantization and one product.

    transformers' modules call ``q_proj``, ``k_proj`` and ``v_proj`` one after the other with the same tensor.
    A hook on their parent multiplies before it runs, and gives it :class:`Projections` in place of the input,
    of which each linear takes its own; nothing is remembered between calls. The linears keep their tensors,
    under their own names, as views of one. Where one of them has been taken out (by an adapter, say), or
    their tensors are elsewhere, each works by itself.

    Args:
        parent: of the linears. The input is the first argument of its forward pass, or ``hidden_states``.
        names: of the linears in it; they have one input quantizer, and all of them a bias or none.
        others: names of linears in full precision that read the same input.
    """

    def __init__(self, parent: nn.Module, names: tuple[str, ...], others: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.names = names
        self._others = tuple((name, getattr(parent, name)) for name in others)
        for _, other in self._others:
            other.register_forward_pre_hook(_take_input)
        self._linears: tuple[QuantizedLinear, ...] = tuple(getattr(parent, name) for name in names)
        for place, linear in enumerate(self._linears):
            linear.place = place
        self._joined: tuple[tuple[Tensor, ...], Weight] | None = None
        self._prepared = Prepared[PreparedLinear]()
        self._prepared_deferred = PreparedDeferred()
        self._rows = [linear.out_features for linear in self._linears]
        parent.register_forward_pre_hook(self._before, with_kwargs=True)

    def takes_deferred(self, parent: nn.Module) -> bool:
        """Whether ``parent``, given a :class:`~.deferred.DeferredInput`, hands it to these linears first."""
        if not self._linears[0].input_quantizer.takes_deferred or not self._is_whole(parent):
            return False
        for hook in parent._forward_pre_hooks.values():
            if hook == self._before:
                return True
            if not getattr(hook, "leaves_input", False):  # Who knows what it does with it.
                return False
        return False

    def forward(self, x: Tensor | DeferredInput) -> Projections | Tensor:
        """The products with ``x`` ``[..., in]``; or ``x``, where the linears are not together."""
        weight = self._weight()
        if isinstance(x, DeferredInput):
            if weight is None or is_compiling() or not x.activations[0].numel():
                return self(x.tensor())
            joined = weight
            y = self._prepared_deferred.multiply(x, self._linears[0].input_quantizer, lambda: joined)
            return Projections(x, y, self._rows)
        if weight is None:
            return x
        if needs_gradient(x):
            y = StraightThrough.apply(x, lambda x: self._multiply(x, weight), self._input_gradient)
        elif is_compiling() or not x.numel():
            y = self._multiply(x, weight)
        else:
            prepare = self._linears[0].input_quantizer.prepare_linear
            quantize, multiply = self._prepared.find(x, lambda x: prepare(x, weight))
            y = multiply(*quantize(x))
        return Projections(x, y, self._rows)

    def _multiply(self, x: Tensor, weight: Weight) -> Tensor:
        y = self._linears[0].input_quantizer(x).multiply(weight, x.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _input_gradient(self, grad: Tensor) -> Tensor:
        whole = torch.cat([linear.dequantized_weight() for linear in self._linears])
        return self._linears[0].input_quantizer.undo(grad.float() @ whole)

    def join(self) -> None:
        """Make one weight of the linears', which become views of it; nothing where they are not together."""
        self._joined = None
        self._prepared = Prepared()
        self._prepared_deferred = PreparedDeferred()
        linears = self._linears
        device = linears[0].weight_packed.device
        if device.type == "meta" or any(linear.weight_packed.device != device for linear in linears):
            return
        with torch.inference_mode(False):
            packed, scale = self._cat("weight_packed"), self._cat("weight_scale")
            multiplier = None if linears[0].weight_multiplier is None else self._cat("weight_multiplier")
            bias = None if linears[0].bias is None else self._cat("bias")
        weight = Weight(packed, scale, multiplier, bias, None)
        self._joined = tuple(linear.weight_packed for linear in linears), weight

    def _cat(self, name: str) -> Tensor:
        whole = torch.cat([getattr(linear, name) for linear in self._linears])
        parts = whole.split(self._rows)
        for linear, part in zip(self._linears, parts, strict=True):
            setattr(linear, name, part)
        return whole

    def _weight(self) -> Weight | None:
        """The one weight, made anew where a linear has got another tensor."""
        joined = self._joined
        if joined is None or any(
            linear.weight_packed is not part for linear, part in zip(self._linears, joined[0], strict=True)
        ):
            if is_compiling():
                return None
            self.join()
            joined = self._joined
        if joined is None:
            return None
        parts, weight = joined
        if weight.unpacked is None and weight.packed.device.type == "cpu" and not is_compiling():
            # Unpacking at each call would cost more than the product.
            weight = weight._replace(unpacked=kernels.weight_operand(weight.packed, weight.multiplier))
            self._joined = parts, weight
        return weight

    def _is_whole(self, parent: nn.Module) -> bool:
        """Whether nothing else has been put in the place of a linear."""
        modules = parent._modules
        expected = *zip(self.names, self._linears, strict=True), *self._others
        return all(modules[name] is linear for name, linear in expected)

    def _before(
        self, parent: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not self._is_whole(parent):
            return args, kwargs
        if args:
            return (self(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self(kwargs["hidden_states"])}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # The linears' tensors have been moved or cast before: this module comes after them.
        module = super()._apply(fn, recurse)
        if self._joined is not None:
            self.join()
        return module

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_joined": None, **self._unprepared()}

    @staticmethod
    def _unprepared() -> dict[str, Any]:
        return {"_prepared": Prepared[PreparedLinear](), "_prepared_deferred": PreparedDeferred()}
