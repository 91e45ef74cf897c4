"""Doing the steps of a comparison that are not done yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rrsq import __version__
from rrsq.comparison.folder import FULL_PRECISION, ComparisonFolder, Target
from rrsq.comparison.model_files import digest, model_fingerprint, model_identity
from rrsq.comparison.plan import ComparisonPlan
from rrsq.evaluation.results import TaskResult
from rrsq.evaluation.run import prepare_tasks, release_memory, run_tasks
from rrsq.evaluation.scores import EvaluationReport, ModelReport, library_versions
from rrsq.evaluation.tasks import Task, TaskOptions
from rrsq.quantizer.needs import needs_calibration
from rrsq.quantizer.production.produce import (
    Calibration,
    OutputOptions,
    check_source,
    load_calibration,
    produce_checkpoint,
)
from rrsq.recipe import Recipe
from rrsq.runtime.format.format import CalibrationInfo
from rrsq.runtime.format.loading import load_model, load_tokenizer
from rrsq.work_folder import changed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Comparison", "Listener", "compare"]

# A change of these can change a task's result.
VERSIONS = ("rrsq", "torch", "transformers", "lm_eval")


@dataclass(frozen=True)
class Listener:
    """Who is told of progress. All of it is optional."""

    note: Callable[[str], None] = lambda text: None
    """A finished step is used again, or is done again because of something."""
    preparing: Callable[[str], None] = lambda text: None
    quantizing: Callable[[str, int, int, int, str], None] = lambda name, done, total, per_layer, text: None
    """The recipe, and what :data:`rrsq.quantizer.production.produce.StepCallback` is told."""
    evaluating: Callable[[str, str, int, int, str], None] = lambda name, doing, done, total, text: None
    """What :data:`rrsq.evaluation.run.StepCallback` is told."""


@dataclass(frozen=True)
class Comparison:
    """A finished comparison."""

    report: EvaluationReport
    """The full-precision model first; the others go by the names of their recipes."""
    recipes: Mapping[str, Recipe]
    quantizations: Mapping[str, Mapping[str, Any]]
    """By recipe, the report of its quantization."""
    calibration: CalibrationInfo | None


def compare(plan: ComparisonPlan, listener: Listener = Listener()) -> Comparison:
    """Quantize and measure what is not yet, and read the rest from the folder.

    A step is done again if anything it was made of changed: the model's files, the recipe, the tokens of the
    calibration text, the questions or texts of a task, an option, the device, or a library's version.

    Raises:
        RRSQError: as quantizing and evaluating do; finished steps stay. As :meth:`ComparisonFolder.opened`.
    """
    folder = ComparisonFolder(plan.folder)
    with folder.opened(model_identity(plan.model, plan.options.data_root)):
        return _Run(plan, listener, folder).execute()


@dataclass
class _Run:
    plan: ComparisonPlan
    listener: Listener
    folder: ComparisonFolder

    def execute(self) -> Comparison:
        plan = self.plan
        family = check_source(plan.model, plan.options.data_root)
        self.listener.preparing("tasks, tokenizer and calibration text")
        prepare_tasks(plan.tasks, plan.options)
        tokenizer = load_tokenizer(plan.model, plan.options.data_root)
        calibration = None
        if any(needs_calibration(recipe) for recipe in plan.recipes.values()):
            calibration = load_calibration(tokenizer, family, plan.calibration, plan.options.data_root)
        self.listener.preparing("fingerprint of the model")
        model = model_fingerprint(plan.model, plan.options.data_root)
        steps = [_Step(FULL_PRECISION, self.folder.target(FULL_PRECISION), {"model": model})]
        steps += [
            _Step(name, self.folder.target(name), self._made_of(model, recipe, calibration), recipe)
            for name, recipe in plan.recipes.items()
        ]
        for step in steps:
            self._find_missing(step, model)
        for step in steps[1:]:
            if step.missing:
                self._quantize(step, tokenizer, calibration)
        self._evaluate(steps)
        return Comparison(
            report=EvaluationReport.of([self._report(step) for step in steps]),
            recipes=plan.recipes,
            quantizations={step.name: step.target.quantization().get("report", {}) for step in steps[1:]},
            calibration=None if calibration is None else calibration.info,
        )

    def _made_of(self, model: str, recipe: Recipe, calibration: Calibration | None) -> dict[str, Any]:
        """What a checkpoint depends on."""
        uses = calibration is not None and needs_calibration(recipe)
        return {
            "model": model,
            "recipe": recipe.model_dump(mode="json"),
            "calibration": calibration.info.fingerprint if uses and calibration is not None else None,
            "seed": self.plan.seed,
            "rrsq": __version__,
        }

    def _find_missing(self, step: _Step, model: str) -> None:
        """Set what each task's result depends on, and which results are not there."""
        plan = self.plan
        versions = library_versions()
        finished = step.target.results().get("tasks", {})
        for task in plan.tasks:
            if task.needs_reference and step.recipe is None:
                continue
            for name, data in task.data_keys().items():
                step.inputs[name] = {
                    **({"checkpoint": digest(step.made_of)} if step.recipe else {"model": model}),
                    **({"reference": model} if task.needs_reference else {}),
                    "data": data,
                    "limit": plan.options.limit,
                    "sequence_length": plan.options.sequence_length,
                    "bos": plan.options.bos,
                    "num_fewshot": plan.options.num_fewshot,
                    "batch_size": plan.options.batch_size,
                    "device": plan.device,
                    "dtype": plan.dtype,
                    "versions": {library: versions[library] for library in VERSIONS},
                }
                record = finished.get(name)
                if record is None or record["inputs"] != step.inputs[name]:
                    step.missing.append(name)
                    if record is not None:
                        names = ", ".join(changed(record["inputs"], step.inputs[name]))
                        self.listener.note(f"{step.name}: {name} is measured again; changed: {names}")
        if not step.missing:
            self.listener.note(f"{step.name}: all tasks are measured already")

    def _quantize(
        self, step: _Step, tokenizer: PreTrainedTokenizerBase, calibration: Calibration | None
    ) -> None:
        """Make a checkpoint, unless it is there and made of the same."""
        assert step.recipe is not None
        record = step.target.quantization()
        if (step.target.checkpoint / "config.json").is_file() and record.get("made_of") == step.made_of:
            self.listener.note(f"{step.name}: quantized already")
            return
        if record:
            names = ", ".join(changed(record["made_of"], step.made_of)) or "the checkpoint is gone"
            self.listener.note(f"{step.name}: quantized again; changed: {names}")
        step.target.folder.mkdir(parents=True, exist_ok=True)
        produced = produce_checkpoint(
            self.plan.model,
            step.recipe,
            OutputOptions(step.target.checkpoint, overwrite=True),
            tokenizer,
            calibration if needs_calibration(step.recipe) else None,
            seed=self.plan.seed,
            device=self.plan.device,
            data_root=self.plan.options.data_root,
            on_step=lambda *call: self.listener.quantizing(step.name, *call),
        )
        report = {**produced.report.to_dict(), "fallbacks": produced.report.fallbacks}
        step.target.store_quantization({"made_of": step.made_of, "report": report})
        release_memory()

    def _evaluate(self, steps: Sequence[_Step]) -> None:
        """Measure what is missing; the full-precision model stays loaded while a task compares with it."""
        relative = {name for task in self.plan.tasks if task.needs_reference for name in task.names}
        keep = any(relative & set(step.missing) for step in steps)
        reference: PreTrainedModel | None = None
        for step in steps:
            if not step.missing and not (keep and step.recipe is None):
                continue
            path = self.plan.model if step.recipe is None else str(step.target.checkpoint)
            self.listener.evaluating(step.name, "loading", 0, 0, "")
            root = self.plan.options.data_root
            tokenizer = load_tokenizer(path, root)
            model = load_model(path, device=self.plan.device, dtype=self.plan.dtype, data_root=root)
            self._measure(step, model, tokenizer, replace(self.plan.options, reference=reference))
            if keep and step.recipe is None:
                reference = model
            del model
            release_memory()

    def _measure(
        self,
        step: _Step,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: TaskOptions,
    ) -> None:
        """Run the missing tasks one after the other, and keep each result as soon as it is there."""
        described = asdict(ModelReport.of(step.name, model, ()))
        for task in self.plan.tasks:
            names = [name for name in task.names if name in step.missing]
            if not names:
                continue
            selected: Task = task.select(names)
            measured = run_tasks(step.name, model, tokenizer, [selected], options, self.listener.evaluating)
            finished = step.target.results().get("tasks", {})
            for name in names:
                results = [result.to_dict() for result in measured[name]]
                finished[name] = {"inputs": step.inputs[name], "results": results}
            step.target.store_results({"model": described, "tasks": finished})

    def _report(self, step: _Step) -> ModelReport:
        """What the tasks of this plan gave, read back."""
        record = step.target.results()
        results = tuple(
            TaskResult.from_dict(result)
            for name in step.inputs
            for result in record["tasks"][name]["results"]
        )
        return ModelReport(**{**record["model"], "results": results})


@dataclass
class _Step:
    """One model of the comparison, and what of it is still to be measured."""

    name: str
    target: Target
    made_of: dict[str, Any]
    recipe: Recipe | None = None
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By task, what its result depends on."""
    missing: list[str] = field(default_factory=list)
