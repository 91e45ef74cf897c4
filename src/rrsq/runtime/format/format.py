"""The checkpoint format: what ``config.json`` says of a quantized model under ``quantization_config``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ... import __version__
from ...errors import CheckpointError, HadamardOrderError
from ...recipe import Recipe
from ..rotation.hadamard import MAX_BASE, HadamardPlan
from ..rotation.rotations import RandomizedHadamard, Rotations

__all__ = [
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "CalibrationInfo",
    "CheckpointInfo",
    "RotationInfo",
    "parse_info",
]

QUANT_METHOD: Literal["rrsq"] = "rrsq"
FORMAT_VERSION: Literal[2] = 2


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PlanInfo(_Part):
    """A Hadamard matrix: ``size`` channels in blocks of ``block = base * 2**p``."""

    size: int = Field(gt=0, le=2**24)
    block: int = Field(gt=0, le=2**24)
    base: int = Field(gt=0, le=MAX_BASE)

    def plan(self) -> HadamardPlan:
        """The plan to build the matrix from.

        Raises:
            CheckpointError: the sizes do not fit each other, or no matrix of order ``base`` is known.
        """
        try:
            return HadamardPlan(self.size, self.block, self.base)
        except HadamardOrderError as error:
            raise CheckpointError(f"The checkpoint describes an impossible rotation: {error}.") from error


class RotationInfo(_Part):
    """The rotations of a checkpoint; see :class:`rrsq.runtime.rotation.rotations.Rotations`."""

    residual: PlanInfo | None = None
    residual_online: PlanInfo | None = None
    head: PlanInfo | None = None
    across_heads: PlanInfo | None = None
    intermediate: PlanInfo | None = None
    more_intermediate: tuple[PlanInfo, ...] | None = None
    blocks: Literal[1, 2, 4, 8, 16, 32, 64] | None = None

    def check(self) -> None:
        """Refuse plans of which no matrix can be made.

        Raises:
            CheckpointError: there is one.
        """
        for _, plans in self:
            for plan in plans if isinstance(plans, tuple) else (plans,):
                if isinstance(plan, PlanInfo):
                    plan.plan()

    def rotations(self) -> Rotations:
        """The rotations, with placeholder signs for the folded ones."""
        import torch

        def randomized(info: PlanInfo | None) -> RandomizedHadamard | None:
            return None if info is None else RandomizedHadamard(torch.ones(info.size), info.plan())

        def plan(info: PlanInfo | None) -> HadamardPlan | None:
            return None if info is None else info.plan()

        return Rotations(
            residual=randomized(self.residual),
            residual_online=plan(self.residual_online),
            head=randomized(self.head),
            across_heads=plan(self.across_heads),
            intermediate=plan(self.intermediate),
            more_intermediate=tuple(info.plan() for info in self.more_intermediate or ()),
            blocks=self.blocks,
        )


class CalibrationInfo(_Part):
    """The calibration text that was used.

    Attributes:
        source: data set or file.
        num_samples, sequence_length: windows, and tokens in each.
        fingerprint: SHA-256 of the token ids.
        bos_each_window: each window began with the BOS token; else at most the text did.
        stored: the statistics came out of a folder of ``rrsq calibrate``, of the full-precision model's
            inputs; else each layer was calibrated on the outputs of the quantized layers before it.
    """

    source: str
    num_samples: int
    sequence_length: int
    fingerprint: str
    bos_each_window: bool = False
    stored: bool = False


class CheckpointInfo(_Part):
    """``quantization_config`` of a checkpoint.

    Attributes:
        format_version: of this layout.
        recipe: the full recipe.
        rotation: the rotations and their Hadamard matrices.
        key_bits: bits of cached keys, one entry a layer; empty without a quantized cache.
        seed: of the random signs and the calibration windows.
        source_model: what was quantized.
        calibration: the text used, or None.
        versions: of the libraries that made the checkpoint.
        layer_snr_db: output signal-to-noise ratio of each layer on calibration text.
        weight_snr_db: the same of each input's linears due to their weights alone, by the input's path, an
            entry a layer; see :class:`rrsq.quantizer.outcome.LayerReport`.
        cache_error: relative error of each layer's attention output due to the quantized cache.
    """

    quant_method: Literal["rrsq"] = QUANT_METHOD
    format_version: Literal[2] = FORMAT_VERSION
    recipe: Recipe
    rotation: RotationInfo
    key_bits: tuple[int, ...] = ()
    seed: int = 0
    source_model: str = ""
    calibration: CalibrationInfo | None = None
    versions: dict[str, str] = {}
    layer_snr_db: tuple[float | None, ...] = ()
    weight_snr_db: tuple[dict[str, float], ...] = ()
    cache_error: tuple[float | None, ...] = ()


def parse_info(data: dict[str, Any]) -> CheckpointInfo:
    """Validate a ``quantization_config``.

    Raises:
        CheckpointError: an unknown format version, a recipe that this rrsq does not know, fields that are not
            valid, or a rotation that does not exist.
    """
    version = data.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise CheckpointError(
            f"The checkpoint has format version {version!r:.50}; this rrsq reads version {FORMAT_VERSION}."
            " Install the rrsq release that wrote it, or quantize the model again."
        )
    try:
        info = CheckpointInfo.model_validate(data)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(key)[:100] for key in problem["loc"])
        if len(problem["loc"]) > 1 and problem["loc"][0] == "recipe":
            raise CheckpointError(_unknown_recipe(data, where, problem["msg"])) from error
        raise CheckpointError(
            f"quantization_config of the checkpoint is not valid at '{where}': {problem['msg']}."
        ) from error
    info.rotation.check()
    return info


def _unknown_recipe(data: dict[str, Any], where: str, message: str) -> str:
    """Say which part of a recipe is not known, and which rrsq knows it."""
    recipe, versions = data["recipe"], data.get("versions")
    name = str(recipe.get("name", "custom")) if isinstance(recipe, dict) else "custom"
    writer = versions.get("rrsq", "a later version") if isinstance(versions, dict) else "a later version"
    return (
        f"This rrsq ({__version__}) does not know the checkpoint's recipe {name!r:.100}: it is not valid at"
        f" '{where}': {message}. Install the rrsq that wrote it ({_one_line(writer)}), or quantize the model"
        " again."
    )


def _one_line(text: Any) -> str:
    return "".join(c for c in str(text) if c.isprintable())[:50]
