"""Reading README.md and docs/*.md: code fences, shell commands, inline code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PAGES", "REPOSITORY", "Command", "commands", "fences", "inline_code", "strays"]

REPOSITORY = Path(__file__).parent.parent
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
_EXPORT = re.compile(r"export (\w+)=(\S+)")
_PROGRAMS = "rrsq|python3?|torchrun|accelerate|lm_eval|pip|make|pytest|export|git"
_STRAY = re.compile(rf"(\$ )?(\w+=\S+ )*({_PROGRAMS}) [\w./\"'-]")


@dataclass(frozen=True)
class Command:
    """A command line of a page, on one line, with the variables that lines above it export."""

    line: str
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def words(self) -> list[str]:
        """What a shell makes of it, comments and a redirection of its output left out."""
        words = shlex.split(self.line, comments=True)
        return words[: words.index(">")] if ">" in words else words


def fences(page: Path, language: str) -> list[str]:
    """The code fences in this language."""
    found = _FENCE.findall(page.read_text(encoding="utf-8"))
    return [code for marked, code in found if marked == language]


def commands(page: Path) -> Iterator[Command]:
    """Every command of the page's shell fences."""
    for code in fences(page, "bash"):
        environment: dict[str, str] = {}
        for line in code.replace("\\\n", " ").splitlines():
            line = " ".join(line.split())
            if export := _EXPORT.fullmatch(line):
                environment[export[1]] = export[2]
            elif line and not line.startswith("#"):
                yield Command(line, tuple(environment.items()))


def inline_code(page: Path) -> list[str]:
    """What stands in backticks outside of fences."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(code.split()) for code in _INLINE.findall(text)]


def strays(page: Path) -> list[str]:
    """Lines that look like commands in fences of another language or in indented code."""
    text = page.read_text(encoding="utf-8")
    others = [code for language, code in _FENCE.findall(text) if language != "bash"]
    lines = [line for code in others for line in code.splitlines()]
    lines += [line for line in _FENCE.sub("", text).splitlines() if line.startswith("    ")]
    return [line for line in lines if _STRAY.match(line.strip())]
