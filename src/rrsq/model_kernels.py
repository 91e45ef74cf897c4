"""Which kernels would serve a model: one line for each kind of linear input, from its configuration alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    import torch

    from .kernels.operation import Facts, Operation, Target
    from .models import LinearInput, ModelFamily
    from .recipe import Recipe
    from .runtime.modules.input import InputScheme
    from .runtime.modules.rotation import OnlineHadamard
    from .runtime.rotation.rotations import Rotations
    from .runtime.scheme import Treatment

__all__ = ["DEFAULT_RECIPE", "ModelKernels", "ServedInput", "Step", "examine_model"]

DEFAULT_RECIPE = "rrs-w4a4kv4"


@dataclass(frozen=True)
class Step:
    """One operation of an input.

    Attributes:
        operation: its name, or ``library`` for a product of torch's.
        backend: of the kernel that would run; None where nothing can.
        reasons: what is against the kernels that were passed over.
    """

    operation: str
    backend: str | None = None
    reasons: tuple[str, ...] = ()

    @property
    def missing(self) -> bool:
        """No kernel can serve it as things are set."""
        return self.backend is None and self.operation != "library"


@dataclass(frozen=True)
class ServedInput:
    """An input of linears, the same in some of the layers.

    Attributes:
        path: from the decoder layer, such as ``mlp.down``; that of the output head.
        layers: indices of the layers; empty for the head.
        channels: of the input.
        preparation: what rotates and quantizes it, or None.
        product: what multiplies.
    """

    path: str
    layers: tuple[int, ...]
    channels: int
    preparation: Step | None
    product: Step

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps in order."""
        return (self.product,) if self.preparation is None else (self.preparation, self.product)


@dataclass(frozen=True)
class ModelKernels:
    """What was found.

    Attributes:
        recipe: its name.
        quantized: the recipe is that of a checkpoint.
        inputs: in the order a layer runs them.
    """

    recipe: str
    quantized: bool
    inputs: tuple[ServedInput, ...]


def examine_model(
    name: str, wanted: str | Recipe | None, target: Target, data_root: Path | None = None
) -> ModelKernels:
    """Say which kernels would serve the inputs of a model. Its weights are neither fetched nor read.

    Args:
        name: checkpoint, Hub id, Hugging Face folder or ``.gguf`` file.
        wanted: a recipe, its name or path; None for that of a checkpoint, or the default.
        target: where the model would run.
        data_root: as the option of that name.

    Raises:
        UsageError: a recipe for a model that is quantized already.
        RecipeError: the recipe is unknown, or impossible for the model.
        ModelLoadError: the configuration cannot be found or read.
        UnsupportedArchitectureError: no family covers the model.
    """
    import torch

    from .models import family_for
    from .quantizer.production.source import empty_model
    from .recipe import load_recipe
    from .runtime.format.format import QUANT_METHOD, parse_info
    from .runtime.format.loading import load_config
    from .runtime.rotation.rotations import make_rotations
    from .runtime.scheme import check_recipe

    config = load_config(name, data_root)
    family = family_for(config)
    described = getattr(config, "quantization_config", None)
    own = described if isinstance(described, dict) else {}
    quantized = own.get("quant_method") == QUANT_METHOD
    if quantized and wanted is not None:
        raise UsageError(f"'{name}' is quantized already: leave out --recipe, its own is looked at.")
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    model = empty_model(config, dtype)
    if quantized:
        info = parse_info(own)
        recipe, rotations = info.recipe, info.rotation.rotations()
    else:
        recipe = (
            load_recipe(wanted or DEFAULT_RECIPE) if wanted is None or isinstance(wanted, str) else wanted
        )
        check_recipe(recipe, family, model)
        rotations = make_rotations(
            recipe.rotation, family.sizes(config), seed=0, folds_residual=family.folds_residual
        )
    kinds: dict[ServedInput, list[int]] = {}
    for index, served in _served(model, family, recipe, rotations, target, dtype):
        kinds.setdefault(served, []).append(index)
    inputs = [
        ServedInput(kind.path, tuple(layers), kind.channels, kind.preparation, kind.product)
        for kind, layers in kinds.items()
    ]
    return ModelKernels(
        recipe.name, quantized, (*inputs, _head(model, family, recipe, rotations, target, dtype))
    )


def _served(
    model: Any,
    family: ModelFamily,
    recipe: Recipe,
    rotations: Rotations,
    target: Target,
    dtype: torch.dtype,
) -> Iterator[tuple[int, ServedInput]]:
    """Every input of every layer, and the layer's index."""
    from .runtime.modules.rotation import online_rotation
    from .runtime.scheme import changes_linears, treatment

    changed = changes_linears(recipe)
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        for entry in family.inputs_in(layer):
            channels, rows = entry.shape(layer)
            rotation = online_rotation(entry, rotations, channels) if changed else None
            how = treatment(recipe, family.layer_name(index), entry)
            if how.linears:
                steps = _quantized(entry, how, rotation, channels, rows, target, dtype)
                yield index, ServedInput(entry.path, (), channels, *steps)
            if len(how.linears) < len(entry.linears):
                rotating = None if rotation is None else _rotation(rotation, channels, dtype, target)
                path = entry.path if not how.linears else f"{entry.path} (16 bits)"
                yield index, ServedInput(path, (), channels, rotating, Step("library"))


def _quantized(
    entry: LinearInput,
    how: Treatment,
    rotation: OnlineHadamard | None,
    channels: int,
    rows: int,
    target: Target,
    dtype: torch.dtype,
) -> tuple[Step | None, Step]:
    """What prepares and what multiplies the input of quantized linears."""
    import torch

    from . import kernels
    from .runtime.scheme import group_size_for, input_scheme

    scheme = input_scheme(how.activations, entry, channels)
    weight: dict[str, Any] = {"in_features": channels, "out_features": rows}
    if how.weights.group_size is not None:
        weight["weight_group_size"] = group_size_for(how.weights.group_size, channels)
    preparation = _preparation(scheme, rotation, dtype, target)
    floating = scheme.bits == 16 or scheme.simulated
    smoothed = not floating and scheme.group_size is not None and scheme.scales == "real"
    if smoothed:
        weight["group_size"] = scheme.group_size
    if entry.experts:
        operand = dtype if floating else torch.int8
        facts = {"operand": operand, "out_dtype": dtype, **weight}
        return preparation, _step(kernels.grouped_linear, target, facts)
    if floating:
        return preparation, _step(kernels.linear_w4a16, target, {"x": dtype, **weight})
    product = kernels.linear_group_scaled if smoothed else kernels.linear_int8
    return preparation, _step(product, target, {"out_dtype": dtype, **weight})


def _preparation(
    scheme: InputScheme, rotation: OnlineHadamard | None, dtype: torch.dtype, target: Target
) -> Step | None:
    """What rotates and quantizes an input."""
    import torch

    from . import kernels

    if scheme.bits == 16:
        # Rotated in float32.
        return None if rotation is None else _rotation(rotation, scheme.channels, torch.float32, target)
    facts: dict[str, Any] = {"x": dtype, "channels": scheme.channels}
    if scheme.group_size is not None:
        facts["group_size"] = scheme.group_size
    if scheme.signed:
        facts["hadamard_block"] = 1 if rotation is None else rotation.plan.block
        return _step(kernels.quantize_signed, target, facts)
    if rotation is not None and not scheme.simulated:
        facts.update(_rotation_facts(rotation, scheme.channels))
    integers = scheme.group_size is None or scheme.scales == "integer"
    return _step(kernels.quantize_tokens if integers else kernels.quantize_smoothed, target, facts)


def _rotation(rotation: OnlineHadamard, channels: int, dtype: torch.dtype, target: Target) -> Step:
    from . import kernels

    facts: dict[str, Any] = {"x": dtype, "channels": channels, **_rotation_facts(rotation, channels)}
    return _step(kernels.hadamard_transform, target, facts)


def _rotation_facts(rotation: OnlineHadamard, channels: int) -> dict[str, int]:
    from .kernels.rotation import rotation_sizes

    plan = rotation.plan
    return dict(rotation_sizes(channels, plan.base, plan.block, rotation.inner))


def _head(
    model: Any,
    family: ModelFamily,
    recipe: Recipe,
    rotations: Rotations,
    target: Target,
    dtype: torch.dtype,
) -> ServedInput:
    import torch

    from . import kernels
    from .runtime.modules.embedding import block_rotation
    from .runtime.scheme import group_size_for, head_is_kept, head_shares_codes, keeps_tie

    rows, channels = model.get_submodule(family.head).weight.shape
    product = Step("library")
    facts: dict[str, Any] = {"x": dtype, "in_features": channels, "out_features": rows}
    tied = keeps_tie(recipe, family, folds_residual=rotations.residual is not None)
    bits, group_size, preparation = recipe.head.bits, recipe.weights.group_size, None
    if tied and head_shares_codes(recipe, family, model.config):
        bits, group_size = recipe.embedding.bits, recipe.embedding.group_size
        rotation = block_rotation(channels, recipe.embedding.blocks) if bits == 4 else None
        if rotation is not None:
            preparation = _rotation(rotation, channels, torch.float32, target)
    elif head_is_kept(recipe, family):
        return ServedInput(family.head, (), channels, None, product)
    if bits == 8:
        product = _step(kernels.linear_w8a16, target, facts)
    elif bits == 4:
        if group_size is not None:
            facts["weight_group_size"] = group_size_for(group_size, channels)
        product = _step(kernels.linear_w4a16, target, facts)
    return ServedInput(family.head, (), channels, preparation, product)


def _step(operation: Operation[..., Any], target: Target, facts: Facts) -> Step:
    """The best kernel for these facts, and what is against the better ones."""
    passed_over: list[str] = []
    for candidate in operation.explain(target, facts):
        if not candidate.reasons:
            return Step(operation.name, candidate.kernel.backend, tuple(passed_over))
        passed_over += candidate.reasons
    return Step(operation.name, None, tuple(passed_over))
