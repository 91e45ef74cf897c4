"""``config.json`` of models without files: of a public model's sizes, and of what a recipe makes of it."""

from __future__ import annotations

from typing import Any

from rrsq.errors import UsageError, did_you_mean
from rrsq.models import families, family_for
from rrsq.recipe import Recipe
from rrsq.runtime.format.format import CheckpointInfo, RotationInfo
from rrsq.runtime.rotation.rotations import make_rotations
from rrsq.runtime.scheme import keeps_tie

__all__ = ["describe", "public_config", "public_shapes"]

# By how a name begins.
_VOCABULARIES = {
    "Llama-3": 128256,
    "Llama-2": 32000,
    "SmolLM2": 49152,
    "Mistral-7B": 32768,
    "Mistral-": 131072,
    "Qwen": 151936,
}
_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
_CONTEXT = 40960


def public_shapes() -> dict[str, Any]:
    """Names of public models whose shape can be made up, with their family."""
    return {name: family for family in families() if family.model_type in _FAMILIES for name in family.public}


def public_config(name: str, layers: int | None = None) -> Any:
    """The transformers configuration of a public model's sizes.

    Args:
        name: of :func:`public_shapes`, in any case.
        layers: fewer or more than it has; None: as many.

    Raises:
        UsageError: there is no such name.
    """
    from transformers import AutoConfig

    known = public_shapes()
    found = {each.lower(): each for each in known}.get(name.lower())
    if found is None:
        raise UsageError(
            f"--shape {name}: with --whole it is the name of a model: {', '.join(known)}."
            f"{did_you_mean(name, known)}"
        )
    family = known[found]
    sizes = family.public[found]
    width = "moe_intermediate_size" if family.model_type == "qwen3_moe" else "intermediate_size"
    return AutoConfig.for_model(
        family.model_type,
        **({} if width == "intermediate_size" else _EXPERTS),
        **{width: sizes.intermediate},
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        num_hidden_layers=layers or sizes.layers,
        max_position_embeddings=_CONTEXT,
        vocab_size=next(size for start, size in _VOCABULARIES.items() if found.startswith(start)),
        architectures=[family.architecture],
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def describe(config: Any, recipe: Recipe) -> dict[str, Any]:
    """``config.json`` of what a recipe makes of a model."""
    family = family_for(config)
    sizes = family.sizes(config)
    rotations = make_rotations(recipe.rotation, sizes, 0, folds_residual=family.folds_residual)
    cache = recipe.kv_cache
    info = CheckpointInfo(
        recipe=recipe,
        rotation=RotationInfo.model_validate(rotations.describe()),
        key_bits=() if cache is None else (cache.keys.bits,) * sizes.layers,
    )
    described = config.to_dict()
    if not keeps_tie(recipe, family, folds_residual=rotations.residual is not None):
        described["tie_word_embeddings"] = False
    return {**described, "quantization_config": info.model_dump(mode="json")}
