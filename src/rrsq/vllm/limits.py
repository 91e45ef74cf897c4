"""What of a checkpoint can be served, and by how many processes. Knows nothing of vLLM."""

from __future__ import annotations

from typing import Any

from ..errors import UsageError
from ..models import LinearInput, family_for
from ..recipe import Activations
from ..runtime.format.format import CheckpointInfo
from ..runtime.modules.input import InputScheme
from ..runtime.modules.rotation import OnlineHadamard, online_rotation
from ..runtime.rotation.hadamard import HadamardPlan
from ..runtime.rotation.rotations import Rotations
from ..runtime.scheme import Treatment, input_scheme, sections, treatment

__all__ = ["check_experts", "check_servable", "shard_rotation", "shard_scheme"]


def check_servable(config: Any, info: CheckpointInfo, tensor_parallel_size: int = 1) -> None:
    """Refuse what cannot be served.

    Args:
        config: configuration of transformers.
        info: the checkpoint's ``quantization_config``.
        tensor_parallel_size: processes that share each linear.

    Raises:
        UsageError: with the reason and what to do.
    """
    family = family_for(config)
    if not family.served:
        raise UsageError(
            f"Checkpoints of {family.architecture} have not been shown to give the same in vLLM, and are not"
            " served. They run in transformers (rrsq generate, rrsq.load)."
        )
    for _, activations in sections(info.recipe):
        _check_smoothing(activations)
    sizes = family.sizes(config)
    if sizes.heads % tensor_parallel_size:
        raise UsageError(
            f"The model has {sizes.heads} attention heads, which {tensor_parallel_size} processes cannot"
            " share evenly. Use a --tensor-parallel-size that divides them."
        )
    rotations = info.rotation.rotations()
    channels = {"o": (sizes.heads * sizes.head_dim,), "down": (sizes.intermediate, *sizes.more_intermediate)}
    for index in range(sizes.layers):
        name = family.layer_name(index)
        experts = [entry for entry in family.inputs if entry.experts]
        check_experts(name, {entry.name: treatment(info.recipe, name, entry) for entry in experts})
        for entry in family.inputs:
            how = treatment(info.recipe, name, entry)
            if how.linears and entry.writes_residual and tensor_parallel_size > 1:
                for size in channels[entry.name]:
                    _check_split(entry, how, rotations, size, tensor_parallel_size)


def check_experts(layer: str, how: dict[str, Treatment]) -> None:
    """Refuse experts of which one linear is quantized and the other is not; ``how`` is by input.

    Raises:
        UsageError: they are such.
    """
    if len({bool(treated.linears) for treated in how.values()}) > 1:
        raise UsageError(
            f"Of the experts of '{layer}' some linears are in 4 bits and some in 16; vLLM runs them in one"
            " call. Quantize all of them or none (modules_to_not_convert=['*.experts.*'])."
        )


def _check_smoothing(activations: Activations) -> None:
    smoothing = activations.smoothing
    if smoothing is None or not smoothing.inputs:
        return
    if smoothing.scope != "token":
        raise UsageError(
            f"The activations of this checkpoint share scales over a {smoothing.scope}"
            " (activations.smoothing.scope): in a server, other requests would change a text. Quantize the"
            " model again with scope: token, as the recipe rrs-w4a4kv4 does."
        )
    if smoothing.channel_order == "per_call":
        raise UsageError(
            "This checkpoint sorts channels anew in each call (activations.smoothing.channel_order:"
            " per_call), which is only simulated, and by all tokens of the call. Quantize the model again"
            " with channel_order: none."
        )


def _check_split(entry: LinearInput, how: Treatment, rotations: Rotations, channels: int, parts: int) -> None:
    if channels % (2 * parts):
        return  # vLLM says so itself of sizes that cannot be split; of 4-bit codes two share a byte.
    where = f"{entry.name} ({channels} channels)"
    rotation = online_rotation(entry, rotations, channels)
    shard_rotation(where, rotation, channels // parts)
    shard_scheme(where, input_scheme(how.activations, entry, channels), channels // parts)


def shard_rotation(where: str, rotation: OnlineHadamard | None, channels: int) -> OnlineHadamard | None:
    """An input's online rotation for the part of the channels that one process has.

    Args:
        where: the input, for the error.
        rotation: of the whole input, or None.
        channels: of one process.

    Raises:
        UsageError: a block of the rotation does not lie within a process.
    """
    if rotation is None:
        return None
    plan, inner = rotation.plan, rotation.inner
    if channels == plan.size * inner:
        return rotation
    if channels % (plan.block * inner):
        parts = plan.size * inner // channels
        raise UsageError(
            f"The online rotation of '{where}' mixes {plan.block * inner} channels, of which {parts}"
            f" processes have {channels} each: it would cross them. Use a smaller --tensor-parallel-size, or"
            f" quantize the model again with --set rotation.shards={parts}, or with smaller rotation.blocks."
        )
    return OnlineHadamard(HadamardPlan(channels // inner, plan.block, plan.base), inner)


def shard_scheme(where: str, scheme: InputScheme, channels: int) -> InputScheme:
    """An input's scheme for the part of the channels that one process has.

    Raises:
        UsageError: the whole input is in a stored order, which processes cannot share.
    """
    if channels == scheme.channels:
        return scheme
    if scheme.stores_order:
        raise UsageError(
            f"The channels of '{where}' are in a stored order (activations.smoothing.channel_order:"
            " calibrated), which mixes those of different processes. Use --tensor-parallel-size 1, or"
            " quantize the model again with channel_order: none."
        )
    return InputScheme(**{**vars(scheme), "channels": channels})
