"""Qwen3-MoE: Qwen3 with a mixture of experts; some layers may have an ordinary MLP instead."""

from __future__ import annotations

from typing import Any

from .family import ModelFamily
from .llama import LLAMA_INPUTS
from .mixtral import EXPERT_INPUTS
from .sizes import ModelSizes

__all__ = ["QWEN3_MOE", "sizes_without_experts"]


def sizes_without_experts(config: Any) -> tuple[int, ...]:
    """The size of the MLPs in layers without experts, if there are such layers."""
    everywhere = not config.mlp_only_layers and config.decoder_sparse_step == 1
    return () if everywhere else (config.intermediate_size,)


QWEN3_MOE = ModelFamily(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    (*LLAMA_INPUTS, *EXPERT_INPUTS),
    intermediate_size="moe_intermediate_size",
    more_intermediate=sizes_without_experts,
    public={
        "Qwen3-30B-A3B": ModelSizes(2048, 768, 32, 4, 128, 48),
        "Qwen3-235B-A22B": ModelSizes(4096, 1536, 64, 4, 128, 94),
    },
)
