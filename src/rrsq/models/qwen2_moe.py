"""Qwen2-MoE and Qwen1.5-MoE: experts beside a shared one with a gate; some layers may have an MLP instead."""

from __future__ import annotations

from typing import Any

from .family import LinearInput, ModelFamily
from .llama import LLAMA_INPUTS
from .mixtral import EXPERT_INPUTS
from .qwen3_moe import sizes_without_experts
from .sizes import ModelSizes

__all__ = ["QWEN2_MOE"]


def _more_intermediate(config: Any) -> tuple[int, ...]:
    return (config.shared_expert_intermediate_size, *sizes_without_experts(config))


QWEN2_MOE = ModelFamily(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    (
        *LLAMA_INPUTS,
        LinearInput(
            "gate_up",
            "mlp.shared_expert",
            ("gate_proj", "up_proj"),
            norm="post_attention_layernorm",
            full_precision=("mlp.shared_expert_gate",),
        ),
        LinearInput("down", "mlp.shared_expert", ("down_proj",)),
        *EXPERT_INPUTS,
    ),
    intermediate_size="moe_intermediate_size",
    more_intermediate=_more_intermediate,
    public={
        "Qwen1.5-MoE-A2.7B": ModelSizes(2048, 1408, 16, 16, 128, 24, (5632,)),
        "Qwen2-57B-A14B": ModelSizes(3584, 2560, 28, 4, 128, 28, (20480,)),
    },
)
