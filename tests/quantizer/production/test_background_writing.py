"""The residual stream is written in the background: what waits for it, and what the manifest says."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from killed_run import produce
from rrsq.errors import StorageError
from rrsq.quantizer.calibration.workers import ALONE
from rrsq.quantizer.outcome import LayerReport
from rrsq.quantizer.production.streaming import MOST_UNRECORDED, StreamFiles, StreamingStore
from rrsq.work_folder import WorkFolder, work_path

SECONDS = 30.0  # After which what should not wait is taken to wait.


@pytest.fixture
def work(tmp_path: Path) -> Iterator[WorkFolder]:
    with WorkFolder.locked(tmp_path / "out", "quantization", {}) as folder:
        yield folder


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Streams are on the disk when this is set, and not before."""
    ready, sync = threading.Event(), StreamFiles.sync

    def wait(self: StreamFiles, file: Any) -> None:
        ready.wait(SECONDS)
        sync(self, file)

    monkeypatch.setattr(StreamFiles, "sync", wait)
    yield ready
    ready.set()


def store_of(work: WorkFolder) -> StreamingStore:
    """A store of which only the stream is looked at."""
    weights: Any = SimpleNamespace(bytes=0)
    shards: Any = SimpleNamespace(sync=lambda files: None)
    return StreamingStore(None, weights, shards, work, ALONE, None)


def recorded(work: WorkFolder) -> int:
    """Layers that are finished by what is on the disk, the stream behind them among it."""
    manifest = json.loads((work.path / "manifest.json").read_text())
    if manifest["record"].get("layers") is None:
        return -1
    finished = manifest["finished"]
    stream = (work.path / f"stream-0-{finished}.bin").read_bytes()
    assert stream == bytes([finished]) * 24  # As it was behind that layer, whatever was done to it since.
    return finished


def run_layer(store: StreamingStore, stream: torch.Tensor, layer: int) -> None:
    for index, batch in enumerate(stream.split(2)):
        store.before_overwrite(index)
        batch.fill_(layer)
    store.commit(LayerReport(layer - 1), stream.split(2))


def test_layers_go_on_while_a_stream_is_not_on_the_disk_yet(work: WorkFolder, disk: threading.Event) -> None:
    stream = torch.zeros(4, 6, dtype=torch.uint8)
    with store_of(work) as store:
        store.commit(None, stream.split(2))
        for layer in range(1, MOST_UNRECORDED):
            run_layer(store, stream, layer)  # Does not wait, or it would for ever.
            assert recorded(work) == -1
        disk.set()
        run_layer(store, stream, MOST_UNRECORDED)
        finished = store.finish()
        assert finished.layers is not None
        assert len(finished.layers) == MOST_UNRECORDED
        assert recorded(work) == MOST_UNRECORDED
    assert [path.name for path in work.path.glob("stream-*")] == [f"stream-0-{MOST_UNRECORDED}.bin"]


def test_no_more_layers_are_ahead_of_the_disk_than_a_stop_may_cost(
    work: WorkFolder, disk: threading.Event
) -> None:
    stream = torch.zeros(4, 6, dtype=torch.uint8)
    with store_of(work) as store:
        store.commit(None, stream.split(2))
        for layer in range(1, MOST_UNRECORDED):
            run_layer(store, stream, layer)
        last = threading.Thread(target=run_layer, args=(store, stream, MOST_UNRECORDED))
        assert_waits_for(disk, last)
        assert recorded(work) in (0, MOST_UNRECORDED)


def assert_waits_for(event: threading.Event, thread: threading.Thread) -> None:
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    event.set()
    thread.join(SECONDS)
    assert not thread.is_alive()


def test_a_batch_waits_for_itself_alone(work: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    create, taken, ready = StreamFiles.create, [], threading.Event()

    def held(self: StreamFiles, finished: int) -> Any:
        file = create(self, finished)
        write = file.write

        class Held:
            def write(self, data: Any) -> int:
                assert not taken or ready.wait(SECONDS)
                taken.append(bytes(data))
                return write(data)

            def __enter__(self) -> Held:
                return self

            def __exit__(self, *error: object) -> None:
                file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        return Held()

    monkeypatch.setattr(StreamFiles, "create", held)
    stream = torch.zeros(4, 6, dtype=torch.uint8)
    with store_of(work) as store:
        store.commit(None, stream.split(2))
        store.before_overwrite(0)
        stream[:2] = 1
        second = threading.Thread(target=store.before_overwrite, args=(1,))
        assert_waits_for(ready, second)
        stream[2:] = 1
    assert recorded(work) == 0
    assert taken == [bytes(12), bytes(12)]


def test_a_run_that_stops_with_layers_ahead_of_the_disk_ends_with_the_same_bytes(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream behind the first layer is on the disk when the last one fails; the second's is not begun."""
    produce(tiny_llama_dir, tmp_path / "whole")
    close, sync, ready = StreamingStore.close, StreamFiles.sync, threading.Event()

    def stop(self: StreamingStore, path: str) -> None:
        if path == "model.layers.2":
            ready.set()
            raise OSError(5, "Input/output error")
        close(self, path)

    def wait(self: StreamFiles, file: Any) -> None:
        assert not file.name.endswith("-1.bin") or ready.wait(SECONDS)
        sync(self, file)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(StreamingStore, "close", stop)
        patch.setattr(StreamFiles, "sync", wait)
        # The stream behind the first layer is begun, however busy the machine is.
        patch.setattr(StreamingStore, "_is_recorded", first_waited_for(StreamingStore._is_recorded))
        with pytest.raises(StorageError, match="Input/output error"):
            produce(tiny_llama_dir, out)
    assert json.loads((work_path(out) / "manifest.json").read_text())["finished"] == 1
    produce(tiny_llama_dir, out)
    for path in (tmp_path / "whole").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


def first_waited_for(is_recorded: Any) -> Any:
    """``StreamingStore._is_recorded`` that waits when the first layer is finished."""
    return lambda self, *, wait: is_recorded(self, wait=wait or len(self._layers) == 1)
