"""The attention of one layer by itself, for every size of head: on a GPU with FlashAttention and in a graph.

On a GPU with vLLM as it is installed: run this file alone, since the others make vLLM take this machine for
another.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from fake_vllm import REASON, has_vllm, prepare
from torch import Tensor

from rrsq.runtime.kv_cache.quantizer import CacheScheme, KVQuantizer
from rrsq.runtime.kv_cache.rope import KeyRotary

if TYPE_CHECKING:
    from rrsq.vllm.attention import CacheMetadata, QuantizedAttention

pytestmark = pytest.mark.skipif(not has_vllm(), reason=REASON)

BLOCK = 16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device, with vLLM")
# Tokens in the cache before, and new ones: two that decode, a whole prompt, a part of one, one of few tokens.
BATCH = ((70, 1), (0, 1), (0, 40), (33, 50), (60, 5))


@dataclass(frozen=True)
class Case:
    head_dim: int = 64
    kv_heads: int = 2
    shared: int = 4
    window: int = 0
    softcap: float = 0.0
    key_bits: int = 4
    rotate_values: bool = False
    dtype: torch.dtype = torch.bfloat16


CASES = {
    "64": Case(),
    "80": Case(head_dim=80, shared=1),
    "96": Case(head_dim=96, shared=3),
    "128": Case(head_dim=128, kv_heads=1, shared=8),
    "256": Case(head_dim=256, shared=2, window=24),
    "window": Case(window=20),
    "softcap": Case(softcap=4.0),
    "8-bit keys": Case(key_bits=8),
    "rotated values": Case(rotate_values=True),
    "float16": Case(dtype=torch.float16),
    "float32": Case(dtype=torch.float32),
}


class Layer:
    """A layer with random tokens in its pages, and what attention over what is stored must give."""

    def __init__(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        if DEVICE.type == "cpu":
            prepare()
        import vllm.config
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        from rrsq.vllm.attention import CacheMetadataBuilder, QuantizedAttention
        from rrsq.vllm.pages import PageLayout, QuantizedFullSpec, QuantizedSlidingSpec

        config: Any = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=128),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=128),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            speculative_config=None,
        )
        monkeypatch.setattr(vllm.config, "get_current_vllm_config", lambda: config)
        self.case = case
        heads = case.kv_heads * case.shared
        self.impl: QuantizedAttention = QuantizedAttention(
            heads,
            case.head_dim,
            case.head_dim**-0.5,
            case.kv_heads,
            sliding_window=case.window or None,
            logits_soft_cap=case.softcap,
        )
        frequency = 100.0 ** (-torch.arange(case.head_dim // 4) / (case.head_dim // 4))
        keys = CacheScheme(case.key_bits, 32, zero_point=True, rotate=True, offset=True)
        values = CacheScheme(4, 32, zero_point=False, rotate=case.rotate_values, offset=case.rotate_values)
        self.quantizer = KVQuantizer(keys, values, case.kv_heads, case.head_dim, KeyRotary(frequency)).to(
            DEVICE
        )
        self.generator = torch.Generator().manual_seed(8)
        for part in (self.quantizer.keys, self.quantizer.values):
            if part.offset is not None:
                part.offset.copy_(2 * self.normal(case.kv_heads, case.head_dim))
        self.impl.quantizer = self.quantizer
        layout = PageLayout.of(self.quantizer)
        kind: Any = QuantizedSlidingSpec if case.window else QuantizedFullSpec
        assert issubclass(QuantizedFullSpec, FullAttentionSpec)
        spec = kind(
            block_size=BLOCK,
            num_kv_heads=case.kv_heads,
            head_size=case.head_dim,
            dtype=torch.uint8,
            token_bytes=layout.token_bytes,
            sliding_window=case.window or None,
        )
        self.builder = CacheMetadataBuilder(spec, ["layer"], config, DEVICE)
        shape = (48, case.kv_heads, BLOCK, layout.token_bytes)
        self.pages = torch.zeros(shape, dtype=torch.uint8, device=DEVICE)
        self.views = layout.views(self.pages)
        order = torch.randperm(47, generator=self.generator)[: 8 * len(BATCH)] + 1
        self.table = order.view(len(BATCH), 8).int().to(DEVICE)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def tokens(self, *counts: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random queries, keys and values of as many tokens."""
        case, total = self.case, sum(counts)
        query = self.normal(total, case.kv_heads * case.shared, case.head_dim)
        keys, values = (self.normal(total, case.kv_heads, case.head_dim) for _ in range(2))
        return tuple(x.to(DEVICE, case.dtype) for x in (query, keys, values))  # type: ignore[return-value]

    def metadata(self, batch: tuple[tuple[int, int], ...], first: int = 0) -> CacheMetadata:
        """Of requests, which lie in the blocks of the table's rows from ``first`` on."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        counts = [new for _, new in batch]
        lengths = torch.tensor([past + new for past, new in batch], dtype=torch.int32)
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        positions = torch.cat([torch.arange(past, past + new) for past, new in batch]).to(DEVICE)
        rows = torch.repeat_interleave(torch.arange(len(batch)), torch.tensor(counts)).to(DEVICE) + first
        slots = self.table[rows, positions // BLOCK].long() * BLOCK + positions % BLOCK
        return self.builder.build(
            0,
            CommonAttentionMetadata(
                query_start_loc=starts.to(DEVICE),
                query_start_loc_cpu=starts,
                seq_lens=lengths.to(DEVICE),
                seq_lens_cpu_upper_bound=lengths,
                num_reqs=len(batch),
                num_actual_tokens=sum(counts),
                max_query_len=max(counts),
                max_seq_len=int(lengths.max()),
                block_table_tensor=self.table[first : first + len(batch)],
                slot_mapping=slots,
                positions=positions,
            ),
        )

    def run(self, metadata: CacheMetadata, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        output = torch.full_like(query, float("nan"))
        return self.impl.forward(None, query, keys, values, self.pages, metadata, output)

    def fill(self, batch: tuple[tuple[int, int], ...]) -> None:
        """Store what is in the cache before."""
        for row, (past, _) in enumerate(batch):
            if past:
                self.run(self.metadata(((0, past),), row), *self.tokens(past))

    def expected(self, batch: tuple[tuple[int, int], ...], query: Tensor) -> Tensor:
        """Attention in float64 over what is stored."""
        case, parts, begin = self.case, [], 0
        for row, (past, new) in enumerate(batch):
            like = torch.empty(1, case.head_dim, device=DEVICE)
            table = self.table[row : row + 1]
            read = self.quantizer.read(self.views, like, 0, past + new, None, table)
            keys, values = (x[0].double().repeat_interleave(case.shared, 0) for x in read)
            own = query[begin : begin + new].transpose(0, 1).double()
            logits = own @ keys.transpose(1, 2) * case.head_dim**-0.5
            if case.softcap:
                logits = case.softcap * torch.tanh(logits / case.softcap)
            key = torch.arange(past + new, device=DEVICE)
            now = key[past:].unsqueeze(1)
            seen = (key <= now) & (key > now - (case.window or 10**6))
            parts.append((logits.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(0, 1))
            begin += new
        return torch.cat(parts)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest error over the largest magnitude."""
    return float((actual.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_a_mixed_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(CASES[name], monkeypatch)
    layer.fill(BATCH)
    metadata = layer.metadata(BATCH)
    assert metadata.decodes == 2
    assert len(metadata.prompts) == 2 if not CASES[name].window else 1  # 128 keys at a time.
    query, keys, values = layer.tokens(*(new for _, new in BATCH))
    out = layer.run(metadata, query, keys, values)
    assert distance(out, layer.expected(BATCH, query)) < 2e-2


@pytest.mark.parametrize("name", ["64", "window"])
def test_several_drafted_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(CASES[name], monkeypatch)
    layer.builder.reorder_batch_threshold = 4
    batch = ((70, 4), (9, 4))
    layer.fill(batch)
    metadata = layer.metadata(batch)
    assert (metadata.decodes, metadata.queries, metadata.prompts) == (2, 4, [])
    query, keys, values = layer.tokens(4, 4)
    out = layer.run(metadata, query, keys, values)
    assert distance(out, layer.expected(batch, query)) < 2e-2


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["64", "128", "window", "rotated values"])
def test_a_graph_serves_all_lengths(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(CASES[name], monkeypatch)
    layer.fill(((70, 1), (33, 1)))
    metadata = layer.metadata(((1, 1), (1, 1)))
    query, keys, values = layer.tokens(1, 1)
    layer.run(metadata, query, keys, values)
    torch.cuda.synchronize()
    graph, output = torch.cuda.CUDAGraph(), torch.empty_like(query)
    with torch.cuda.graph(graph):
        layer.impl.forward(None, query, keys, values, layer.pages, metadata, output)
    for batch in (((70, 1), (33, 1)), ((71, 1), (34, 1))):
        now = layer.metadata(batch)
        for into, new in zip((query, keys, values), layer.tokens(1, 1), strict=True):
            into.copy_(new)
        for field in ("slots", "positions", "lengths"):
            getattr(metadata, field).copy_(getattr(now, field))
        graph.replay()
        assert distance(output, layer.expected(batch, query)) < 2e-2
