"""Find the text of a calibration or evaluation run: a named data set, any Hub data set, or a local file.

A source is one of

- ``wikitext2``: WikiText-2 raw, ``Salesforce/wikitext`` with the configuration ``wikitext-2-raw-v1``;
- a Hub data set id, ``org/name`` or ``org/name:config``;
- a path ending in ``.txt`` (one document), ``.jsonl`` or ``.parquet`` (one document a row).

Data sets are looked for in the data root first, a folder laid out like the Hub (``<root>/<org>/<name>``),
then on the Hub itself or in its cache.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rrsq.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["DATA_ROOT_VARIABLE", "DatasetId", "load_documents", "quiet_datasets", "resolve_data_root"]

DATA_ROOT_VARIABLE = "RRSQ_DATA_ROOT"
FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")
_ID_PATTERN = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(:(?P<config>[\w.-]+))?")


@dataclass(frozen=True)
class DatasetId:
    """A data set on the Hub, or in a folder laid out like it: its id and, if it has several, its config."""

    name: str
    config: str | None = None

    @classmethod
    def parse(cls, source: str) -> DatasetId:
        """Read ``wikitext2``, ``org/name`` or ``org/name:config``; :class:`DataError` for anything else."""
        if source in NAMED_DATASETS:
            return NAMED_DATASETS[source]
        match = _ID_PATTERN.fullmatch(source)
        if match is None:
            raise DataError(
                f"'{source}' is neither a data set id (org/name or org/name:config) nor a text file "
                f"({', '.join(FILE_SUFFIXES)})."
            )
        return cls(match["name"], match["config"])

    def __str__(self) -> str:
        return f"{self.name}:{self.config}" if self.config else self.name


NAMED_DATASETS = {"wikitext2": DatasetId("Salesforce/wikitext", "wikitext-2-raw-v1")}


def load_documents(source: str, *, split: str, data_root: Path | None = None) -> list[str]:
    """Return the documents of a source in their order, empty ones included (WikiText counts them as lines).

    ``split`` is the data set's split, such as ``train`` or ``test``; a local file has none and ignores it.
    ``data_root`` is the folder to look in before the Hub; without it, ``RRSQ_DATA_ROOT`` is read.
    Raises :class:`DataError` when the source cannot be found, reached or read, or holds no text.
    """
    if Path(source).suffix.lower() in FILE_SUFFIXES:
        dataset = _load_file(Path(source).expanduser())
    else:
        dataset = _load_dataset(DatasetId.parse(source), split, resolve_data_root(data_root))
    documents = [text for text in dataset[_text_column(dataset, source)] if text is not None]
    if not any(text.strip() for text in documents):
        raise DataError(f"'{source}' holds no text: {len(documents)} documents, all of them empty.")
    return documents


def resolve_data_root(data_root: Path | None = None) -> Path | None:
    """Return ``data_root``, else the folder that ``RRSQ_DATA_ROOT`` names, else None.

    Raises :class:`DataError` when the one that is named is not a folder.
    """
    named = data_root or os.environ.get(DATA_ROOT_VARIABLE)
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise DataError(f"The data root '{folder}' (--data-root or {DATA_ROOT_VARIABLE}) is not a folder.")
    return folder


def _load_file(path: Path) -> Dataset:
    if not path.is_file():
        raise DataError(f"There is no text file '{path}'.")
    if path.stat().st_size == 0:
        raise DataError(f"'{path}' is empty.")
    from datasets import Dataset

    # The readers take glob patterns, so a path with brackets has to be escaped.
    pattern = re.sub(r"([*?\[])", r"[\1]", str(path.resolve()))
    suffix = path.suffix.lower()
    readers: dict[str, Callable[[], Dataset]] = {
        ".txt": lambda: Dataset.from_text(pattern, sample_by="document"),
        ".jsonl": lambda: Dataset.from_json(pattern),
        ".parquet": lambda: Dataset.from_parquet(pattern),
    }
    try:
        with quiet_datasets():
            return readers[suffix]()
    except Exception as error:
        _raise_if_disk_full(error)
        raise DataError(f"'{path}' cannot be read as {suffix}: {_reason(error)}") from error


def _load_dataset(dataset_id: DatasetId, split: str, data_root: Path | None) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    folder = data_root / dataset_id.name if data_root else None
    is_local = folder is not None and folder.is_dir()
    try:
        with quiet_datasets():
            return load_dataset(str(folder) if is_local else dataset_id.name, dataset_id.config, split=split)
    except (ValueError, DatasetNotFoundError) as error:
        where = f"in {folder}" if is_local else "on the Hub"
        hint = "" if is_local else _local_data_hint(dataset_id, folder) + _suggest_named(dataset_id)
        raise DataError(
            f"Data set '{dataset_id}', split '{split}', {where}: {_reason(error)}.{hint}"
        ) from error
    except Exception as error:
        _raise_if_disk_full(error)
        if is_local:
            raise DataError(
                f"Data set '{dataset_id}' in {folder} cannot be read: {_reason(error)}"
            ) from error
        hint = _local_data_hint(dataset_id, folder) + _suggest_named(dataset_id)
        raise DataError(
            f"Data set '{dataset_id}' cannot be fetched from the Hub ({_reason(error)}).{hint}"
        ) from error


def _local_data_hint(dataset_id: DatasetId, folder: Path | None) -> str:
    looked = f"; looked in {folder}, which does not exist" if folder else " (none is set)"
    return (
        f"\nTo use local data, give --data-root or {DATA_ROOT_VARIABLE} a folder laid out like the Hub, "
        f"holding {dataset_id.name}/{looked}. Or name a text file ({', '.join(FILE_SUFFIXES)})."
    )


def _suggest_named(dataset_id: DatasetId) -> str:
    return did_you_mean(dataset_id.name, NAMED_DATASETS) if "/" not in dataset_id.name else ""


def _text_column(dataset: Dataset, source: str) -> str:
    """The column named ``text``, else the only string column."""
    strings = [
        name
        for name, feature in dataset.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    columns = ", ".join(f"{name} ({getattr(f, 'dtype', 'nested')})" for name, f in dataset.features.items())
    raise DataError(
        f"'{source}' has no column 'text' and {'no' if not strings else 'more than one'} string column "
        f"to take instead. Its columns: {columns}."
    )


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Switch the progress bars of ``datasets`` off, and back to what they were."""
    import datasets

    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()


def _raise_if_disk_full(error: BaseException) -> None:
    """Let a full disk through as what it is: the library wraps it, and the data are not to blame."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            raise cause
        cause = cause.__cause__


def _reason(error: BaseException) -> str:
    """Two lines of the innermost explicit cause: the wrappers say only that it failed, the rest is usage."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).strip().splitlines()[:2]]
    return " ".join(lines).rstrip(".") or type(error).__name__
