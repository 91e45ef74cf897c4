"""Quantizing from shards to shards: a store that holds the weights of one layer at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...runtime.format.shards import raw_bytes
from ...storage import allocate, storage_errors
from ...work_folder import WorkFolder
from ..calibration.workers import Workers
from ..outcome import LayerReport
from ..store import Progressed
from .output_shards import OutputShards
from .source import Weights

__all__ = ["Progress", "StreamFiles", "StreamingStore", "offloaded"]


@dataclass
class Progress:
    """What the manifest of a quantization keeps beside the number of its finished layers.

    Attributes:
        digests: SHA-256 (hex) of the tensors of each finished module, by its path.
        layers: the report of each finished layer; None before the embedding is finished.
        result: what the whole run did, once the output is whole.
    """

    digests: dict[str, str] = field(default_factory=dict)
    layers: list[dict[str, Any]] | None = None
    result: dict[str, Any] | None = None

    @classmethod
    def of(cls, work: WorkFolder) -> Progress:
        """What a work folder's manifest says."""
        return cls(**work.manifest.record)

    def put(self, work: WorkFolder) -> None:
        """Have it in the manifest; :meth:`WorkFolder.save` writes that."""
        work.manifest.finished = len(self.layers or ())
        work.manifest.record = vars(self)


class StreamFiles:
    """The residual stream behind the last finished layer, in files of a work folder.

    Args:
        work: the folder.
        rank: of the process, which has a part of the stream.
    """

    def __init__(self, work: WorkFolder, rank: int) -> None:
        self.work = work
        self.rank = rank

    def write(self, stream: Tensor, finished: int) -> None:
        """Have the stream behind so many layers on the disk, beside the one before it."""
        with self._file(finished).open("wb") as file:
            file.write(raw_bytes(stream))
            file.flush()
            os.fsync(file.fileno())

    def read(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The stream behind the finished layers.

        Raises:
            StorageError: it is not there, or not whole.
        """
        path = self._file(self.work.manifest.finished)
        stream = torch.empty(shape, dtype=dtype)
        if not path.is_file() or path.stat().st_size != stream.nbytes:
            raise self.work.damaged()
        with path.open("rb") as file:
            file.readinto(raw_bytes(stream))
        return stream

    def remove_old(self) -> None:
        """Those that are not behind the last finished layer."""
        keep = self._file(self.work.manifest.finished)
        for path in self.work.path.glob(f"stream-{self.rank}-*.bin"):
            if path != keep:
                path.unlink()

    def _file(self, finished: int) -> Path:
        return self.work.path / f"stream-{self.rank}-{finished}.bin"


class StreamingStore:
    """A :class:`~rrsq.quantizer.store.ModelStore` that writes each finished layer to its shard.

    Args:
        model: what is quantized; its weights are where ``weights`` puts them.
        weights: the original weights.
        shards: of the output.
        work: where progress is kept.
        workers: the processes that work together; rank 0 writes.
        offload: folder for the residual stream in a mapped file; None keeps it in memory.
    """

    def __init__(
        self,
        model: Any,
        weights: Weights,
        shards: OutputShards,
        work: WorkFolder,
        workers: Workers,
        offload: Path | None,
    ) -> None:
        self.model = model
        self.weights = weights
        self.shards = shards
        self.work = work
        self.workers = workers
        self.offload = offload
        self.bytes_before = weights.bytes
        self.streams = StreamFiles(work, workers.rank)
        progress = Progress.of(work)
        self.progressed: Progressed | None = None
        if progress.layers is not None:
            self.progressed = _Progressed(self, progress.layers, progress.digests)
        self._digests = dict(progress.digests)
        self._layers = progress.layers or []
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> StreamingStore:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True)

    def check(self) -> None:
        """Nothing: all weights were read once to tell whether the model is still the same."""

    def open(self, path: str) -> None:
        """See :class:`~rrsq.quantizer.store.ModelStore`."""
        self.weights.fill(path, self.model.get_submodule(path))

    def close(self, path: str) -> None:
        """Write the tensors of a module and forget them."""
        module = self.model.get_submodule(path)
        names = self.shards.under(path)
        if self.workers.rank == 0 and names:
            tensors = {f"{path}.{name}": tensor.cpu() for name, tensor in module.state_dict().items()}
            if tensors.keys() != set(names):
                raise ValueError(f"{path} has {sorted(tensors.keys() ^ set(names))}, other than planned")
            self._digests[path] = self.shards.write(tensors)
        module.to("meta")

    def drop(self, path: str) -> None:
        """Forget the tensors of a module."""
        self.model.get_submodule(path).to("meta")

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """A mapped file, where that was asked for."""
        if self.offload is None:
            return None
        with storage_errors(self.offload, left="Finished layers are kept"):
            return offloaded(self.offload, shape, dtype)

    def before_advance(self) -> None:
        """Wait until the stream is on the disk: it was being written while the next layer was at work."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        writing.result()
        if self.workers.count > 1:
            self.workers.wait()
            self._save(self._layers, self._digests)
            self.workers.wait()
            self.streams.remove_old()

    def commit(self, report: LayerReport | None, stream: Tensor | None) -> None:
        """Have what is finished on the disk, the stream in the background.

        One process writes down a layer as soon as its stream is written; several have to wait for each other,
        which they do in :meth:`before_advance`.
        """
        self.before_advance()
        if report is not None:
            self._layers = [*self._layers, asdict(report)]
        self._writing = self._pool.submit(self._write, stream, self._layers, dict(self._digests))

    def finish(self) -> None:
        """Have the last layer written down, and what stands behind it on the disk."""
        self.before_advance()
        self._save(self._layers, self._digests)

    def bytes_after(self) -> int:
        """Size of all tensors of the output."""
        return self.shards.tensor_bytes

    def _write(self, stream: Tensor | None, layers: list[dict[str, Any]], digests: dict[str, str]) -> None:
        if stream is not None:
            self.streams.write(stream, len(layers))
        if self.workers.count == 1:
            self._save(layers, digests)
            self.streams.remove_old()

    def _save(self, layers: list[dict[str, Any]], digests: dict[str, str]) -> None:
        Progress(dict(digests), layers).put(self.work)
        if self.workers.rank == 0:
            self.work.save()


class _Progressed:
    """What the manifest of a work folder says, its contents checked."""

    def __init__(
        self, store: StreamingStore, layers: list[dict[str, Any]], digests: Mapping[str, str]
    ) -> None:
        self.store = store
        self.layers = [LayerReport(**layer) for layer in layers]
        if store.workers.rank == 0:
            for path, digest in digests.items():
                if self._digest(path) != digest:
                    raise store.work.damaged()

    def _digest(self, path: str) -> str:
        shards = self.store.shards
        try:
            return shards.digest(shards.under(path))
        except FileNotFoundError as error:
            raise self.store.work.damaged() from error

    def stream(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See :class:`~rrsq.quantizer.store.Progressed`."""
        return self.store.streams.read(shape, dtype)


def offloaded(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a mapped file, whose name is gone at once: the file is, when the process is."""
    numel = torch.Size(shape).numel()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".rrsq-") as file:
        # Room is found now or never: a mapped file that cannot grow kills the process.
        allocate(file, numel * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=numel, dtype=dtype).view(shape)
