"""Embeddings of integer codes: what is looked up, the logits of a tied head, casts, copies, graphs."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from rrsq.errors import RecipeError
from rrsq.runtime.modules.embedding import (
    Int4Embedding,
    Int8Embedding,
    QuantizedEmbedding,
    SharedHead,
    embedding_factor,
)
from rrsq.runtime.modules.linear import PackedWeight

ROWS, CHANNELS = 37, 96
KINDS = {"8": (8, None, 1), "4": (4, None, 1), "4 in groups": (4, 32, 1), "4, rotated": (4, 16, 32)}


def made(
    bits: int, group_size: int | None, blocks: int, factor: float = 1.0, dtype: torch.dtype = torch.float32
) -> Any:
    """An embedding of random codes."""
    generator = torch.Generator().manual_seed(bits)
    scale = 0.01 + torch.rand(ROWS, generator=generator)
    shape = ROWS, CHANNELS
    if bits == 8:
        new: Any = Int8Embedding(shape, factor=factor, dtype=dtype)
        new.set_rows(slice(0, ROWS), torch.randint(-127, 128, shape, generator=generator), scale)
        return new
    new = Int4Embedding(shape, group_size=group_size, blocks=blocks, factor=factor, dtype=dtype)
    multiplier = None
    if group_size is not None:
        multiplier = torch.randint(1, 16, (ROWS, CHANNELS // group_size), generator=generator)
        multiplier *= 1 - 2 * torch.randint(0, 2, multiplier.shape, generator=generator)
    new.set_weight(torch.randint(-8, 8, shape, generator=generator), scale, multiplier)
    return new


def values(embedding: QuantizedEmbedding) -> Tensor:
    """What its tensors stand for by docs/checkpoint-format.md, float64 ``[rows, channels]``."""
    tensors = {name: tensor.numpy() for name, tensor in embedding.state_dict().items()}
    scale = tensors["weight_scale"].astype(np.float64)[:, None]
    if "weight_int8" in tensors:
        return torch.from_numpy(tensors["weight_int8"] * scale)
    block = math.gcd(CHANNELS, 128)
    codes = np.empty((ROWS, CHANNELS))
    for channel in range(CHANNELS):
        start, place = channel - channel % block, channel % block
        byte = tensors["weight_packed"][:, start // 2 + place % (block // 2)]
        codes[:, channel] = (byte & 15 if place < block // 2 else byte >> 4).astype(float) - 8
    multiplier = tensors.get("weight_multiplier", np.ones((ROWS, 1)))
    rows = codes * np.repeat(multiplier, CHANNELS // multiplier.shape[1], 1) * scale
    rotation = getattr(embedding, "rotation", None)
    if rotation is not None:
        block = rotation.plan.block
        matrix = np.ones((1, 1))
        while len(matrix) < block:  # Sylvester's.
            matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / 2**0.5
        rows = (rows.reshape(ROWS, -1, block) @ matrix.T).reshape(ROWS, CHANNELS)
    return torch.from_numpy(rows)


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def embedding(request: pytest.FixtureRequest) -> Any:
    return made(*request.param)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (1, 4, 2)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_are_those_asked_for(embedding: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens = torch.randint(0, ROWS, shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    found = embedding(tokens)
    assert found.shape == (*shape, CHANNELS)
    torch.testing.assert_close(found.double(), values(embedding)[tokens.long()], rtol=1e-5, atol=1e-5)


def test_a_token_that_there_is_not_is_an_error(embedding: Any) -> None:
    with pytest.raises(IndexError):
        embedding(torch.tensor([ROWS]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_gemmas_factor_is_rounded_as_transformers_does(
    kind: tuple[int, int | None, int], dtype: torch.dtype
) -> None:
    """Bit for bit the scaled embedding of transformers, of the rows rounded to its dtype."""
    factor = 640**0.5
    ours = made(*kind, factor=factor, dtype=dtype)
    theirs = Gemma3TextScaledWordEmbedding(ROWS, CHANNELS, 0, factor).to(dtype)
    assert embedding_factor(theirs) == factor
    everything = torch.arange(ROWS)
    with torch.no_grad():
        theirs.weight.copy_(made(*kind)(everything))
        assert ours(everything).dtype == dtype
        assert torch.equal(ours(everything), theirs(everything))


def test_a_factor_is_known_or_refused() -> None:
    class Other(nn.Embedding):
        pass

    assert embedding_factor(nn.Embedding(3, 2)) == 1.0
    with pytest.raises(RecipeError, match=r"is a Other, which cannot be quantized.*embedding\.bits=16"):
        embedding_factor(Other(3, 2))


def test_casts_copies_and_pickles(embedding: Any) -> None:
    tokens = torch.arange(ROWS)
    expected = embedding(tokens)
    scale = embedding.weight_scale.clone()
    half = copy.deepcopy(embedding).to(torch.float16)
    assert half(tokens).dtype == torch.float16
    assert torch.equal(half(tokens), expected.half())
    assert torch.equal(half.weight_scale, scale)
    again = pickle.loads(pickle.dumps(half.to(torch.float32)))
    assert again(tokens).dtype == torch.float32
    assert torch.equal(again(tokens), expected)
    other: Any = copy.deepcopy(embedding)
    other.weight_scale.fill_(3)
    other.load_state_dict(embedding.state_dict())
    assert torch.equal(other(tokens), expected)


def test_a_shared_head_multiplies_by_the_rows(embedding: Any) -> None:
    """Also after the first call, when an unpacked weight is kept, and without the factor of a lookup."""
    embedding.factor = 7.0
    embedding._cast(torch.float32)
    head = SharedHead(embedding)
    x = torch.randn(2, 3, CHANNELS, generator=torch.Generator().manual_seed(2))
    expected = x.double() @ values(embedding).T
    for _ in range(3):
        torch.testing.assert_close(head(x).double(), expected, rtol=1e-5, atol=1e-4)
    assert head(x[:0]).shape == (0, 3, ROWS)
    assert not head.state_dict()
    assert head.weight is embedding.weight
    half = head(x.half())
    assert half.dtype == torch.float16
    assert float((half.double() - expected).norm() / expected.norm()) < 2e-3


def test_a_shared_head_hands_on_gradients(embedding: Any) -> None:
    x = torch.randn(4, CHANNELS, generator=torch.Generator().manual_seed(3), requires_grad=True)
    grad = torch.randn(4, ROWS, generator=torch.Generator().manual_seed(4))
    SharedHead(embedding)(x).backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), grad.double() @ values(embedding), rtol=1e-5, atol=1e-4)


def test_a_copied_model_shares_its_own_codes(embedding: Any) -> None:
    model = nn.ModuleDict({"head": SharedHead(embedding), "embedding": embedding})
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        head: Any = other["head"]
        assert head.embedding is other["embedding"]
        assert head.embedding is not embedding


def test_only_the_codes_are_kept_of_an_embedding_that_is_looked_up(embedding: Any) -> None:
    for _ in range(3):
        embedding(torch.arange(ROWS))
    assert embedding._operand is None
    SharedHead(embedding)(torch.ones(1, CHANNELS))
    SharedHead(embedding)(torch.ones(1, CHANNELS))
    assert (embedding._operand is not None) == isinstance(embedding, PackedWeight)


def test_lookup_and_logits_are_one_graph(embedding: Any) -> None:
    torch.compiler.reset()
    head = SharedHead(embedding)

    def run(tokens: Tensor) -> Tensor:
        return head(embedding(tokens))

    compiled: Any = torch.compile(run, fullgraph=True, backend="eager", dynamic=True)
    for count in (1, 3, 5):
        tokens = torch.arange(2 * count).view(2, count)
        torch.testing.assert_close(compiled(tokens), run(tokens))
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(embedding: Any) -> None:
    """The same rows as on a CPU, in a CUDA graph and in a compiled one, and a head within its rounding."""
    there = copy.deepcopy(embedding).to("cuda", torch.bfloat16)
    here = copy.deepcopy(embedding).to(torch.bfloat16)
    head = SharedHead(there)
    tokens = torch.arange(ROWS, device="cuda")
    torch.testing.assert_close(there(tokens).cpu(), here(tokens.cpu()), rtol=2**-7, atol=1e-4)
    x = torch.randn(3, CHANNELS, generator=torch.Generator().manual_seed(5))
    expected = x.double() @ values(embedding).T
    for _ in range(3):
        found = head(x.cuda().bfloat16()).cpu().double()
        assert float((found - expected).norm() / expected.norm()) < 0.01
    given = tokens[:5].clone()
    there(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = there(given)
    given.copy_(tokens[7:12])
    graph.replay()
    assert torch.equal(rows, there(tokens[7:12]))
    compiled: Any = torch.compile(lambda tokens: head(there(tokens)), fullgraph=True)
    plain = head(there(tokens))
    assert float((compiled(tokens) - plain).norm() / plain.norm()) < 0.02
