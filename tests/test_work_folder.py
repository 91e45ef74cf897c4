"""The folder that long runs work in: one process at a time, nothing half made, nothing lost."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from killed_run import produce
from rrsq import work_folder
from rrsq.comparison.folder import ComparisonFolder
from rrsq.diagnostics.make_manifest import calibration_work, make_manifest
from rrsq.errors import InterruptedRunError, OutputExistsError, ResumeError, StorageError
from rrsq.work_folder import WorkFolder, changed, was_published, work_path
from tiny_calibration import tiny_windows
from tiny_quantized import load_tiny, recipe_of

IDENTITY = {"the recipe": {"name": "a"}, "the seed": 0}
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
User = Callable[[Path], AbstractContextManager[Any]]


def locked(out: Path, **options: Any) -> AbstractContextManager[WorkFolder]:
    return WorkFolder.locked(out, "quantization", {**IDENTITY, **options.pop("change", {})}, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make(work: WorkFolder, text: str = "new") -> None:
    """The output of a run."""
    work.staging.mkdir(exist_ok=True)
    (work.staging / "config.json").write_text(text)
    work.advance(2)
    work.finish()


def run(out: Path, steps: Callable[[WorkFolder], None]) -> None:
    with locked(out) as work:
        steps(work)


def stop_after_a_layer(out: Path) -> None:
    def steps(work: WorkFolder) -> None:
        work.staging.mkdir()
        work.manifest.record = {"what": "it knows"}
        work.advance(1)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run(out, steps)


# The three that work so: what takes the lock, and where that is.


@contextmanager
def quantize(out: Path, model: Path) -> Iterator[None]:
    produce(model, out)
    yield


def calibrate(out: Path, model: Path) -> AbstractContextManager[Any]:
    manifest = make_manifest(
        load_tiny(model),
        "tiny",
        tiny_windows(),
        recipe_of("rtn-w4a4"),
        source="random",
        seed=0,
        hessians=False,
    )
    return calibration_work(out, manifest)


def compare(out: Path, model: Path) -> AbstractContextManager[Any]:
    return ComparisonFolder(out).opened(str(model))


@pytest.fixture(params=[quantize, calibrate, compare], ids=lambda user: user.__name__)
def user(request: pytest.FixtureRequest, tiny_llama_dir: Path) -> User:
    return lambda out: request.param(out, tiny_llama_dir)


@pytest.fixture
def lock(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    of_a_comparison = "compare" in request.node.callspec.id
    return (tmp_path / "out" if of_a_comparison else work_path(tmp_path / "out")) / "lock"


@pytest.mark.parametrize("taken", [True, False])
def test_a_lock_whose_file_its_owner_removed_is_none(
    user: User, lock: Path, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking it: another process may hold the file that is at that place by then."""
    flock, holders = fcntl.flock, []

    def after_the_owner_removed_it(descriptor: int, operation: int) -> None:
        if not holders:
            lock.unlink()
            holders.append(os.open(lock, os.O_RDWR | os.O_CREAT) if taken else -1)
            if taken:
                flock(holders[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", after_the_owner_removed_it)
    if taken:
        with pytest.raises(StorageError, match="Another process is making"), user(tmp_path / "out"):
            pass
        assert lock.is_file()
        os.close(holders[0])
    else:
        with user(tmp_path / "out"):
            pass
    assert holders


def test_two_at_a_time_are_one_too_many(user: User, lock: Path, tmp_path: Path) -> None:
    lock.parent.mkdir()
    holder = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(holder, fcntl.LOCK_EX)
    for _ in range(2):  # Being refused takes nothing from the one that holds it.
        with (
            pytest.raises(StorageError, match=r"Another process is making '.*out' now"),
            user(tmp_path / "out"),
        ):
            pass
    assert names(lock.parent) == ["lock"]
    os.close(holder)
    with user(tmp_path / "out"):
        pass


def test_a_system_without_locks_is_one_clear_error(
    user: User, lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_folder, "fcntl", None)
    with pytest.raises(StorageError, match="Run it on Linux or macOS"), user(tmp_path / "out"):
        pass


def test_modules_of_unix_are_not_needed_to_import() -> None:
    code = (
        "import sys, psutil; sys.modules.update(fcntl=None, resource=None)\n"
        "import rrsq.cli.app, rrsq.comparison.steps, rrsq.diagnostics.layer_pass\n"
        "import rrsq.quantizer.production.produce\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_is_finished_is_found_again(tmp_path: Path) -> None:
    stop_after_a_layer(tmp_path / "out")
    assert names(work_path(tmp_path / "out")) == ["manifest.json", "out"]
    with locked(tmp_path / "out") as work:
        assert work.manifest.finished == 1
        assert work.manifest.record == {"what": "it knows"}
        make(work)
        work.publish(overwrite=False)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == "new"


def test_another_identity_is_refused_and_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after_a_layer(out)
    change = {"the recipe": {"name": "b"}, "the text": "t"}
    expected = "unfinished quantization of 1 layers, and since then the recipe and the text changed"
    with pytest.raises(ResumeError, match=expected), locked(out, change=change):
        pass
    with pytest.raises(ResumeError, match="the command changed"):
        WorkFolder.locked(out, "calibration", IDENTITY).__enter__()
    with locked(out) as work:
        assert work.manifest.finished == 1
        make(work)
    with locked(out, change=change, restart=True) as work:
        assert work.manifest.finished == 0
        assert names(work.path) == ["lock", "manifest.json"]


def test_what_changed_is_named() -> None:
    assert changed({"a": 1, "b": 2, "d": 0}, {"a": 1, "b": 3, "c": 4}) == ["b", "d", "c"]


def test_what_finished_no_layer_is_thrown_away_for_another_identity(tmp_path: Path) -> None:
    work_path(tmp_path / "out").mkdir()
    (work_path(tmp_path / "out") / "out").mkdir()
    with locked(tmp_path / "out") as work:
        assert names(work.path) == ["lock", "manifest.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 2, "surplus": 1}'])
def test_a_damaged_manifest_loses_nothing(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    stop_after_a_layer(out)
    (work_path(out) / "manifest.json").write_text(text)
    with pytest.raises(StorageError, match=r"damaged or of another version.*--restart"), locked(out):
        pass
    assert (work_path(out) / "out").is_dir()
    assert not was_published(out)
    with locked(out, restart=True) as work:
        assert work.manifest.finished == 0


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (FULL, StorageError, "disk that holds '.*out' is full. Finished layers are kept in '.*out.work'"),
        (RuntimeError("No space left on device (os error 28)"), StorageError, "disk that holds .* is full"),
        (OSError(errno.EROFS, "Read-only file system"), StorageError, "written: Read-only file system"),
        (KeyboardInterrupt(), InterruptedRunError, "before a layer was finished; nothing was left"),
        (ValueError("a bug"), ValueError, "a bug"),
    ],
)
def test_a_failure_without_a_finished_layer_leaves_nothing_new(
    tmp_path: Path, error: BaseException, raised: type[Exception], message: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")

    def steps(work: WorkFolder) -> None:
        work.staging.mkdir()
        (work.staging / "half").write_bytes(b"half")
        raise error

    with pytest.raises(raised, match=message) as caught:
        run(out, steps)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["out"]
    assert (out / "config.json").read_text() == "old"


def test_a_stop_says_what_is_kept(tmp_path: Path) -> None:
    def steps(work: WorkFolder) -> None:
        work.advance(1)
        raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError, match=r"1 finished layers are kept in '.*\.out\.work'"):
        run(tmp_path / "out", steps)
    assert work_path(tmp_path / "out").is_dir()


def test_an_output_is_replaced_only_if_it_may_be(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def steps(work: WorkFolder) -> None:
        make(work)
        out.mkdir()
        (out / "config.json").write_text("old")
        (out / "more").write_text("old")
        work.publish(overwrite=False)

    with pytest.raises(OutputExistsError, match="has appeared"):
        run(out, steps)
    assert names(out) == ["config.json", "more"]
    with locked(out) as work:
        assert work.manifest.whole
        assert work.made == work.staging
        work.publish(overwrite=True)
    assert names(tmp_path) == ["out"]
    assert names(out) == ["config.json"]


def test_a_failing_rename_puts_the_old_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.parent.name == ".out.work" and self.name == "out":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    def steps(work: WorkFolder) -> None:
        make(work)
        work.publish(overwrite=True)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(StorageError, match="Input/output error"):
        run(out, steps)
    assert (out / "config.json").read_text() == "old"
    monkeypatch.undo()
    with locked(out) as work:
        work.publish(overwrite=True)
    assert (out / "config.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_an_output_that_a_killed_run_moved_away_is_not_thrown_away(tmp_path: Path) -> None:
    out, work = tmp_path / "out", work_path(tmp_path / "out")
    stop_after_a_layer(out)
    (work / "replaced").mkdir()
    (work / "replaced" / "config.json").write_text("old")
    with locked(out, restart=True):
        assert (out / "config.json").read_text() == "old"


def test_a_stop_behind_the_rename_is_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def kill(self: WorkFolder) -> None:
        raise RuntimeError("killed")

    def steps(work: WorkFolder) -> None:
        make(work)
        work.publish(overwrite=False)

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "_remove", kill)
        with pytest.raises(RuntimeError, match="killed"):
            run(out, steps)
    assert names(tmp_path) == [".out.work", "out"]
    assert was_published(out)
    with locked(out) as work:
        assert work.made == out
        work.publish(overwrite=False)
    assert names(tmp_path) == ["out"]
    assert not was_published(out)


def test_what_was_about_to_be_removed_is_removed(tmp_path: Path) -> None:
    with locked(tmp_path / "out") as work:
        make(work)
        work.publish(overwrite=False)
    shutil.copytree(tmp_path / "out", tmp_path / ".out.done")
    with locked(tmp_path / "out") as work:
        assert names(tmp_path) == [".out.work", "out"]
        assert json.loads((work.path / "manifest.json").read_text())["finished"] == 0
