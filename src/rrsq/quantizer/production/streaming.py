"""Quantizing from shards to shards: a store that holds the weights of one layer at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

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

__all__ = ["MOST_UNRECORDED", "Progress", "StreamFiles", "StreamingStore", "offloaded"]

MOST_UNRECORDED = 4
"""Finished layers that a stop costs at most."""


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

    def create(self, finished: int) -> BinaryIO:
        """The file of the stream behind so many layers, beside the last that is whole."""
        return self._file(finished).open("wb")

    def sync(self, file: BinaryIO) -> None:
        """Have what was written to such a file on the disk."""
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


@dataclass(frozen=True)
class _Writing:
    """A residual stream on its way to the disk.

    Attributes:
        copied: of each batch; it may be overwritten when the system has taken it.
        on_disk: the stream and the tensors of all finished modules are.
        progress: what the manifest says from then on.
    """

    copied: list[Future[int]]
    on_disk: Future[None]
    progress: Progress


class StreamingStore:
    """A :class:`~rrsq.quantizer.store.ModelStore` that writes each finished layer to its shard.

    The residual stream is written in the background, while the next layer is at work: that layer waits for it
    only where it takes the place of batches that have not been read yet. While one stream is not on the disk,
    no other is written: where the disk takes longer for it than a layer takes, it is not that of every layer,
    and up to :data:`MOST_UNRECORDED` finished layers are not in the manifest.

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
        self._recorded = len(self._layers)
        self._changed: set[Path] = set()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._writing: _Writing | None = None

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
            self._changed |= self.shards.files(names)
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

    def before_overwrite(self, index: int) -> None:
        """Wait until a batch of the stream that is being written was read."""
        if self._writing is not None and index < len(self._writing.copied):
            self._writing.copied[index].result()

    def commit(self, report: LayerReport | None, stream: Sequence[Tensor]) -> None:
        """Have what is finished on the disk, in the background, unless the disk is still busy with the last.

        One process records a layer as soon as its stream is on the disk; several have to wait for each other,
        which they do when the next layer is finished.
        """
        if report is not None:
            self._layers = [*self._layers, asdict(report)]
        if not self._is_recorded(wait=len(self._layers) - self._recorded >= MOST_UNRECORDED):
            return
        file = self.streams.create(len(self._layers)) if stream else None
        copied = [] if file is None else [self._pool.submit(file.write, raw_bytes(batch)) for batch in stream]
        progress = Progress(dict(self._digests), self._layers)
        changed, self._changed = self._changed, set()
        on_disk = self._pool.submit(self._have_on_disk, file, copied, changed, progress)
        self._writing = _Writing(copied, on_disk, progress)

    def finish(self) -> Progress:
        """Wait for what is on its way to the disk, and return what is finished; the manifest may say less."""
        self._is_recorded(wait=True)
        return Progress(dict(self._digests), self._layers)

    def bytes_after(self) -> int:
        """Size of all tensors of the output."""
        return self.shards.tensor_bytes

    def _have_on_disk(
        self, file: BinaryIO | None, copied: list[Future[int]], changed: set[Path], progress: Progress
    ) -> None:
        """In the background, when all batches were written."""
        if file is not None:
            with file:
                for batch in copied:
                    batch.result()
                self.streams.sync(file)
        self.shards.sync(changed)
        if self.workers.count == 1:
            self._record(progress)

    def _is_recorded(self, *, wait: bool) -> bool:
        """Whether what was on its way to the disk is there, of all processes, and in the manifest."""
        writing = self._writing
        if writing is None:
            return True
        if not wait and not self.workers.all(writing.on_disk.done()):
            return False
        writing.on_disk.result()
        if self.workers.count > 1:
            self.workers.wait()
            self._record(writing.progress)
        self._recorded = len(writing.progress.layers or ())
        self._writing = None
        return True

    def _record(self, progress: Progress) -> None:
        """Have it in the manifest, and only then remove the stream before."""
        progress.put(self.work)
        if self.workers.rank == 0:
            self.work.save()
        self.workers.wait()
        self.streams.remove_old()


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
