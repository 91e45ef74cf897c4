"""A recipe file that is none, or asks for the impossible, is one clear error."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from rrsq.cli.app import app
from rrsq.errors import RecipeError
from rrsq.recipe import Recipe, load_recipe

DEFAULT = Path(__file__).resolve().parents[2] / "recipes" / "rrs-w4a4kv4.yaml"
MEMORY = 200 * 2**20
SECONDS = 5.0


def bomb(levels: int, merge: bool) -> str:
    """The billion laughs: each line repeats the one above nine times."""
    lines = ["a0: &a0 {x: 1}" if merge else "a0: &a0 [x]"]
    for level in range(1, levels):
        parts = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} " + ("{<<: [" + parts + "]}" if merge else f"[{parts}]"))
    return "\n".join([*lines, f"description: *a{levels - 1}"])


def files() -> Iterator[tuple[str, bytes]]:
    """Contents of files that are no recipes."""
    text = DEFAULT.read_text(encoding="utf-8")
    yield "bomb-of-lists", bomb(12, merge=False).encode()
    yield "bomb-of-merges", bomb(12, merge=True).encode()
    yield "alias", b"a: &a 1\nb: *a\n"
    yield "alias-of-itself", b"description: &a [*a]\n"
    yield "deep-list", b"a: " + b"[" * 50000
    yield "deep-mapping", b"{a: " * 20000
    yield "deep-block", b"\n".join(b" " * n + b"a:" for n in range(400))
    yield "large", b"description: " + b"x" * 1_000_000
    yield "no-utf8", text.encode() + b"\xff\xfe"
    yield "utf16", text.encode("utf-16-be")
    yield "nul", text.encode() + b"\0"
    yield "control", text.encode() + b"\x1b[2J"
    yield "python-object", b"description: !!python/object/apply:os.system ['touch x']"
    yield "python-name", b"description: !!python/name:os.system"
    yield "unknown-tag", b"description: !evil x"
    yield "binary", b"description: !!binary 'a'"
    yield "date", b"description: 2001-99-99"
    yield "timestamp", b"weights: {group_size: 2001-12-14t21:59:43.10-05:00}"
    yield "long-number", b"weights: {group_size: " + b"9" * 6000 + b"}"
    yield "sexagesimal", b"weights: {group_size: 1" + b":59" * 2000 + b"}"
    yield "two-documents", text.encode() + b"\n---\n" + text.encode()
    yield "list-as-key", b"? [1, 2]\n: 3\n"
    yield "number-as-key", b"7: 8\n"
    yield "tab", b"weights:\n\tbits: 4\n"
    yield "open-quote", b'name: "x'
    yield "list", b"[1, 2]"
    yield "number", b"7"
    yield "empty", b""
    yield "set", b"!!set {weights, rotation}"


def sections(data: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all fields of a recipe."""
    for key, value in data.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from sections(value, (*path, key))


def wrong_values() -> Iterator[tuple[str, dict[str, Any]]]:
    """The default recipe with a value that its field cannot take, at every field."""
    default = Recipe.model_validate(yaml.safe_load(DEFAULT.read_text(encoding="utf-8"))).model_dump(
        mode="json"
    )
    generator = random.Random(0)
    for path in sections(default):
        junk = [["x"], {"x": {"y": []}}, float("nan"), -(10**30), float("-inf"), "\x1b[2J\n"]
        for value in generator.sample(junk, 3):
            data: Any = yaml.safe_load(yaml.safe_dump(default))
            node = data
            for key in path[:-1]:
                node = node[key]
            if path[-1] == "description" and isinstance(value, str):
                continue
            if path[-1] == "modules_to_not_convert" and value == ["x"]:
                continue
            node[path[-1]] = value
            yield f"{'.'.join(path)}={value!r}", data


FILES = dict(files())
WRONG = dict(wrong_values())


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """A recipe takes neither long nor much memory."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    yield
    assert time.perf_counter() - started < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.yaml"
    path.write_bytes(FILES[name])
    refuse(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", WRONG)
def test_a_value_that_a_field_cannot_take(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(WRONG[name]), encoding="utf-8")
    refuse(path)


@pytest.mark.parametrize("kind", ["folder", "link", "device", "missing"])
def test_a_path_that_is_no_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.symlink_to("/dev/zero" if kind == "device" else path)
    refuse(path)


@pytest.mark.parametrize(
    "value",
    [
        "*x",
        "[" * 20000,
        "9" * 6000,
        "2001-99-99",
        "!!python/name:os.system",
        "&a [*a]",
        "{[1]: 2}",
        "'",
    ],
)
def test_an_assignment_that_is_no_value(value: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("rrs-w4a4kv4", [f"weights.group_size={value}"])
    check(str(caught.value))


def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(FILES["bomb-of-merges"])
    result = CliRunner().invoke(
        app, ["quantize", "nowhere", "-o", str(tmp_path / "out"), "--recipe", str(path)]
    )
    assert result.exit_code == 2
    assert result.stderr.count("Error: ") == 1
    assert "aliases" in result.stderr
    assert not (tmp_path / "out").exists()


def refuse(path: Path) -> None:
    """Loading is one clear error."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    check(str(caught.value))


def check(message: str) -> None:
    """One line of a readable length without control characters."""
    assert 20 < len(message) < 1000
    assert message.isprintable()
