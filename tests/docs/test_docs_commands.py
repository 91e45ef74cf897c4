"""Every command of README.md and docs/ runs; :mod:`doc_runners` says how, and what is made small.

A new command that cannot be run by what stands there fails here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from doc_pages import PAGES, Command, commands, inline_code, strays
from doc_runners import RUNNERS, accepted
from rrsq.cli.app import app

# The parser takes these, and the command then says what is missing.
MENTIONED = {"rrsq bench", "rrsq bench --whole"}


def inline_commands(page: Path) -> Iterator[Command]:
    """What stands in backticks and is a whole command line, not only the name or a part of one."""
    for code in inline_code(page):
        if code.startswith(tuple(RUNNERS)) and code not in MENTIONED:
            command = Command(code)
            if command.words[0] != "rrsq" or accepted(command.words[1:]):
                yield command


RUN = list(dict.fromkeys(c for page in PAGES for c in (*commands(page), *inline_commands(page))))


@pytest.mark.parametrize("command", RUN, ids=lambda command: command.line)
def test_documented_command_runs(
    command: Command, documented: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runners = [run for start, run in RUNNERS.items() if command.line.startswith(start)]
    assert runners, f"no test runs commands like '{command.line}'"
    monkeypatch.chdir(documented)
    monkeypatch.setenv("RRSQ_DATA_ROOT", str(documented / "hub"))
    monkeypatch.setenv("RRSQ_CACHE", str(tmp_path / "cache"))
    for name, value in command.environment:
        monkeypatch.setenv(name, value)
    runners[0](command, tmp_path / "output", monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_command_stands_where_none_is_looked_for(page: Path) -> None:
    assert strays(page) == []


@functools.lru_cache
def options_of(name: str) -> frozenset[str]:
    group: Any = typer.main.get_command(app)
    return frozenset(option for parameter in group.commands[name].params for option in parameter.opts)


def test_inline_commands_name_subcommands_and_options_that_exist() -> None:
    found = [(page.name, code) for page in PAGES for code in inline_code(page) if code.startswith("rrsq ")]
    assert len(found) > 10
    names = {command.name for command in app.registered_commands}
    for page, code in found:
        _, name, *words = code.split()
        if name.startswith("-"):
            continue
        assert name in names, f"{page}: `{code}`"
        used = {re.split("[=.]", word)[0] for word in words if word.startswith("-")}
        assert used <= options_of(name) | {"--help"}, f"{page}: `{code}`"


def test_examples_of_the_help_are_whole_command_lines() -> None:
    for command in app.registered_commands:
        examples = re.findall(r"^\$ (?:\w+=\S+ )?(rrsq .*)$", command.epilog or "", re.MULTILINE)
        assert examples
        for line in examples:
            assert accepted(Command(line).words[1:]), line
    assert not accepted(["quantize", "MODEL"])
    assert not accepted(["eval", "MODEL", "--nonsense"])


def test_extraction_finds_commands_over_several_lines(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```bash\nexport A=b\nrrsq x y \\\n    --z 1   # why\n```\n\n"
        "```\nrrsq lost\nfolder/\n```\n\n    python lost.py\n\nAs `rrsq q`:\n\n```bash\nrrsq z > f\n```\n"
    )
    first, second = commands(page)
    assert (first.words, first.environment) == (["rrsq", "x", "y", "--z", "1"], (("A", "b"),))
    assert (second.words, second.environment) == (["rrsq", "z"], ())
    assert inline_code(page) == ["rrsq q"]
    assert strays(page) == ["rrsq lost", "    python lost.py"]
