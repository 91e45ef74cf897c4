"""``calibration.json``: what a calibration folder was made of, and by what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import CalibrationError
from ...recipe import Recipe

__all__ = ["MANIFEST_NAME", "CalibrationManifest", "read_manifest", "write_manifest"]

MANIFEST_NAME = "calibration.json"
FORMAT_VERSION: Literal[2] = 2


class CalibrationManifest(BaseModel):
    """Everything that decides what a calibration folder holds.

    Attributes:
        format_version: of the folder's layout.
        source_model: name of the model.
        config_fingerprint, weights_fingerprint: of :class:`.fingerprint.ModelFingerprint`.
        data_source: data set or file of the text.
        data_fingerprint: SHA-256 of the windows' token ids.
        num_samples, sequence_length: windows, and tokens in each.
        bos_each_window: each window begins with the BOS token; else at most the text does.
        seed: of the windows' places and the rotations' random signs.
        recipe: whose quantization the report describes; its rotation is that of the stored magnitudes.
        hessians: whether the folder holds Hessians.
        layers: decoder layers.
        inputs: channels of each linear input of a layer, by name.
        versions: of the libraries that made the folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[2] = FORMAT_VERSION
    source_model: str
    config_fingerprint: str
    weights_fingerprint: str
    data_source: str
    data_fingerprint: str
    num_samples: int = Field(gt=0)
    sequence_length: int = Field(gt=0)
    bos_each_window: bool = False
    seed: int
    recipe: Recipe
    hessians: bool
    layers: int = Field(gt=0)
    inputs: dict[str, int]
    versions: dict[str, str] = {}

    @property
    def tokens(self) -> int:
        """Tokens of calibration text."""
        return self.num_samples * self.sequence_length


def write_manifest(folder: Path, manifest: CalibrationManifest) -> None:
    """Write ``calibration.json`` into a folder."""
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> CalibrationManifest:
    """Read ``calibration.json`` of a folder.

    Raises:
        CalibrationError: there is none, or it is not valid or of another format version.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise CalibrationError(
            f"'{folder}' is no calibration folder: there is no {MANIFEST_NAME} in it. 'rrsq calibrate MODEL"
            f" -o {folder}' makes one."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"{path} is damaged: it is not what rrsq calibrate writes.") from error
    if version != FORMAT_VERSION:
        raise CalibrationError(
            f"'{folder}' has format version {version!r}; this rrsq reads version {FORMAT_VERSION}. Run rrsq"
            " calibrate again, or install the rrsq release that wrote it."
        )
    try:
        return CalibrationManifest.model_validate(data)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(key) for key in problem["loc"])
        raise CalibrationError(f"{path} is not valid at '{where}': {problem['msg']}.") from error
