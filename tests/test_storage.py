"""What is looked at before an output is written, and files that outlive a crash."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rrsq import storage
from rrsq.errors import OutputExistsError, StorageError
from rrsq.storage import allocate, check_output, write_whole


def test_an_existing_output_is_refused_unless_it_may_be_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(OutputExistsError, match="exists already") as caught:
        check_output(out, overwrite=False)
    assert caught.value.exit_code == 2
    check_output(out, overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "config.json"]


def test_a_folder_that_is_no_model_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("dear", encoding="utf-8")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for name in ("home", "file"):
        with pytest.raises(OutputExistsError, match="is not a model folder"):
            check_output(tmp_path / name, overwrite=True)


def test_an_empty_folder_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    check_output(tmp_path / "out", overwrite=True)


def test_checking_leaves_nothing_but_the_parent(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b" / "out", overwrite=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b"]


def test_a_parent_that_is_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(StorageError, match="cannot be written"):
        check_output(tmp_path / "file" / "out", overwrite=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="needs an ordinary user: root may write anywhere")
def test_a_parent_without_permission_is_one_clear_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="cannot be written: Permission denied"):
        check_output(tmp_path / "out", overwrite=False)


def test_a_file_stays_as_it_was_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    write_whole(file, "old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            write_whole(file, "new")
    assert file.read_text() == "old"
    write_whole(file, "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("reserves", [True, False])
def test_space_is_taken_at_once_on_any_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reserves: bool
) -> None:
    if not reserves:
        monkeypatch.delattr(os, "posix_fallocate")
        monkeypatch.setattr(storage, "_ZEROS", 4)
    path = tmp_path / "file"
    with path.open("wb") as file:
        allocate(file, 11)
        assert path.stat().st_size == 11
        file.write(b"head")
    assert path.read_bytes() == b"head" + bytes(7)
