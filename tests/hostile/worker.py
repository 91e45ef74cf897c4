"""Runs cases in a process of its own: ``python -m hostile.worker BASES OUT FIRST STEP``.

Writes a line of JSON for each case before and after it, so that whoever started it sees which one brought the
process down. The address space is limited to what the imports took and 2 GiB, so that a case that asks for
more ends in a MemoryError.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile.case import Case
from hostile.cases import CASES
from hostile.folders import CANARY

EXTRA_MEMORY = 2 * 2**30
SECONDS = 20  # A case takes a tenth of a second.
FORBIDDEN = (
    "pickle.find_class",
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
)


def main() -> None:
    bases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    first, step = int(sys.argv[3]), int(sys.argv[4])
    entries = _entries()
    events: list[str] = []
    with tempfile.TemporaryDirectory() as scratch, out.open("a") as file:

        def record(**fields: Any) -> None:
            file.write(json.dumps(fields) + "\n")
            file.flush()

        text = Path(scratch) / "text.txt"
        text.write_text("The river and the city of the king. " * 20)
        folder = Path(scratch) / "checkpoint"
        expected = {}
        for name, base in bases.items():
            shutil.copytree(base, folder)
            expected[name] = _run_all(entries, folder, text)
            shutil.rmtree(folder)
        _limit_memory()
        sys.addaudithook(lambda event, args: events.append(event) if event in FORBIDDEN else None)
        for index in range(first, len(CASES), step):
            case = CASES[index]
            record(started=index)
            shutil.copytree(bases[case.base], folder)
            case.mutate(folder)
            events.clear()
            started, before = time.perf_counter(), _peak_memory()
            tried = _entries_of(case, index)
            results = _run_all({name: entries[name] for name in tried}, folder, text)
            record(
                index=index,
                results=_compare(case, results, expected[case.base]),
                seconds=time.perf_counter() - started,
                memory=_peak_memory() - before,
                forbidden=sorted(set(events)),
                canary=(folder.parent / CANARY).exists(),
            )
            shutil.rmtree(folder)
            for left in Path(scratch).iterdir():
                if left != text:
                    left.rmdir() if left.is_dir() else left.unlink()


def _entries() -> dict[str, Callable[[Path, Path], str]]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging
    from typer.main import get_command

    import rrsq
    from rrsq.benchmarking.whole import process
    from rrsq.cli.app import app

    process.run_in_process = _not_timed
    torch.set_num_threads(1)
    os.environ["COLUMNS"] = "300"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")

    def digest(model: Any) -> str:
        tokens = torch.arange(2, 20).unsqueeze(0)
        with torch.inference_mode():
            return hashlib.sha256(model(tokens).logits.float().numpy().tobytes()).hexdigest()

    group: Any = get_command(app)  # Made once: it takes as long as a small model.

    def command(*arguments: str) -> str:
        stdout, stderr, code = io.StringIO(), io.StringIO(), None
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                group.main(list(arguments), "rrsq")
            except SystemExit as left:
                code = left.code
        assert "\x1b" not in stdout.getvalue() + stderr.getvalue(), "control characters were written"
        if code:
            raise CommandError(code, stderr.getvalue())
        return stdout.getvalue()

    return {
        "load": lambda folder, text: digest(rrsq.load(str(folder), device="cpu")),
        "from_pretrained": lambda folder, text: digest(AutoModelForCausalLM.from_pretrained(folder)),
        "inspect": lambda folder, text: command("inspect", str(folder), "--layers"),
        "generate": lambda folder, text: command(
            "generate", str(folder), "The river", "--max-new-tokens", "2"
        ),
        "eval": lambda folder, text: _first_number(
            command("eval", str(folder), "--tasks", f"text:{text}", "--sequence-length", "16", "--limit", "1")
        ),
        "serve": lambda folder, text: command("serve", str(folder), "--dry-run"),
        "bench": lambda folder, text: command(
            "bench",
            "--whole",
            "--model",
            str(folder),
            "--loads",
            "1x8",
            "--new-tokens",
            "2",
            "--device",
            "cpu",
        ),
    }


def _not_timed(job: Any) -> Any:
    """In the place of a contender's process."""
    from rrsq.benchmarking.whole.loads import Measurement
    from rrsq.benchmarking.whole.process import Outcome

    return Outcome(job.name, device="none", measurements=(Measurement(1, 8, 1.0, 1.0, 1.0, 1.0),))


def _entries_of(case: Case, index: int) -> list[str]:
    """The entries to try. Those that load alike take turns; those that only look are tried at times."""
    step = index // 2
    both = case.expected["eval"] != case.expected["load"]
    turns = {"eval": both or step % 2 == 0, "generate": both or step % 2 == 1}
    turns |= {"serve": step % 8 == 0, "bench": step % 8 == 4}
    return [name for name, outcome in case.expected.items() if outcome != "skipped" and turns.get(name, True)]


class CommandError(Exception):
    """A command that failed: its exit code and what it wrote to stderr."""


def _first_number(table: str) -> str:
    """The perplexity, without the time it took."""
    found = re.search(r"\d+\.\d{3,}", table)
    assert found is not None
    return found[0]


def _run_all(entries: dict[str, Any], folder: Path, text: Path) -> dict[str, dict[str, Any]]:
    return {name: _run(entry, folder, text) for name, entry in entries.items()}


def _run(entry: Callable[[Path, Path], str], folder: Path, text: Path) -> dict[str, Any]:
    from rrsq.errors import RRSQError

    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        return {"output": entry(folder, text)}
    except CommandError as error:
        code, stderr = error.args
        errors = [line for line in stderr.splitlines() if line.startswith("Error: ")]
        return {"ours": code in (1, 2) and len(errors) == 1 and "Traceback" not in stderr, "message": stderr}
    except BaseException as error:
        message = str(error)
        clear = isinstance(error, RRSQError) and 20 < len(message) < 2000 and "\n" not in message
        return {"ours": clear, "message": f"{type(error).__name__}: {message}", "memory": _is_memory(error)}
    finally:
        signal.alarm(0)


def _is_memory(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError) or "not enough memory" in str(error) or "can't allocate" in str(error)
    )


def _compare(case: Case, results: dict[str, Any], base: dict[str, Any]) -> dict[str, list[str]]:
    """Of each entry: what came (error, same, other, unclear) and, where it was no output, the message."""
    found = {}
    for name, result in results.items():
        if "output" in result:
            found[name] = [
                "same" if result["output"] == base[name]["output"] else "other",
                result["output"][-300:],
            ]
        elif result.get("memory"):
            found[name] = ["memory", result["message"][:1000]]
        else:
            found[name] = ["error" if result["ours"] else "unclear", result["message"][:1000]]
    return found


def _too_long(*args: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + EXTRA_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
