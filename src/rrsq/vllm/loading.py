"""Loading a checkpoint into vLLM's model: every tensor has one place, and every parameter gets its tensors.

vLLM by itself passes over biases that it has no place for, and does not notice tensors that are missing from
a quantized model. So what is loaded is compared with the model that transformers would load, by names and
shapes, and what is filled with the parameters that vLLM has.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import is_pp_missing_parameter

from ..errors import CheckpointError
from ..models import LinearInput
from ..runtime.format.format import CheckpointInfo
from ..runtime.format.integration import assemble_model
from ..runtime.format.validate import check_values
from ..runtime.modules.rotation import online_rotation
from ..runtime.rotation.rotations import Rotations
from .cache import load_offset
from .experts import load_experts
from .places import Places

if TYPE_CHECKING:
    from .config import RRSQConfig

__all__ = ["described_model", "expected_tensors", "load_checkpoint"]

Weights = Iterable[tuple[str, Tensor]]
Expected = dict[str, Tensor | None]
_QKV = ("q", "k", "v")


def load_checkpoint(
    model: nn.Module,
    config: RRSQConfig,
    expected: Expected,
    weights: Weights,
    load_others: Callable[[Weights], set[str]],
) -> set[str]:
    """Load all tensors of a checkpoint.

    Args:
        model: vLLM's, on this process.
        config: of the checkpoint.
        expected: what :func:`expected_tensors` says that there must be.
        weights: all tensors of the checkpoint.
        load_others: vLLM's own way for what is no part of the language model, such as a vision tower.

    Returns:
        Names of the parameters that were filled.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape or dtype, has no place in vLLM's
            model, or holds values that none can have; or a parameter of vLLM's got none.
    """
    target = _Target(model, config)
    others = target.load(_checked(weights, expected))
    if others:
        target.filled |= {(name, None) for name in load_others(others)}
    target.check_complete()
    check_values(model)
    return {name for name, _ in target.filled}


def described_model(hf_config: Any, info: CheckpointInfo) -> nn.Module:
    """The model that transformers would load, on the meta device.

    Args:
        hf_config: configuration of transformers.
        info: the checkpoint's ``quantization_config``.
    """
    from transformers import AutoModelForCausalLM

    plain = copy.deepcopy(hf_config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with torch.device("meta"):
        return assemble_model(AutoModelForCausalLM.from_config(plain), info)


def expected_tensors(model: nn.Module) -> Expected:
    """What a checkpoint must hold, by name, as meta tensors; None for what it may leave out: tied weights.

    Args:
        model: of :func:`described_model`.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: None if name in tied else tensor for name, tensor in model.state_dict().items()}


def _checked(weights: Weights, expected: Expected) -> Iterator[tuple[str, Tensor]]:
    """The tensors, if they are those that are expected."""
    missing = {name for name, tensor in expected.items() if tensor is not None}
    for name, tensor in weights:
        if name not in expected:
            raise CheckpointError(
                f"The checkpoint holds the tensor '{name:.200}', for which its config.json and recipe have no"
                " use: it belongs to another checkpoint, or was changed."
            )
        meta = expected[name]
        if meta is None:
            continue
        if tensor.shape != meta.shape:
            raise CheckpointError(
                f"Tensor '{name}' of the checkpoint has shape {list(tensor.shape)}; its recipe needs"
                f" {list(meta.shape)}."
            )
        same = tensor.is_floating_point() if meta.is_floating_point() else tensor.dtype == meta.dtype
        if not same:
            raise CheckpointError(
                f"Tensor '{name}' of the checkpoint has dtype {tensor.dtype}, not {meta.dtype}."
            )
        missing.discard(name)
        yield name, tensor
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"The checkpoint lacks the tensor '{min(missing)}'{more}. A shard may not have been copied."
        )


class _Target:
    """vLLM's model as the place where tensors go.

    Attributes:
        filled: parameters that got a tensor, with which of the linears fused in them it was.
    """

    def __init__(self, model: nn.Module, config: RRSQConfig) -> None:
        self.model = model
        self.places: Places = config.places
        self.rotations: Rotations = config.rotations
        self.cached_layers = config.cached_layers
        self.parts = config.fused_linears
        self.fused = {part: name for name, parts in self.parts.items() for part in parts if part != name}
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.filled: set[tuple[str, str | int | None]] = set()

    def load(self, weights: Weights) -> list[tuple[str, Tensor]]:
        """Put each tensor where it belongs; those that are none of the language model's come back."""
        others = []
        for name, tensor in weights:
            try:
                if not self._load(name, tensor):
                    others.append((self.places.beside(name), tensor))
            except (CheckpointError, AssertionError, RuntimeError) as error:
                reason = str(error).rstrip(".") or "its shape does not fit there"
                raise CheckpointError(
                    f"Tensor '{name}' cannot be loaded into vLLM's model: {reason}."
                ) from error
        return others

    def _load(self, name: str, tensor: Tensor) -> bool:
        family = self.places.family
        if name.startswith("rotation_signs."):  # For whoever wants to undo them: they are folded.
            return True
        if name.endswith(".weight") and tensor.dtype == torch.uint8:
            return True  # It stops a loader that does not know the format.
        inside = name.removeprefix(f"{family.layers}.")
        if inside == name:
            place = next((p for p in family.places if name.startswith(f"{p}.")), None)
            if place is not None:
                self._fill(self.places.outside(name), tensor)
            return place is not None
        index, _, path = inside.partition(".")
        own = f"{family.attention}.kv_quantizer."
        if not path.startswith(own):
            self._load_layer(index, path, tensor)
        elif int(index) in self.cached_layers:
            load_offset(self.cached_layers[int(index)], path.removeprefix(own), tensor)
        return True

    def _load_layer(self, index: str, path: str, tensor: Tensor) -> None:
        """Load a tensor of a decoder layer; ``path`` is its name there."""
        for entry in self.places.family.inputs:
            for linear in entry.linear_paths:
                if path.startswith(f"{linear}.linear."):  # In 16 bits, behind an online rotation.
                    path = path.replace(f"{linear}.linear.", f"{linear}.")
                    if path.endswith(".weight"):
                        tensor = _unrotated(tensor, entry, self.rotations)
            if path == f"{entry.parent}.{entry.quantizer_name}.channel_order".lstrip("."):
                kind = "input" if entry.experts else "input_quantizer"
                path = f"{entry.linear_paths[0]}.{kind}.channel_order"
        path = f"{self.places.layers}.{index}.{self.places.in_vllm(path)}"
        for parent, runner in ((p, m) for p, m in self._ancestors(path) if isinstance(m, MoERunner)):
            found = load_experts(runner.routed_experts, path.removeprefix(f"{parent}."), tensor)
            self.filled.add((f"{parent}.routed_experts.{found}", None))
            return
        self._fill(path, tensor)

    def _ancestors(self, path: str) -> Iterator[tuple[str, nn.Module]]:
        while "." in path:
            path = path.rpartition(".")[0]
            if path in self.modules:
                yield path, self.modules[path]

    def _fill(self, path: str, tensor: Tensor) -> None:
        """Copy this process's part of a tensor; ``path`` is in vLLM's names, but for fused linears."""
        if is_pp_missing_parameter(path, self.model):
            return
        shard = None
        *parents, leaf = path.split(".")
        for depth, linear in enumerate(parents):
            fused = ".".join((*parents[:depth], self.fused.get(linear, linear)))
            if linear in self.fused and fused in self.modules:
                place = self.parts[self.fused[linear]].index(linear)
                shard = _QKV[place] if isinstance(self.modules[fused], QKVParallelLinear) else place
                parents[depth] = self.fused[linear]
        path = ".".join((*parents, leaf))
        module = self.modules.get(".".join(parents))
        parameter = getattr(module, leaf, None)
        if not isinstance(parameter, Tensor):
            raise CheckpointError("it has no place for it: vLLM does not implement this feature of the model")
        load = getattr(parameter, "weight_loader", None)
        if load is None:
            default_weight_loader(parameter, tensor)
            shard = None
        elif shard is None:
            load(parameter, tensor)
        else:
            load(parameter, tensor, shard)
        self.filled.add((path, shard))

    def check_complete(self) -> None:
        """Refuse a model of which a parameter got no tensor, or not those of all linears fused in it.

        Raises:
            CheckpointError: there is one.
        """
        found: dict[str, set[str | int | None]] = {}
        for name, shard in self.filled:
            found.setdefault(name, set()).add(shard)
        same: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            same.setdefault(id(parameter), []).append(name)
        for names in same.values():
            filled = set().union(*(found.get(name, set()) for name in names))
            if not filled or (None not in filled and filled != self._shards(names[0])):
                raise CheckpointError(
                    f"No tensor of the checkpoint fills the whole of '{names[0]}' in vLLM's model: this"
                    " version of vLLM may implement the model otherwise than transformers."
                )

    def _shards(self, name: str) -> set[str | int | None]:
        """The linears that a parameter is made of."""
        path, _, leaf = name.rpartition(".")
        module: Any = self.modules[path]
        if isinstance(module, QKVParallelLinear):
            shards: list[str | int] = list(_QKV)
        elif isinstance(module, MergedColumnParallelLinear):
            shards = list(range(len(module.output_sizes)))
        else:
            return {None}
        runs = getattr(module, "row_runs", None)
        if runs is None or leaf == "bias":
            return set(shards)
        return {shard for shard, (kind, _) in zip(shards, runs, strict=True) if kind is (leaf != "weight")}


def _unrotated(weight: Tensor, entry: LinearInput, rotations: Rotations) -> Tensor:
    """A weight in 16 bits ``[..., out, in]`` without the online rotation in front of it.

    ``(x R) (W R)ᵀ = x Wᵀ``: taken back once, it costs nothing at run time, nor does it bind the channels of
    different processes to each other.
    """
    rotation = online_rotation(entry, rotations, weight.shape[-1])
    return weight if rotation is None else rotation.inverse(weight).to(weight.dtype)
