"""A mutated checkpoint, and what must come of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["ENTRIES", "Case", "Outcome", "change_json", "outcomes", "read_tensors", "write_tensors"]

# error: one RRSQError. same: what the untouched checkpoint gives. either: one of the two.
# shown: an RRSQError, or it is described as it is (``inspect`` reads headers only).
# own: transformers refuses it before rrsq is asked, by any ordinary exception, or takes it for a model that
# rrsq did not make. skipped: not tried.
Outcome = Literal["error", "same", "either", "shown", "own", "skipped"]

# Ways to load a checkpoint. ``eval`` and ``generate`` are the commands, which load the tokenizer as well.
# ``serve`` and ``bench`` read headers, and start nothing here.
ENTRIES = ("load", "from_pretrained", "inspect", "generate", "eval", "serve", "bench")


def outcomes(
    everywhere: Outcome = "error",
    *,
    auto: Outcome | None = None,
    inspect: Outcome | None = None,
    commands: Outcome | None = None,
) -> dict[str, Outcome]:
    """What each entry gives; ``auto`` is ``from_pretrained``, ``commands`` are ``generate`` and ``eval``."""
    return {
        "load": everywhere,
        "from_pretrained": auto or everywhere,
        "inspect": inspect or everywhere,
        "generate": commands or everywhere,
        "eval": commands or everywhere,
        "serve": "shown",
        "bench": "shown",
    }


@dataclass(frozen=True)
class Case:
    """One mutation.

    Attributes:
        kind: what is mutated.
        name: which mutation of that kind.
        mutate: changes a copy of the checkpoint in place.
        base: the checkpoint: ``one`` file, ``shards``, with an ``order`` of channels, or of the ``first``
            generation, which has a rotation of each kind and stores signs.
        expected: the outcome of each entry.
    """

    kind: str
    name: str
    mutate: Callable[[Path], Any]
    base: Literal["one", "shards", "order", "first"] = "one"
    expected: dict[str, Outcome] = field(default_factory=outcomes)

    @property
    def id(self) -> str:
        """For pytest."""
        return f"{self.kind}-{self.name}"


def change_json(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A mutation that changes a JSON file; a returned value replaces the whole content."""

    def mutate(folder: Path) -> None:
        data = json.loads((folder / file).read_text(encoding="utf-8"))
        replaced = change(data)
        (folder / file).write_text(json.dumps(data if replaced is None else replaced), encoding="utf-8")

    return mutate


def read_tensors(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file, by the format's definition."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_tensors(file: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    """The opposite; a header in bytes is written as it is."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
