"""``rrsq push`` and ``rrsq quantize --push-to-hub`` against a stand-in for the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from cli_failures import failure
from fake_hub import FakeHub, fake_hub
from rrsq.cli.app import app


def rrsq(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch) as fake:
        yield fake


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_checkpoint_is_pushed_with_its_card(hub: FakeHub, qwen2_checkpoint: Path) -> None:
    done = rrsq("push", qwen2_checkpoint, "org/name", "--private")
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == f"{hub.address}/org/name"
    assert hub.private == {"org/name"}
    pushed = {name: content for name, content in hub.repositories["org/name"].items() if name[0] != "."}
    assert pushed == files_of(qwen2_checkpoint)
    assert "quantized with rrsq" in pushed["README.md"].decode()


def test_what_is_there_is_replaced_only_if_asked(hub: FakeHub, qwen2_checkpoint: Path) -> None:
    before = {"README.md": b"mine", "model-00001-of-00002.safetensors": b""}
    hub.repositories["org/name"] = dict(before)
    assert "on the Hub already" in failure(rrsq("push", qwen2_checkpoint, "org/name"), 2)
    assert hub.repositories["org/name"] == before
    done = rrsq("push", qwen2_checkpoint, "org/name", "--overwrite")
    assert done.exit_code == 0, done.output
    assert hub.repositories["org/name"] == files_of(qwen2_checkpoint)


def test_quantize_pushes_and_keeps_what_it_made(hub: FakeHub, tiny_qwen2_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("quantize", tiny_qwen2_dir, "-o", out, "--recipe", "rtn-w4a4", "--push-to-hub", "org/name")
    hub.breaks = True
    message = failure(rrsq(*command), 1)
    assert "Storage quota exceeded" in message
    assert f"'rrsq push {out} org/name' sends it" in message
    assert (out / "config.json").is_file()
    hub.breaks = False
    done = rrsq("push", out, "org/name")
    assert done.exit_code == 0, done.output
    assert hub.repositories["org/name"].keys() >= files_of(out).keys()
    again = rrsq(*command, "--overwrite")
    assert "on the Hub already" in failure(again, 2)


def test_wrong_pushes(
    hub: FakeHub,
    qwen2_checkpoint: Path,
    tiny_qwen2_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    quantize = ("quantize", tiny_qwen2_dir, "-o", tmp_path / "out", "--recipe", "rtn-w4a4")
    assert "no repository of the Hub" in failure(rrsq("push", qwen2_checkpoint, "name"), 2)
    assert "none that rrsq quantized" in failure(rrsq("push", tiny_qwen2_dir, "org/name"), 1)
    assert "--push-to-hub" in failure(rrsq(*quantize, "--private"), 2)
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    assert "Invalid user token" in failure(rrsq("push", qwen2_checkpoint, "org/name"), 1)
    monkeypatch.delenv("HF_TOKEN")
    assert "no token" in failure(rrsq(*quantize, "--push-to-hub", "org/name"), 2)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in failure(rrsq(*quantize, "--push-to-hub", "org/name"), 1)
    assert hub.repositories == {}
    assert list(tmp_path.iterdir()) == []
