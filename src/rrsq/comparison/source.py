"""The model of a comparison, in a form that is quick to read again and again."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from rrsq.runtime.format.loading import load_config, load_model, load_tokenizer, locate_model
from rrsq.storage import check_space, storage_errors

__all__ = ["Source"]

_MARK = "converted.json"


@dataclass(frozen=True)
class Source:
    """Where the model is read from: its own place, or what a GGUF file was converted to.

    Attributes:
        model: as it was named.
        fingerprint: of its files.
        folder: for the conversion, one that nothing else is in.
        data_root: folder laid out like the Hub, looked in before it.
    """

    model: str
    fingerprint: str
    folder: Path
    data_root: Path | None

    @property
    def needs_conversion(self) -> bool:
        """Whether it is a GGUF file, which is not converted yet."""
        return self._is_gguf and not self._is_converted

    @property
    def path(self) -> str:
        """What to load: :meth:`convert` must have been called if it :attr:`needs_conversion`."""
        return str(self._place) if self._is_gguf else self.model

    def convert(self) -> None:
        """Write the model of the GGUF file, in bfloat16, with its tokenizer; the folder appears whole.

        Raises:
            StorageError: the disk is full, or the folder cannot be written to.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        model = load_model(self.model, device="cpu", data_root=self.data_root)
        tokenizer = load_tokenizer(self.model, self.data_root)
        partial = self.folder / "partial"
        with storage_errors(self.folder):
            partial.mkdir(parents=True)
            size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
            check_space(partial, size, "the converted model takes")
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            (partial / _MARK).write_text(json.dumps({"model": self.fingerprint}) + "\n", encoding="utf-8")
            partial.replace(self._place)

    def dtype(self) -> str:
        """Of its weights, by its configuration, or what a GGUF file is converted to."""
        if self._is_gguf:
            return "bfloat16"
        config = load_config(self.model, self.data_root)
        return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")

    @property
    def _is_gguf(self) -> bool:
        return "gguf_file" in locate_model(self.model, self.data_root)[1]

    @property
    def _place(self) -> Path:
        return self.folder / Path(self.model).stem

    @property
    def _is_converted(self) -> bool:
        try:
            mark = json.loads((self._place / _MARK).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return mark == {"model": self.fingerprint}
