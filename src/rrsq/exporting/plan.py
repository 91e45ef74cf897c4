"""What can be exported of a checkpoint, and how each of its linears is then stored.

Everything is refused that the format, or the engines that read it, would take for something else: they know
nothing of rotations at run time, of scales that groups of activations share, or of rrsq's KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ExportError
from ..models import LinearInput, ModelFamily
from ..runtime.format.format import CheckpointInfo
from ..runtime.modules.input import InputScheme
from ..runtime.modules.int8_linear import Int8Linear
from ..runtime.modules.linear import QuantizedLinear
from ..runtime.scheme import group_size_for, treatment
from .schemes import LinearScheme

__all__ = ["ExportPlan", "check_exportable", "plan_export"]

# Of Marlin, vLLM's kernel for 4-bit weights and 16-bit activations.
_GROUP_SIZES = (128, 64, 32)
# Model types that vLLM asserts to have one matrix as embedding and as head.
_ALWAYS_TIED = ("gemma", "gemma2")
_WORD = 8
"""4-bit codes in an int32."""


@dataclass(frozen=True)
class ExportPlan:
    """How a checkpoint is exported.

    Attributes:
        schemes: of the quantized linears, by module path.
        kept: paths of the linears in full precision.
        drops_cache: the checkpoint has a quantized KV cache, and the export has not.
    """

    schemes: dict[str, LinearScheme]
    kept: tuple[str, ...]
    drops_cache: bool


def check_exportable(info: CheckpointInfo, family: ModelFamily, *, drop_cache: bool) -> None:
    """Refuse what a checkpoint's own description tells already, before its model is built.

    Args:
        info: what the checkpoint says of itself.
        family: the model's.
        drop_cache: the user wants the model without its quantized KV cache.

    Raises:
        ExportError: something cannot be exported.
    """
    _check_rotations(info, family)
    if any(entry.experts for entry in family.inputs):
        raise ExportError(
            "Mixtures of experts are not exported: engines differ in how they name and fuse the experts of"
            " such checkpoints. Serve the checkpoint with 'rrsq serve'."
        )
    if info.recipe.embedding.bits != 16:
        raise ExportError(
            f"The embedding is in {info.recipe.embedding.bits} bits, and compressed-tensors has only linears."
            " Quantize the model with --set embedding.bits=16."
        )
    if info.recipe.kv_cache is not None and not drop_cache:
        raise ExportError(
            "The checkpoint has a quantized KV cache, which is no part of compressed-tensors: other engines"
            " would keep keys and values in 16 bits without a word. Give --drop-cache if that is what you"
            " want: the weights do not depend on the cache."
        )


def plan_export(model: Any, info: CheckpointInfo, family: ModelFamily) -> ExportPlan:
    """Find the scheme of each linear, or say why there is none.

    Args:
        model: of the checkpoint, assembled; its tensors may be on the meta device.
        info: what the checkpoint says of itself, which :func:`check_exportable` has seen.
        family: the model's.

    Raises:
        ExportError: something cannot be exported.
    """
    _check_model(model, family)
    _check_head(model, family)
    schemes: dict[str, LinearScheme] = {}
    kept: list[str] = []
    for index, layer in enumerate(model.get_submodule(family.layers)):
        for entry in family.inputs_in(layer):
            name = family.layer_name(index)
            how = treatment(info.recipe, name, entry)
            _check_together(name, entry, how.linears)
            for path in entry.linear_paths:
                module = layer.get_submodule(path)
                if isinstance(module, QuantizedLinear):
                    schemes[f"{name}.{path}"] = _scheme(f"{name}.{path}", module)
                else:
                    kept.append(f"{name}.{path}")
    head = model.get_submodule(family.head)
    if isinstance(head, Int8Linear):
        schemes[family.head] = LinearScheme(8)
    elif isinstance(head, QuantizedLinear):
        schemes[family.head] = _scheme(family.head, head)
    else:
        kept.append(family.head)
    if not schemes:
        raise ExportError(
            "No linear of the checkpoint is quantized, so there is nothing to export: use the original model."
        )
    return ExportPlan(schemes, tuple(kept), info.recipe.kv_cache is not None)


def _check_rotations(info: CheckpointInfo, family: ModelFamily) -> None:
    rotation = info.rotation
    online = [
        name
        for name in ("residual_online", "across_heads", "intermediate", "more_intermediate", "blocks")
        if getattr(rotation, name) not in (None, (), 1)
    ]
    if online:
        raise ExportError(
            f"The checkpoint rotates activations at run time ({', '.join(online)}), which no other engine"
            " does. Quantize the model by a recipe whose rotations are all folded into the weights, such as"
            " w4a16-rotated, or w4a16-rotated with --set rotation.residual=false for models with norms behind"
            " attention and MLP."
        )
    if rotation.residual is not None and family.norm.centered:
        raise ExportError(
            f"R1 turned the LayerNorms of this {family.model_type} model into RMSNorms, which the"
            " architecture does not have elsewhere. Quantize it with --set rotation.residual=false."
        )


def _check_model(model: nn.Module, family: ModelFamily) -> None:
    others = family.other_modules(model)
    others = [name for name in others if name != "rotation_signs"]
    if others:
        raise ExportError(
            f"The model has a part beside the language model ('{others[0]}'), and only models of text are"
            " exported. Serve the checkpoint with 'rrsq serve'."
        )


def _check_head(model: Any, family: ModelFamily) -> None:
    if family.model_type in _ALWAYS_TIED and not model.config.tie_word_embeddings:
        raise ExportError(
            f"The recipe gave the model an output head of its own, and vLLM's {family.model_type} has none"
            " beside the embedding. Quantize it with --set rotation.residual=false and --set head.bits=16."
        )


def _check_together(layer: str, entry: LinearInput, quantized: tuple[str, ...]) -> None:
    """Engines make one matrix of the linears of one input."""
    if quantized and len(quantized) < len(entry.linears):
        other = next(name for name in entry.linears if name not in quantized)
        raise ExportError(
            f"'{layer}.{entry.path}' is read by {', '.join(entry.linears)}, of which {other} stays in 16 bits"
            " and others do not; engines make one matrix of them. Name all of them in the recipe's"
            " modules_to_not_convert, or none."
        )


def _scheme(path: str, linear: QuantizedLinear) -> LinearScheme:
    """How a quantized linear is stored."""
    if linear.in_features % _WORD:
        raise ExportError(
            f"'{path}' has {linear.in_features} input channels, and {_WORD} codes make a word. Name it in the"
            " recipe's modules_to_not_convert."
        )
    scheme = linear.input_quantizer.scheme
    if scheme.bits == 8:
        _check_int8(path, scheme)
        # A code times its group's multiplier is an int8 number: groups need no scales of their own then.
        return LinearScheme(8, int8_input=True)
    if scheme.bits != 16:
        raise ExportError(
            f"'{path}' has {scheme.bits}-bit activations, which no other engine computes as rrsq does."
            " Quantize the model by a recipe with 16-bit activations, such as w4a16-rotated or gptq-w4a16."
        )
    multiplier = linear.weight_multiplier
    signed = multiplier is not None and multiplier.dtype.is_signed
    if signed and linear.out_features % _WORD:
        raise ExportError(
            f"'{path}' has signed multipliers, which become zero points, and {linear.out_features} rows, of"
            f" which {_WORD} make a word. Quantize it with --set weights.signed=false."
        )
    return LinearScheme(4, _group_size(path, linear), zero_points=signed)


def _group_size(path: str, linear: QuantizedLinear) -> int | None:
    """The largest group that Marlin has and that lies within one of the linear's."""
    if linear.group_size is None:
        return None
    for size in _GROUP_SIZES:
        if linear.group_size % size == 0:
            return size
    raise ExportError(
        f"'{path}' has groups of {linear.group_size} channels; vLLM's kernel for 4-bit weights has 32, 64 and"
        f" 128. Quantize the model with --set weights.group_size=128: the linear has {linear.in_features}"
        f" channels, so that its groups would have {group_size_for(128, linear.in_features)}; or, if that is"
        " none of the three, with --set weights.group_size=null."
    )


def _check_int8(path: str, scheme: InputScheme) -> None:
    differs = None
    if scheme.group_size is not None:
        differs = "smoothed in groups"
    elif scheme.signed:
        differs = "quantized with signed levels"
    elif scheme.clip != 1:
        differs = "clipped"
    if differs is not None:
        raise ExportError(
            f"The 8-bit input of '{path}' is {differs}, and other engines take one scale a token, the largest"
            " magnitude over 127. Quantize the model with activations: {bits: 8} and nothing else there."
        )
