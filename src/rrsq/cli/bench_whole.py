"""``rrsq bench --whole``: whole models beside what engines offer by themselves."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrsq.cli.console import print_note, print_warning, progress_bar, stdout
from rrsq.cli.options import EngineName
from rrsq.errors import EngineError, UsageError

if TYPE_CHECKING:
    from rrsq.benchmarking.whole.loads import Load
    from rrsq.benchmarking.whole.plan import Subject
    from rrsq.benchmarking.whole.process import Job
    from rrsq.benchmarking.whole.report import WholeReport

__all__ = ["WholeRequest", "time_whole"]

_GPU_MEMORY = 0.85


@dataclass(frozen=True)
class WholeRequest:
    """What the command line asks for; ``device`` is where transformers computes."""

    model: str | None
    shapes: Sequence[str]
    recipe: str | None
    assignments: Sequence[str]
    layers: int | None
    engine: EngineName
    against: str | None
    loads: tuple[Load, ...]
    new_tokens: int
    repeats: int
    tensor_parallel_size: int
    engine_options: dict[str, Any]
    device: str
    json_path: Path | None


def time_whole(request: WholeRequest) -> None:
    """Check, run each contender in a process of its own, print and write."""
    from rrsq.benchmarking.whole.contenders import DEFAULTS
    from rrsq.benchmarking.whole.plan import Workload, jobs
    from rrsq.benchmarking.whole.report import WholeReport, tables
    from rrsq.evaluation.scores import library_versions, write_json

    subject = _subject(request)
    engine = request.engine.value
    against = DEFAULTS[engine] if request.against is None else request.against
    names = [name for name in against.split(",") if name]
    workload = Workload(request.loads, request.new_tokens, request.repeats)
    planned = jobs(subject, engine, names, workload, _engine_options(request))
    _check_engine(request, subject)
    outcomes = _run(planned)
    command = " ".join(["rrsq", *sys.argv[1:]])
    report = WholeReport(
        subject.name,
        subject.recipe,
        engine,
        command,
        request.new_tokens,
        request.repeats,
        request.loads,
        tuple(outcomes),
        library_versions(),
    )
    for table in tables(report):
        stdout.print(table)
    _explain(report)
    if request.json_path is not None:
        write_json(request.json_path, report.to_dict())
        print_note(f"Wrote {request.json_path}")
    if not any(outcome.measurements for outcome in outcomes):
        raise EngineError(f"None of the models ran. The last one: {outcomes[-1].reason}")


def _subject(request: WholeRequest) -> Subject:
    from rrsq.benchmarking.whole.plan import open_checkpoint, random_model
    from rrsq.recipe import load_recipe

    if request.model is None and not request.shapes:
        raise UsageError(
            "Nothing to time: give --model OUT, a checkpoint, or --shape NAME, such as --shape llama-3-8b."
        )
    if len(request.shapes) + (request.model is not None) > 1:
        raise UsageError("With --whole one model is timed: give one --model or one --shape.")
    if request.model is None:
        recipe = load_recipe(request.recipe or "rrs-w4a4kv4", request.assignments)
        return random_model(request.shapes[0], recipe, request.layers)
    for option, given in (
        ("--recipe", request.recipe),
        ("--set", request.assignments),
        ("--layers", request.layers),
    ):
        if given:
            raise UsageError(f"{option} is for --shape: a checkpoint is timed as it is. Leave it out.")
    return open_checkpoint(request.model)


def _engine_options(request: WholeRequest) -> dict[str, Any]:
    if request.engine is EngineName.VLLM:
        own = {
            "tensor_parallel_size": request.tensor_parallel_size,
            "gpu_memory_utilization": _GPU_MEMORY,
        }
        return {**own, **request.engine_options}
    return {"device": request.device}


def _check_engine(request: WholeRequest, subject: Subject) -> None:
    if request.engine is not EngineName.VLLM:
        if request.device == "cpu":
            print_note("No GPU is used: these are times of a CPU.")
        return
    from rrsq.runtime.format.format import parse_info
    from rrsq.vllm.engine import check_engine
    from rrsq.vllm.limits import check_servable

    if subject.folder is None:
        info = parse_info(subject.description["quantization_config"])
        check_servable(subject.config, info, request.tensor_parallel_size)
    warning = check_engine(subject.folder, request.tensor_parallel_size)
    if warning is not None:
        print_warning(warning)


def _run(planned: Sequence[Job]) -> list[Any]:
    from rrsq.benchmarking.whole import process

    outcomes = []
    with progress_bar() as progress:
        task = progress.add_task("", total=len(planned))
        for job in planned:
            progress.update(task, description=job.name)
            outcomes.append(process.run_in_process(job))
            progress.advance(task)
            reason = outcomes[-1].reason
            if reason is not None:
                print_warning(f"{job.name}: {reason}")
    return outcomes


def _explain(report: WholeReport) -> None:
    from rrsq.benchmarking.whole.contenders import CONTENDERS

    known = CONTENDERS[report.engine]
    for outcome in report.outcomes:
        what = known[outcome.name].describes if outcome.name in known else f"recipe {report.recipe}"
        print_note(f"{outcome.name}: {what}")
    device = next((outcome.device for outcome in report.outcomes if outcome.device), "no device")
    print_note(
        f"{report.model} in {report.engine} on {device}; random prompts. A step: the time of"
        f" {report.new_tokens} new tokens less that of one, over {report.new_tokens - 1}; prefill: all"
        f" prompts and a token of each; the best of {report.repeats}. Ratios are to bf16 in this run;"
        " above 1 is faster."
    )
