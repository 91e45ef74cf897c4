"""A run that is killed at any moment goes on from its last finished layer, to the same bytes."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from killed_run import begun, produce, started
from rrsq.errors import ResumeError, StorageError
from rrsq.work_folder import work_path

KILLS = 20
LONG = 150  # Windows that take the tiny model long enough for a test to step in.


def everything_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def finished_layers(out: Path) -> int:
    manifest = work_path(out) / "manifest.json"
    return json.loads(manifest.read_text())["finished"] if manifest.exists() else 0


def written_at(folder: Path) -> dict[Path, int]:
    """The times of all files but the lock, which a killed process leaves and the next one takes away."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {path: path.stat().st_mtime_ns for path in files}


def stopped(model: Path, out: Path, **options: Any) -> None:
    """Kill a run as soon as a layer is finished."""
    process = started(model, out, windows=LONG, **options)
    while not finished_layers(out):
        assert process.exitcode is None, "the run was over before it could be stopped"
        time.sleep(0.002)
    process.kill()
    process.join()


@pytest.mark.timeout(300)
def test_twenty_kills_change_no_byte(tiny_llama_dir: Path, tmp_path: Path) -> None:
    seconds = 0.0
    for name in ("warm", "whole"):  # The first one imports what only a run needs.
        process = started(tiny_llama_dir, tmp_path / name)
        start = time.perf_counter()
        process.join()
        seconds = time.perf_counter() - start
    expected = everything_in(tmp_path / "whole")
    generator = random.Random(0)
    out = tmp_path / "out"
    kills = went_on = completed = 0
    while kills < KILLS or not out.exists():
        finished = finished_layers(out)
        went_on += finished > 0
        process = started(tiny_llama_dir, out)
        # However busy the machine is, every other kill comes a random while after a layer is finished.
        while kills % 2 and process.exitcode is None and finished_layers(out) <= finished:
            time.sleep(0.001)
        process.join(generator.uniform(0, seconds) if kills < KILLS else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            if not out.exists() or work_path(out).exists():
                continue
        else:
            assert process.exitcode == 0
        assert everything_in(out) == expected
        assert not work_path(out).exists()
        completed += 1
        if kills < KILLS:
            shutil.rmtree(out)
    assert everything_in(out) == expected
    assert completed >= 1
    assert went_on >= 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": "rtn-w4a4"}, "the recipe"),
        ({"windows": LONG - 1}, "the calibration text"),
        ({"seed": 1}, "the seed"),
        ({}, "the model"),
    ],
)
def test_another_request_is_refused_and_nothing_is_lost(
    change: dict[str, Any], named: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    model, out = shutil.copytree(tiny_llama_dir, tmp_path / "model"), tmp_path / "out"
    stopped(model, out)
    if not change:
        tensors = load_file(model / "model.safetensors")
        tensors["model.norm.weight"][3] += 0.5
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    before = written_at(work_path(out))
    options = {"windows": LONG, **change}
    with pytest.raises(ResumeError, match=f"since then {named} changed.*--restart") as caught:
        produce(model, out, **options)
    assert caught.value.exit_code == 2
    assert written_at(work_path(out)) == before
    produce(model, out, restart=True, **{**options, "windows": 4})
    assert (out / "config.json").is_file()
    assert not work_path(out).exists()


def test_a_second_process_is_refused_and_a_dead_one_locks_nothing(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = started(tiny_llama_dir, out, windows=LONG)
    while not (work_path(out) / "manifest.json").exists():
        time.sleep(0.002)
    with pytest.raises(StorageError, match="Another process is making"):
        produce(tiny_llama_dir, out, windows=LONG)
    assert process.exitcode is None
    process.kill()
    process.join()
    produce(tiny_llama_dir, out, windows=LONG)
    assert (out / "config.json").is_file()


def test_damage_in_the_work_folder_is_seen(tiny_llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(tiny_llama_dir, out)
    manifest = json.loads((work_path(out) / "manifest.json").read_text())
    assert "model.layers.0" in manifest["record"]["digests"]
    shards = list((work_path(out) / "out").glob("*.safetensors"))
    for shard in shards:
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(bytes(data))
    with pytest.raises(StorageError, match=r"unfinished quantization, is damaged.*--restart"):
        produce(tiny_llama_dir, out, windows=LONG)
    for shard in shards:
        shard.unlink()
    with pytest.raises(StorageError, match=r"unfinished quantization, is damaged.*--restart"):
        produce(tiny_llama_dir, out, windows=LONG)


def test_a_run_that_is_stopped_before_a_layer_is_finished_leaves_nothing(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", fail)
    with pytest.raises(StorageError, match="is full"):
        produce(tiny_llama_dir, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [begun(tmp_path / "out").name]


def test_a_full_disk_leaves_a_folder_to_go_on_from(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rrsq.quantizer.production.streaming import StreamFiles

    produce(tiny_llama_dir, tmp_path / "whole")
    sync = StreamFiles.sync

    def fill(self: StreamFiles, file: Any) -> None:
        if file.name.endswith("-2.bin"):
            raise OSError(28, "No space left on device")
        sync(self, file)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(StreamFiles, "sync", fill)
        # However busy the machine is, the stream behind each layer is written.
        patch.setattr("rrsq.quantizer.production.streaming.MOST_UNRECORDED", 0)
        with pytest.raises(StorageError, match=r"is full\. Finished layers are kept in"):
            produce(tiny_llama_dir, out)
    assert finished_layers(out) == 1
    assert not out.exists()
    produce(tiny_llama_dir, out)
    assert everything_in(out) == everything_in(tmp_path / "whole")
