"""A run that was stopped goes on where it was; its output is whole or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from rrsq.diagnostics.layer_pass import calibrate_layers
from rrsq.diagnostics.make_manifest import calibration_work, make_manifest
from rrsq.errors import ResumeError, StorageError
from rrsq.quantizer.calibration.manifest import CalibrationManifest, read_manifest
from rrsq.quantizer.calibration.stored import layer_file
from rrsq.storage import flush
from rrsq.work_folder import work_path
from tiny_calibration import calibrate_tiny, tiny_windows
from tiny_quantized import load_tiny, recipe_of


class CrashError(Exception):
    """Stands for whatever ends a run."""


def manifest_of(model: Any, seed: int = 0) -> CalibrationManifest:
    recipe = recipe_of("rrs-w4a4kv4")
    return make_manifest(model, "tiny", tiny_windows(), recipe, source="random", seed=seed, hessians=True)


def run(
    source: Path, out: Path, *, crash_in_layer: int | None = None, seed: int = 0, restart: bool = False
) -> list[str]:
    """Calibrate into ``out``, without a report; return what was reported as progress."""
    seen: list[str] = []

    def progress(done: int, total: int, text: str) -> None:
        assert total == 3 * 5  # one batch and four inputs a layer
        seen.append(text)
        if crash_in_layer is not None and text.startswith(f"layer {crash_in_layer + 1}/"):
            raise CrashError

    model = load_tiny(source)
    manifest = manifest_of(model, seed)
    with calibration_work(out, manifest, restart=restart) as work:
        calibrate_layers(
            model, tiny_windows(), manifest, work.staging, progress=progress, on_layer=work.advance
        )
        flush(work.staging)
        work.finish()
        work.publish(overwrite=True)
    return seen


def staging(out: Path) -> Path:
    return work_path(out) / "out"


def finished_layers(out: Path) -> int:
    return sum(layer_file(staging(out), index).is_file() for index in range(3))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_crashed_run_goes_on_and_gives_the_same_bytes(tiny_llama_dir: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(tiny_llama_dir, whole)
    with pytest.raises(CrashError):
        run(tiny_llama_dir, resumed, crash_in_layer=2)
    assert not resumed.exists()
    assert finished_layers(resumed) == 2
    kept = files_of(staging(resumed))
    times = {name: (staging(resumed) / name).stat().st_mtime_ns for name in kept}
    seen = run(tiny_llama_dir, resumed)
    passed_on = [text for text in seen if "done before" in text]
    assert passed_on == ["layer 1/3: done before", "layer 2/3: done before"]
    assert {name: (resumed / name).stat().st_mtime_ns for name in kept} == times
    assert files_of(resumed) == files_of(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed", "whole"]
    assert sorted(path.name for path in resumed.iterdir()) == ["calibration.json", *sorted(files_of(whole))]


def test_layers_of_another_request_are_kept_unless_they_may_go(tiny_llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CrashError):
        run(tiny_llama_dir, out, crash_in_layer=2, seed=1)
    with pytest.raises(
        ResumeError, match=r"unfinished calibration of 2 layers.* the seed changed.*--restart"
    ):
        run(tiny_llama_dir, out, seed=0)
    assert finished_layers(out) == 2
    seen = run(tiny_llama_dir, out, seed=0, restart=True)
    assert not any("done before" in text for text in seen)
    assert read_manifest(out).seed == 0


def test_a_finished_layer_whose_file_is_gone_is_damage(tiny_llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CrashError):
        run(tiny_llama_dir, out, crash_in_layer=2)
    layer_file(staging(out), 0).unlink()
    with pytest.raises(StorageError, match=r"unfinished calibration, is damaged.*--restart"):
        run(tiny_llama_dir, out)
    run(tiny_llama_dir, out, restart=True)
    assert read_manifest(out).layers == 3


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


def test_a_full_disk_keeps_the_finished_layers(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.startswith("layer-0002"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(StorageError, match=r"is full\. Finished layers are kept in '.*\.out\.work'"):
        run(tiny_llama_dir, tmp_path / "out")
    monkeypatch.undo()
    seen = run(tiny_llama_dir, tmp_path / "out")
    assert sum("done before" in text for text in seen) == 2
