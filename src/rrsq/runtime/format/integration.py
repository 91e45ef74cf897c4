"""The transformers integration: ``AutoModelForCausalLM.from_pretrained`` of a checkpoint.

Importing this module registers the quantization method; ``import rrsq`` sees to that (``rrsq/_register.py``).
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...errors import UsageError
from ...models import family_for
from ..assemble import (
    RotationSigns,
    attach_kv_quantizer,
    key_rotary,
    quantize_embedding_module,
    quantize_head_module,
    quantize_input_modules,
    treated_inputs,
)
from ..modules.norms import replace_final_norm, replace_layer_norms
from ..ready import make_ready
from ..scheme import treatment
from .format import QUANT_METHOD, CheckpointInfo, parse_info
from .json_files import read_config
from .validate import check_description, check_layers, check_shards, check_values

__all__ = ["RRSQConfig", "RRSQQuantizer", "assemble_model"]


@register_quantization_config(QUANT_METHOD)
class RRSQConfig(QuantizationConfigMixin):
    """``quantization_config`` as transformers holds it; :attr:`info` is the validated form."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.info: CheckpointInfo = parse_info({**fields, "quant_method": QUANT_METHOD})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``config.json``."""
        return self.info.model_dump(mode="json")

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as :meth:`to_dict`: every field is written."""
        return self.to_dict()

    def __repr__(self) -> str:
        return f"RRSQConfig(recipe={self.info.recipe.name!r}, format_version={self.info.format_version})"


@register_quantizer(QUANT_METHOD)
class RRSQQuantizer(HfQuantizer):
    """Builds the quantized modules before transformers loads their tensors."""

    requires_calibration = True

    def update_attn_implementation(self, config: Any) -> Any:
        """Check the checkpoint: the last call before a model is built in which its configuration is shown."""
        check_description(config, self.quantization_config.info)
        folder = Path(str(getattr(config, "_name_or_path", "")))
        if folder.is_dir():
            read_config(folder)
            check_layers(folder, config.get_text_config().num_hidden_layers)
        return config

    # What transformers before 5.23 calls at the same point.
    update_tp_plan = update_attn_implementation

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        assemble_model(model, self.quantization_config.info)
        check_shards(model, kwargs.get("checkpoint_files") or [])

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        check_values(model)
        make_ready(model)

    def update_weight_conversions(self, weight_conversions: Any, *args: Any) -> list[Any]:
        """None: a checkpoint holds tensors under the names that the model has, not those of the original."""
        return []

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """A loaded model can be saved again, bit for bit."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside the integer weights are: gradients pass through them to what comes before."""
        return True


def assemble_model(model: Any, info: CheckpointInfo) -> nn.Module:
    """Replace the linears of a freshly built model by empty quantized ones, as ``info`` says."""
    family = family_for(model.config)
    recipe = info.recipe
    sizes = family.sizes(model.config)
    rotations = info.rotation.rotations()
    replace_final_norm(model, family, rotations)
    for index, layer in enumerate(model.get_submodule(family.layers)):
        replace_layer_norms(layer, family, rotations)
        for entry in treated_inputs(layer, family, recipe):
            how = treatment(recipe, family.layer_name(index), entry)
            quantize_input_modules(layer, entry, how, rotations)
        if recipe.kv_cache is not None:
            bits = info.key_bits[index] if index < len(info.key_bits) else recipe.kv_cache.keys.bits
            rotary = key_rotary(model, family, index)
            attach_kv_quantizer(layer, family, recipe.kv_cache, sizes, rotary, bits)
    embedding = quantize_embedding_module(model, family, recipe)
    head = quantize_head_module(model, family, recipe)
    if embedding is not None or head is not None:
        model.resize_token_embeddings = MethodType(_refuse_resizing, model)
    if recipe.rotation is not None:
        model.rotation_signs = RotationSigns(rotations)
    # Scales and cache offsets are float32 whatever dtype the model is loaded in.
    model._keep_in_fp32_modules_strict = {
        *(model._keep_in_fp32_modules_strict or ()),
        "weight_scale",
        "kv_quantizer",
    }
    return model


def _refuse_resizing(model: Any, new_num_tokens: int | None = None, *args: Any, **options: Any) -> nn.Module:
    """In the place of a model's ``resize_token_embeddings``: integers take up no further tokens.

    Raises:
        UsageError: another size is asked for.
    """
    embedding: nn.Module = model.get_input_embeddings()
    if args or options or new_num_tokens not in (None, embedding.num_embeddings):
        raise UsageError(
            "The embedding or the output head of this model is integers and cannot be resized. Resize those"
            " of the original model and quantize the result, or quantize the model with --set"
            " embedding.bits=16 --set head.bits=16."
        )
    return embedding
