"""A run that was stopped goes on where it was; its output is whole or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from rrsq.diagnostics.make_manifest import make_manifest
from rrsq.diagnostics.run import calibrate_layers
from rrsq.diagnostics.work_folder import finished_layers, work_folder, work_path
from rrsq.errors import StorageError
from rrsq.quantizer.calibration.manifest import CalibrationManifest, read_manifest
from rrsq.quantizer.calibration.stored import layer_file
from tiny_calibration import calibrate_tiny, tiny_windows
from tiny_quantized import load_tiny, recipe_of


class CrashError(Exception):
    """Stands for whatever ends a run."""


def manifest_of(model: Any, seed: int = 0) -> CalibrationManifest:
    recipe = recipe_of("rrs-w4a4kv4")
    return make_manifest(model, "tiny", tiny_windows(), recipe, source="random", seed=seed, hessians=True)


def run(source: Path, out: Path, *, crash_in_layer: int | None = None, seed: int = 0) -> list[str]:
    """Calibrate into ``out``, without a report; return what was reported as progress."""
    seen: list[str] = []

    def progress(done: int, total: int, text: str) -> None:
        assert total == 3 * 5  # one batch and four inputs a layer
        seen.append(text)
        if crash_in_layer is not None and text.startswith(f"layer {crash_in_layer + 1}/"):
            raise CrashError

    model = load_tiny(source)
    manifest = manifest_of(model, seed)
    with work_folder(out, manifest) as work:
        calibrate_layers(model, tiny_windows(), manifest, work, progress=progress)
    return seen


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_crashed_run_goes_on_and_gives_the_same_bytes(tiny_llama_dir: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(tiny_llama_dir, whole)
    with pytest.raises(CrashError):
        run(tiny_llama_dir, resumed, crash_in_layer=2)
    assert not resumed.exists()
    assert finished_layers(work_path(resumed), 3) == 2
    kept = files_of(work_path(resumed))
    times = {name: (work_path(resumed) / name).stat().st_mtime_ns for name in kept}
    seen = run(tiny_llama_dir, resumed)
    passed_on = [text for text in seen if "done before" in text]
    assert passed_on == ["layer 1/3: done before", "layer 2/3: done before"]
    assert {name: (resumed / name).stat().st_mtime_ns for name in kept} == times
    assert files_of(resumed) == files_of(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed", "whole"]
    assert sorted(path.name for path in resumed.iterdir()) == ["calibration.json", *sorted(files_of(whole))]


def test_layers_of_another_request_are_thrown_away(tiny_llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CrashError):
        run(tiny_llama_dir, out, crash_in_layer=2, seed=1)
    seen = run(tiny_llama_dir, out, seed=0)
    assert not any("done before" in text for text in seen)
    assert read_manifest(out).seed == 0


def test_a_run_that_finished_no_layer_leaves_nothing(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CrashError):
        run(tiny_llama_dir, tmp_path / "out", crash_in_layer=0)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_only_at_the_end(tiny_llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    calibrate_tiny(tiny_llama_dir, out, seed=4)
    old = files_of(out)
    with pytest.raises(CrashError):
        run(tiny_llama_dir, out, crash_in_layer=1)
    assert files_of(out) == old
    run(tiny_llama_dir, out)
    assert read_manifest(out).seed == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_runs_on_one_output_are_one_too_many(tiny_llama_dir: Path, tmp_path: Path) -> None:
    manifest = manifest_of(load_tiny(tiny_llama_dir))
    with work_folder(tmp_path / "out", manifest) as work:
        layer_file(work, 0).touch()
        with pytest.raises(StorageError, match="Another rrsq calibrate is writing"):
            work_folder(tmp_path / "out", manifest).__enter__()
        assert finished_layers(work, 3) == 1


def test_a_full_disk_keeps_the_finished_layers(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.startswith("layer-0002"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(StorageError, match=r"is full\. Finished layers are kept in '.*\.out\.unfinished'"):
        run(tiny_llama_dir, tmp_path / "out")
    monkeypatch.undo()
    seen = run(tiny_llama_dir, tmp_path / "out")
    assert sum("done before" in text for text in seen) == 2
