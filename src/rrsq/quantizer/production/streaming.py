"""Quantizing from shards to shards: a store that holds the weights of one layer at a time."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...storage import storage_errors
from ..calibration.workers import Workers
from ..checks import check_finite
from ..memory import weight_bytes
from ..report import LayerReport
from ..store import Progressed
from .shard_files import ShardFiles
from .weight_source import ShardSource
from .work_folder import WorkFolder

__all__ = ["LoadedWeights", "StoredWeights", "StreamingStore", "Weights", "offloaded"]


class Weights(Protocol):
    """The original weights of a model, as a store needs them."""

    bytes: int

    def fill(self, path: str, module: nn.Module) -> None:
        """Give a module its weights."""


class StoredWeights:
    """Weights that are read from shards when they are asked for."""

    def __init__(self, source: ShardSource) -> None:
        self.source = source
        self.bytes = source.bytes_of_model()

    def fill(self, path: str, module: nn.Module) -> None:
        """See :class:`Weights`."""
        module.load_state_dict(self.source.read(path), assign=True)


class LoadedWeights:
    """Weights of a model that was loaded as a whole; checked when it is made."""

    def __init__(self, model: nn.Module) -> None:
        check_finite(model)
        self.bytes = weight_bytes(model)

    def fill(self, path: str, module: nn.Module) -> None:
        """Nothing: they are there."""


class StreamingStore:
    """A :class:`~rrsq.quantizer.store.ModelStore` that writes each finished layer to its shard.

    Args:
        model: what is quantized; its weights are where ``weights`` puts them.
        weights: the original weights.
        files: the shards of the output.
        work: where progress is kept.
        workers: the processes that work together; rank 0 writes.
        offload: folder for the residual stream in a mapped file; None keeps it in memory.
    """

    def __init__(
        self,
        model: Any,
        weights: Weights,
        files: ShardFiles,
        work: WorkFolder,
        workers: Workers,
        offload: Path | None,
    ) -> None:
        self.model = model
        self.weights = weights
        self.files = files
        self.work = work
        self.workers = workers
        self.offload = offload
        self.bytes_before = weights.bytes
        self.progressed: Progressed | None = None
        if work.manifest.layers is not None:
            self.progressed = _Progressed(self)
        self._digests = dict(work.manifest.digests)
        self._layers = work.manifest.layers or []
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
        names = self.files.under(path)
        if self.workers.rank == 0 and names:
            tensors = {f"{path}.{name}": tensor.cpu() for name, tensor in module.state_dict().items()}
            if tensors.keys() != set(names):
                raise ValueError(f"{path} has {sorted(tensors.keys() ^ set(names))}, other than planned")
            self._digests[path] = self.files.write(tensors)
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
            self.work.remove_old_streams(self.workers.rank)

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
        return self.files.layout.tensor_bytes

    def _write(self, stream: Tensor | None, layers: list[dict[str, Any]], digests: dict[str, str]) -> None:
        if stream is not None:
            self.work.write_stream(stream, len(layers), self.workers.rank)
        if self.workers.count == 1:
            self._save(layers, digests)
            self.work.remove_old_streams(0)

    def _save(self, layers: list[dict[str, Any]], digests: dict[str, str]) -> None:
        self.work.manifest.layers, self.work.manifest.digests = layers, dict(digests)
        if self.workers.rank == 0:
            self.work.save()


class _Progressed:
    """What the manifest of a work folder says, its contents checked."""

    def __init__(self, store: StreamingStore) -> None:
        self.store = store
        manifest = store.work.manifest
        if store.workers.rank == 0:
            for path, digest in manifest.digests.items():
                if store.files.digest(store.files.under(path)) != digest:
                    raise store.work.damaged()
        self.layers = [LayerReport(**layer) for layer in manifest.layers or ()]

    def stream(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See :class:`~rrsq.quantizer.store.Progressed`."""
        return self.store.work.read_stream(shape, dtype, self.store.workers.rank)


def offloaded(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a mapped file, whose name is gone at once: the file is, when the process is."""
    numel = torch.Size(shape).numel()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".rrsq-") as file:
        # Room is found now or never: a mapped file that cannot grow kills the process.
        os.posix_fallocate(file.fileno(), 0, numel * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=numel, dtype=dtype).view(shape)
