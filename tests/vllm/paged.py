"""A scheduler of a few lines over vLLM's own pages: its specs, groups, allocation and metadata, on a CPU."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from fake_vllm import Served
from torch import Tensor

__all__ = ["Paged", "Request", "planned_cache"]


def planned_cache(config: Any, memory: int) -> Any:
    """vLLM's configuration of the pages of the model that was built last."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

    with set_current_vllm_config(config):
        return get_kv_cache_configs(config, [get_kv_cache_spec(config)], [memory])[0]


@dataclass
class Request:
    """A text, and what of it is in the cache.

    Attributes:
        tables: for each group of layers, the blocks that it lies in.
        done: tokens that were run.
    """

    tokens: Tensor
    tables: list[list[int]] = field(default_factory=list)
    done: int = 0

    def preempt(self) -> None:
        """Lose all that is in the cache."""
        self.tables, self.done = [], 0

    def begin_as(self, other: Request, blocks: int, block_size: int) -> None:
        """Share the first blocks of another request."""
        assert torch.equal(self.tokens[: blocks * block_size], other.tokens[: blocks * block_size])
        self.tables = [table[:blocks] for table in other.tables]
        self.done = blocks * block_size


class Paged:
    """A model with pages.

    Attributes:
        cache: vLLM's configuration of them.
        groups: of layers with the same metadata, by group of layers with the same blocks.
        pages: tensors by layer.
    """

    def __init__(self, served: Served, memory: int = 2**22) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.v1.worker.gpu import attn_utils

        self.config, self.model = served.config, served.models[0]
        self._served = served
        layers = self.config.compilation_config.static_forward_context
        for layer in layers.values():
            layer.use_direct_call = True  # vLLM's op is for CUDA.
        cpu = torch.device("cpu")
        with set_current_vllm_config(self.config):
            self.cache = planned_cache(self.config, memory)
            self.groups, self.graphs, sizes = attn_utils.init_attn_backend(self.cache, self.config, cpu)
            self.pages = attn_utils.init_kv_cache(
                [], layers, self.cache, self.groups, cpu, "auto", sizes, self.config
            )
        self.block_sizes = sizes
        self.free = list(range(1, self.cache.num_blocks))
        random.Random(3).shuffle(self.free)

    def step(self, *batch: tuple[Request, int], padding: int = 0) -> list[Tensor]:
        """Run the next tokens of requests together, those of one token first.

        Args:
            batch: requests and how many of their tokens to run.
            padding: rows of one token each behind the batch, as a graph has them.

        Returns:
            Logits ``[tokens, vocabulary]`` of each request.
        """
        from vllm.config import set_current_vllm_config
        from vllm.forward_context import set_forward_context
        from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer

        counts = [count for _, count in batch] + [1] * padding
        assert counts == sorted(counts)
        nothing = torch.zeros(padding, dtype=torch.long)
        ids = torch.cat([r.tokens[r.done : r.done + n] for r, n in batch] + [nothing])
        positions = torch.cat([torch.arange(r.done, r.done + n) for r, n in batch] + [nothing])
        lengths = torch.tensor([r.done + n for r, n in batch] + [0] * padding, dtype=torch.int32)
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        tables, slots = [], []
        for group, size in enumerate(self.block_sizes):
            table = torch.zeros(len(counts), 40, dtype=torch.int32)
            where = []
            for row, (request, count) in enumerate(batch):
                own = self._blocks(request, group, -(-(request.done + count) // size))
                table[row, : len(own)] = torch.tensor(own)
                token = torch.arange(request.done, request.done + count)
                where.append(table[row, token // size].long() * size + token % size)
            tables.append(table)
            slots.append(torch.cat([*where, torch.full((padding,), -1)]))
        metadata = build_attn_metadata(
            self.groups,
            num_reqs=len(counts),
            num_tokens=len(ids),
            query_start_loc_gpu=starts,
            query_start_loc_cpu=starts,
            max_query_len=max(counts),
            seq_lens=lengths,
            max_seq_len=int(lengths.max()),
            block_tables=tables,
            slot_mappings=torch.stack(slots),
            kv_cache_config=self.cache,
            seq_lens_cpu_upper_bound=lengths,
            positions=positions,
        )
        by_layer = build_slot_mappings_by_layer(torch.stack(slots), self.cache)
        with (
            set_current_vllm_config(self.config),
            set_forward_context(metadata, self.config, slot_mapping=by_layer),
            torch.inference_mode(),
        ):
            logits = self.model.compute_logits(self.model(ids, positions))
        for request, count in batch:
            request.done += count
        return list(logits.split(counts))[: len(batch)]

    def _blocks(self, request: Request, group: int, count: int) -> list[int]:
        while len(request.tables) <= group:
            request.tables.append([])
        own = request.tables[group]
        while len(own) < count:
            own.append(self.free.pop())
        return own
