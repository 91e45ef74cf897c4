"""Doing the steps of a comparison that are not done yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrsq import __version__
from rrsq.comparison.cache import (
    MEAN_WINDOWS,
    CacheMeans,
    measure_cache_means,
    read_cache_means,
    replace_cache,
    write_cache_means,
)
from rrsq.comparison.folder import FULL_PRECISION, ComparisonFolder, Target
from rrsq.comparison.model_files import digest, model_fingerprint, model_identity
from rrsq.comparison.plan import ComparisonPlan
from rrsq.comparison.source import Source
from rrsq.comparison.subjects import Subject, cache_of, subjects
from rrsq.evaluation.reference import Reference
from rrsq.evaluation.results import TaskResult
from rrsq.evaluation.run import prepare_tasks, release_memory, run_tasks
from rrsq.evaluation.scores import EvaluationReport, ModelReport, library_versions
from rrsq.evaluation.tasks import Task, TaskOptions
from rrsq.quantizer.checks import check_rope
from rrsq.quantizer.needs import needs_calibration
from rrsq.quantizer.options import QuantizationOptions
from rrsq.quantizer.production.produce import (
    Calibration,
    OutputOptions,
    SourceModel,
    check_source,
    load_calibration,
    produce_checkpoint,
)
from rrsq.recipe import KVCache, Recipe
from rrsq.runtime.format.format import CalibrationInfo
from rrsq.runtime.format.loading import load_config, load_model, load_tokenizer
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
    """The full-precision model first; the others go by the names of :attr:`subjects`."""
    subjects: Sequence[Subject]
    """What was measured, in the order of the report."""
    recipes: Mapping[str, Recipe]
    quantizations: Mapping[str, Mapping[str, Any]]
    """By recipe, the report of its quantization."""
    calibration: CalibrationInfo | None
    source_dtype: str
    """Of the weights of the model that was quantized."""


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
        root = plan.options.data_root
        family = check_source(plan.model, root)
        self._check_caches()
        self.listener.preparing("tasks, tokenizer and calibration text")
        prepare_tasks(plan.tasks, plan.options)
        tokenizer = load_tokenizer(plan.model, root)
        calibration = None
        if "4" in plan.caches or any(needs_calibration(recipe) for recipe in plan.recipes.values()):
            calibration = load_calibration(tokenizer, family, plan.calibration, root)
        self.listener.preparing("fingerprint of the model")
        model = model_fingerprint(plan.model, root)
        source = Source(plan.model, model, self.folder.target(FULL_PRECISION).folder / "converted", root)
        steps = [
            self._step(subject, model, calibration)
            for subject in subjects(plan.recipes, plan.caches, self._floor_dtype(source))
        ]
        for step in steps:
            self._find_missing(step, model)
        if source.needs_conversion and any(step.missing for step in steps):
            self.listener.preparing("converting the GGUF file")
            source.convert()
        for name, recipe in plan.recipes.items():
            if any(step.missing for step in steps if step.subject.recipe == name):
                made_of = self._made_of(model, recipe, calibration)
                self._quantize(name, recipe, made_of, source, tokenizer, calibration)
        self._evaluate(steps, source, calibration)
        return Comparison(
            report=EvaluationReport.of([self._report(step) for step in steps]),
            subjects=[step.subject for step in steps],
            recipes=plan.recipes,
            quantizations={
                name: self.folder.target(name).quantization().get("report", {}) for name in plan.recipes
            },
            calibration=None if calibration is None else calibration.info,
            source_dtype=source.dtype(),
        )

    def _check_caches(self) -> None:
        """Refuse a cache that does not go with the model, before anything is done."""
        config = load_config(self.plan.model, self.plan.options.data_root)
        if "4" in self.plan.caches:
            check_rope(config, Recipe(kv_cache=cache_of("4", None)))

    def _floor_dtype(self, source: Source) -> str | None:
        """Another rounding than the one that is measured in: coarser if that is the finest."""
        if not self.plan.noise_floor:
            return None
        dtype = source.dtype() if self.plan.dtype == "auto" else self.plan.dtype
        return "bfloat16" if dtype == "float32" else "float32"

    def _step(self, subject: Subject, model: str, calibration: Calibration | None) -> _Step:
        target = self.folder.target(subject.name)
        if subject.recipe is None:
            made_of: dict[str, Any] = {"model": model}
        else:
            recipe = self.plan.recipes[subject.recipe]
            made_of = {"checkpoint": digest(self._made_of(model, recipe, calibration))}
        if subject.cache != "own":
            made_of["cache"] = None if subject.cache is None else subject.cache.model_dump(mode="json")
        if isinstance(subject.cache, KVCache):
            made_of["cache_means"] = digest(self._cache_means_of(model, calibration))
        return _Step(subject, target, made_of)

    def _cache_means_of(self, model: str, calibration: Calibration | None) -> dict[str, Any]:
        """What the means for the cache depend on."""
        assert calibration is not None
        return {
            "model": model,
            "calibration": calibration.info.fingerprint,
            "windows": MEAN_WINDOWS,
            "device": self.plan.device,
            "dtype": self.plan.dtype,
            "rrsq": __version__,
        }

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
        plan, subject = self.plan, step.subject
        versions = library_versions()
        finished = step.target.results().get("tasks", {})
        for task in plan.tasks:
            if task.needs_reference and subject.name == FULL_PRECISION:
                continue
            if subject.is_floor and not task.over_windows:
                continue
            for name, data in task.data_keys().items():
                step.inputs[name] = {
                    **step.made_of,
                    **({"reference": model} if task.needs_reference else {}),
                    "data": data,
                    "limit": plan.options.limit,
                    "sequence_length": plan.options.sequence_length,
                    "bos": plan.options.bos,
                    "num_fewshot": plan.options.num_fewshot,
                    "batch_size": plan.options.batch_size,
                    "device": plan.device,
                    "dtype": subject.dtype or plan.dtype,
                    **({"reference_dtype": plan.dtype} if subject.is_floor else {}),
                    "versions": {library: versions[library] for library in VERSIONS},
                }
                record = finished.get(name)
                if record is None or record["inputs"] != step.inputs[name]:
                    step.missing.append(name)
                    if record is not None:
                        names = ", ".join(changed(record["inputs"], step.inputs[name]))
                        self.listener.note(f"{subject.name}: {name} is measured again; changed: {names}")
        if step.inputs and not step.missing:
            self.listener.note(f"{subject.name}: all tasks are measured already")

    def _quantize(
        self,
        name: str,
        recipe: Recipe,
        made_of: dict[str, Any],
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        calibration: Calibration | None,
    ) -> None:
        """Make a checkpoint, unless it is there and made of the same."""
        target = self.folder.target(name)
        record = target.quantization()
        if (target.checkpoint / "config.json").is_file() and record.get("made_of") == made_of:
            self.listener.note(f"{name}: quantized already")
            return
        if record:
            names = ", ".join(changed(record["made_of"], made_of)) or "the checkpoint is gone"
            self.listener.note(f"{name}: quantized again; changed: {names}")
        target.folder.mkdir(parents=True, exist_ok=True)
        produced = produce_checkpoint(
            SourceModel(source.path, tokenizer, self.plan.options.data_root),
            recipe,
            OutputOptions(target.checkpoint, overwrite=True),
            calibration if needs_calibration(recipe) else None,
            QuantizationOptions(seed=self.plan.seed, device=self.plan.device),
            on_step=lambda *call: self.listener.quantizing(name, *call),
        )
        report = {**produced.report.to_dict(), "fallbacks": produced.report.fallbacks}
        target.store_quantization({"made_of": made_of, "report": report})
        release_memory()

    def _evaluate(self, steps: Sequence[_Step], source: Source, calibration: Calibration | None) -> None:
        """Measure what is missing.

        The full-precision model comes first. It stays while a task compares with it, and says what means
        there are for a cache that a checkpoint was not made with.
        """
        relative = {name for task in self.plan.tasks if task.needs_reference for name in task.names}
        keep = any(relative & set(step.missing) for step in steps)
        cache_means, needs_means = (
            None,
            any(step.missing and isinstance(step.subject.cache, KVCache) for step in steps),
        )
        if needs_means:
            made_of = digest(self._cache_means_of(source.fingerprint, calibration))
            cache_means = read_cache_means(self._cache_means_path, made_of)
        reference: Reference | None = None
        for step in steps:
            subject = step.subject
            is_reference = subject.name == FULL_PRECISION
            measures_means = is_reference and needs_means and cache_means is None
            if not step.missing and not (is_reference and keep) and not measures_means:
                continue
            path = source.path if subject.recipe is None else str(self._checkpoint(subject.recipe))
            self.listener.evaluating(subject.name, "loading", 0, 0, "")
            root = self.plan.options.data_root
            tokenizer = load_tokenizer(path, root)
            dtype = subject.dtype or self.plan.dtype
            model = load_model(path, device=self.plan.device, dtype=dtype, data_root=root)
            if measures_means:
                self.listener.evaluating(subject.name, "means for the cache", 0, 0, "")
                cache_means = self._measure_cache_means(model, source, calibration)
            if subject.cache != "own":
                replace_cache(model, subject.cache, cache_means)
            self._measure(step, model, tokenizer, replace(self.plan.options, reference=reference))
            if keep and is_reference:
                reference = Reference(model)
            del model
            release_memory()

    def _checkpoint(self, recipe: str) -> Path:
        return self.folder.target(recipe).checkpoint

    def _measure_cache_means(self, model: Any, source: Source, calibration: Calibration | None) -> CacheMeans:
        assert calibration is not None
        assert calibration.windows is not None
        means = measure_cache_means(model, calibration.windows)
        made_of = digest(self._cache_means_of(source.fingerprint, calibration))
        write_cache_means(self._cache_means_path, means, made_of)
        return means

    @property
    def _cache_means_path(self) -> Path:
        return self.folder.target(FULL_PRECISION).folder / "cache-means.safetensors"

    def _measure(
        self,
        step: _Step,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: TaskOptions,
    ) -> None:
        """Run the missing tasks one after the other, and keep each result as soon as it is there."""
        described = asdict(ModelReport.of(step.subject.name, model, ()))
        for task in self.plan.tasks:
            names = [name for name in task.names if name in step.missing]
            if not names:
                continue
            selected: Task = task.select(names)
            measured = run_tasks(
                step.subject.name, model, tokenizer, [selected], options, self.listener.evaluating
            )
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

    subject: Subject
    target: Target
    made_of: dict[str, Any]
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By task, what its result depends on."""
    missing: list[str] = field(default_factory=list)
