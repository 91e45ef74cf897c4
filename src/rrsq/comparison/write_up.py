"""The report of a comparison: one document, which becomes Markdown and a page, and all numbers as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rrsq.bits import activation_bits, cache_bits, weight_bits
from rrsq.comparison.benchmarks import Benchmark
from rrsq.comparison.document import Code, Document, Items, Part, Section, Table, Text
from rrsq.comparison.pictures import pictures
from rrsq.comparison.plan import ComparisonPlan
from rrsq.comparison.sizes import speed_of, stored_bits, stored_bytes
from rrsq.comparison.steps import Comparison
from rrsq.comparison.subjects import Subject, subject_of
from rrsq.evaluation.results import Metric
from rrsq.evaluation.scores import Difference, ModelReport, recovery_text, value_text
from rrsq.recipe import Recipe

__all__ = ["comparison_document", "comparison_to_dict"]

_CACHE_NAMES = {"own": "its own cache", "16": "16-bit cache", "4": "cache of `rrs-w4a4kv4`"}


def comparison_to_dict(
    comparison: Comparison, plan: ComparisonPlan, command: str, benchmarks: Sequence[Benchmark] = ()
) -> dict[str, Any]:
    """Everything in the report, JSON-able."""
    calibration = comparison.calibration
    return {
        "model": plan.model,
        "command": command,
        **comparison.report.to_dict(),
        "calibration": None if calibration is None else calibration.model_dump(mode="json"),
        "recipes": {
            name: {
                "recipe": recipe.model_dump(mode="json"),
                "weight_bits": weight_bits(recipe),
                "activation_bits": activation_bits(recipe),
                "cache_bits": cache_bits(recipe),
                "quantization": dict(comparison.quantizations[name]),
            }
            for name, recipe in comparison.recipes.items()
        },
        "subjects": [
            {
                "name": subject.name,
                "recipe": subject.recipe,
                "cache": _cache_record(subject),
                "dtype": subject.dtype,
                "stored_bytes": stored_bytes(comparison, subject),
                "stored_bits_per_weight": stored_bits(comparison, subject),
                "tokens_per_second": speed_of(comparison, subject),
            }
            for subject in comparison.subjects
        ],
        "benchmarks": [vars(benchmark) for benchmark in benchmarks],
    }


def _cache_record(subject: Subject) -> Any:
    if subject.cache == "own" or subject.cache is None:
        return subject.cache
    return subject.cache.model_dump(mode="json")


def comparison_document(
    comparison: Comparison, plan: ComparisonPlan, command: str, benchmarks: Sequence[Benchmark] = ()
) -> Document:
    """The report for people."""
    report = comparison.report
    drawn = pictures(comparison, benchmarks)
    conventions = {result.task: result.convention for model in report.models for result in model.results}
    sections = [
        Section("", [_headline_table(comparison), Text(_what_stands_there(comparison))]),
        Section("Quality over size and speed", drawn),
        Section("Divergence", _divergence_tables(comparison)),
        Section("By KV cache", _cache_tables(comparison, plan)),
        Section("All numbers", [_full_table(comparison)]),
        Section("Size and speed", _size_parts(comparison, benchmarks)),
        Section("How they are computed", [Items(list(conventions.items()))]),
        Section("How the checkpoints were made", _making(comparison, plan)),
        Section("The command", _running(comparison, command)),
    ]
    title = f"{plan.model}: {len(comparison.recipes)} recipes compared"
    return Document(title, [section for section in sections if section.parts])


def _what_stands_there(comparison: Comparison) -> str:
    text = (
        "In brackets what is left of the full-precision model's accuracy (100 % is nothing lost), or by how"
        " much its perplexity grew (×1 is nothing lost). ± is the standard error. Bits count scales and"
        " multipliers, of a linear with 4096 inputs."
    )
    if any(subject.is_floor for subject in comparison.subjects):
        text += (
            " The full-precision model in another dtype is the noise floor: what differs less from full"
            " precision than it does cannot be told from rounding."
        )
    names = {subject.name.rsplit("@", 1)[-1] for subject in comparison.subjects if subject.cache != "own"}
    if "kv16" in names:
        text += " `@kv16`: the same checkpoint, its KV cache in 16 bits."
    if "kv4" in names:
        text += " `@kv4`: the same weights with the KV cache of `rrs-w4a4kv4`."
    return text


def _headline_table(comparison: Comparison) -> Table:
    """A row a model, a column a task."""
    report = comparison.report
    tasks = report.tasks()
    headlines = {task: _headline(report.models, task) for task in tasks}
    names = [
        f"{task}, {metric.name} {'↑' if metric.higher_is_better else '↓'}"
        for task, metric in headlines.items()
    ]
    rows = [["", "weights, activations, cache", *names]]
    for model, subject in zip(report.models, comparison.subjects, strict=True):
        full = model is report.models[0]
        cells = [_headline_cell(report.compare(model, task), is_reference=full) for task in tasks]
        rows.append([_label(subject), _bits(comparison, subject), *cells])
    return Table(rows)


def _label(subject: Subject) -> str:
    if subject.name == "full-precision":
        return "full precision"
    return f"full precision in {subject.dtype}" if subject.is_floor else f"`{subject.name}`"


def _bits(comparison: Comparison, subject: Subject) -> str:
    recipe = None if subject.recipe is None else comparison.recipes[subject.recipe]
    cache = (None if recipe is None else recipe.kv_cache) if subject.cache == "own" else subject.cache
    cached = cache_bits(Recipe(kv_cache=cache))
    if recipe is None:
        whole = "32" if subject.dtype == "float32" else "16"
        return f"{whole}, {whole}, {whole if cache is None else f'{cached:.2f}'}"
    return f"{weight_bits(recipe):.2f}, {activation_bits(recipe)}, {cached:.2f}"


def _headline(models: tuple[ModelReport, ...], task: str) -> Metric:
    return next(result.headline for model in models if (result := model.result(task)) is not None)


def _headline_cell(differences: list[Difference], *, is_reference: bool) -> str:
    if not differences:
        return ""
    one = differences[0]
    recovery = "" if is_reference else recovery_text(one)
    return value_text(one.metric) + (f" ({recovery})" if recovery else "")


def _divergence_tables(comparison: Comparison) -> list[Part]:
    """Of each task that compares distributions, all its numbers: a row a model."""
    report = comparison.report
    parts: list[Part] = []
    for task in report.tasks():
        if not _headline(report.models, task).relative:
            continue
        results = [model.result(task) for model in report.models]
        names = [metric.name for metric in next(filter(None, results)).metrics]
        rows = [[task, *names]]
        for subject, result in zip(comparison.subjects, results, strict=True):
            if result is not None:
                rows.append([_label(subject), *(value_text(metric) for metric in result.metrics)])
        parts.append(Table(rows))
    return parts


def _cache_tables(comparison: Comparison, plan: ComparisonPlan) -> list[Part]:
    """Where several caches were asked for, a table of each task's headline: a row a recipe, a column each."""
    if len(plan.caches) < 2:
        return []
    report = comparison.report
    models = {model.model: model for model in report.models}
    parts: list[Part] = [
        Text(
            "Each checkpoint with several KV caches, weights and activations being the same: a column alone"
            " compares weights and activations, a row what the cache costs. The weights were calibrated"
            " behind the recipe's own cache."
        )
    ]
    for task in report.tasks():
        headline = _headline(report.models, task)
        heading = f"{task}, {headline.name} {'↑' if headline.higher_is_better else '↓'}"
        rows = [[heading, *(_CACHE_NAMES[choice] for choice in plan.caches)]]
        full = {"own": models["full-precision"], "16": models["full-precision"]}
        by_choice = {**full, "4": models.get("full-precision@kv4")}
        rows.append(["full precision", *(_value(by_choice[choice], task) for choice in plan.caches)])
        for name, recipe in comparison.recipes.items():
            columns = (models[subject_of(name, recipe, choice).name] for choice in plan.caches)
            rows.append([f"`{name}`", *(_value(model, task) for model in columns)])
        parts.append(Table(rows))
    return parts


def _value(model: ModelReport | None, task: str) -> str:
    result = None if model is None else model.result(task)
    return "" if result is None else value_text(result.headline)


def _full_table(comparison: Comparison) -> Table:
    """A row a number."""
    report = comparison.report
    rows = [["task", "metric", "model", "value", "change", "recovery"]]
    for task in report.tasks():
        for model in report.models:
            for one in report.compare(model, task):
                compared = model is not report.reference
                change = "" if one.difference is None or not compared else f"{one.difference:+.4f}"
                recovery = recovery_text(one) if compared else ""
                rows.append([task, one.metric.name, model.model, value_text(one.metric), change, recovery])
    return Table(rows, numbers=False)


def _size_parts(comparison: Comparison, benchmarks: Sequence[Benchmark]) -> list[Part]:
    loads = list(dict.fromkeys(load for one in benchmarks for load in one.tokens_per_second))
    header = ["", "weights", "bits a weight", "evaluated tokens/s"]
    if benchmarks:
        header += ["peak memory", *(f"{load}, tokens/s" for load in loads)]
    timed = {one.subject: one for one in benchmarks}
    rows = [header]
    for subject in comparison.subjects:
        size, bits = stored_bytes(comparison, subject), stored_bits(comparison, subject)
        speed, bench = speed_of(comparison, subject), timed.get(subject.name)
        row = [_label(subject)]
        row += ["" if size is None else f"{size / 1e6:,.1f} MB", "" if bits is None else f"{bits:.2f}"]
        row += ["" if speed is None else f"{speed:,.0f}"]
        if benchmarks:
            peak = None if bench is None else bench.peak_bytes
            speeds = {} if bench is None else bench.tokens_per_second
            row += ["" if peak is None else f"{peak / 1e6:,.0f} MB"]
            row += [f"{speeds[load]:,.0f}" if load in speeds else "" for load in loads]
        rows.append(row)
    text = (
        "Weights as stored, the embedding and the head included; bits a weight are those bytes over the"
        " number of the original's weights. Evaluated tokens/s: the speed of the perplexity's windows, each"
        " run as one prompt; the median of this comparison's batches."
    )
    if benchmarks:
        ran = ", ".join(dict.fromkeys(f"{one.engine} on {one.device}" for one in benchmarks))
        text += (
            f" BATCHxCONTEXT, tokens/s: new tokens of all requests, and peak memory: of `rrsq bench` ({ran})."
        )
    return [Table(rows), Text(text)]


def _making(comparison: Comparison, plan: ComparisonPlan) -> list[Part]:
    rows = [["recipe", "size of weights", "time", "rounded to nearest for want of GPTQ"]]
    for name, report in comparison.quantizations.items():
        if not report:
            rows.append([name, "", "", ""])
            continue
        size = f"{report['bytes_before'] / 1e6:.1f} → {report['bytes_after'] / 1e6:.1f} MB"
        rows.append([name, size, f"{report['seconds']:.0f} s", ", ".join(report["fallbacks"]) or "none"])
    parts: list[Part] = [Table(rows)]
    calibration = comparison.calibration
    if calibration is not None:
        begun = ", the first of them BOS," if calibration.bos_each_window else ""
        parts.append(
            Text(
                f"Calibrated on {calibration.num_samples} windows of {calibration.sequence_length}"
                f" tokens{begun} of {calibration.source}, the same for every recipe that needs them; seed"
                f" {plan.seed}."
            )
        )
    return parts


def _running(comparison: Comparison, command: str) -> list[Part]:
    report = comparison.report
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    first = report.models[0]
    return [Text(f"Measured on {first.device} in {first.dtype}, with {versions}."), Code(command)]
