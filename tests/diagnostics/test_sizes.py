"""Sizes stated before a run, against what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from rrsq.diagnostics.sizes import expected_sizes
from rrsq.quantizer.calibration.stored import StoredCalibration
from tiny_calibration import LENGTH, WINDOWS, calibrate_tiny

INPUTS = {"qkv": 96, "o": 64, "gate_up": 96, "down": 160}


@pytest.mark.parametrize("hessians", [True, False])
def test_the_disk_holds_what_was_said(tiny_llama_dir: Path, tmp_path: Path, hessians: bool) -> None:
    stored: StoredCalibration = calibrate_tiny(tiny_llama_dir, tmp_path / "calib", hessians=hessians)
    assert stored.manifest.inputs == INPUTS
    expected = expected_sizes(
        INPUTS,
        layers=3,
        hidden=96,
        model_bytes=10**6,
        num_samples=WINDOWS,
        sequence_length=LENGTH,
        hessians=hessians,
    )
    triangles = sum(n * (n + 1) // 2 for n in INPUTS.values())
    head = 96 * 97 // 2
    assert expected.hessians == (4 * (3 * triangles + head) if hessians else 0)
    written = sum(path.stat().st_size for path in stored.folder.glob("*.safetensors"))
    without_pictures = expected.disk - 10_000_000
    assert 0.97 * written < without_pictures <= written
    assert expected.memory > 10**6 + 4 * 3 * 96 * 160
