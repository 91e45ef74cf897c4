"""The report of a comparison, as Markdown and as JSON."""

from __future__ import annotations

from typing import Any

from rrsq.bits import activation_bits, cache_bits, weight_bits
from rrsq.comparison.plan import ComparisonPlan
from rrsq.comparison.steps import Comparison
from rrsq.evaluation.results import Metric
from rrsq.evaluation.scores import Difference, ModelReport, recovery_text, value_text

__all__ = ["comparison_markdown", "comparison_to_dict"]


def comparison_to_dict(comparison: Comparison, plan: ComparisonPlan, command: str) -> dict[str, Any]:
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
    }


def comparison_markdown(comparison: Comparison, plan: ComparisonPlan, command: str) -> str:
    """The report for people."""
    report = comparison.report
    lines = [
        f"# {plan.model}: {len(comparison.recipes)} recipes compared",
        "",
        *_headline_table(comparison),
        "",
        "In brackets what is left of the full-precision model's accuracy (100 % is nothing lost), or by how"
        " much its perplexity grew (×1 is nothing lost). Bits count scales and multipliers, of a linear with"
        " 4096 inputs.",
        "",
        "## All numbers",
        "",
        *_full_table(comparison),
        "",
        "## How they are computed",
        "",
    ]
    conventions = {result.task: result.convention for model in report.models for result in model.results}
    lines += [f"- **{task}**: {text}" for task, text in conventions.items()]
    lines += ["", "## How the checkpoints were made", "", *_quantization_table(comparison)]
    calibration = comparison.calibration
    if calibration is not None:
        lines += [
            "",
            f"Calibrated on {calibration.num_samples} windows of {calibration.sequence_length} tokens"
            f"{', the first of them BOS,' if calibration.bos_each_window else ''} of "
            f"{calibration.source}, the same for every recipe that needs them; seed {plan.seed}.",
        ]
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    first = report.models[0]
    lines += ["", f"Measured on {first.device} in {first.dtype}, with {versions}.", ""]
    lines += ["```bash", command, "```"]
    return "\n".join(lines) + "\n"


def _headline_table(comparison: Comparison) -> list[str]:
    """A row a model, a column a task."""
    report = comparison.report
    tasks = report.tasks()
    headlines = {task: _headline(report.models, task) for task in tasks}
    names = [
        f"{task}, {metric.name} {'↑' if metric.higher_is_better else '↓'}"
        for task, metric in headlines.items()
    ]
    rows = [["", "weights, activations, cache", *names]]
    for model in report.models:
        recipe = comparison.recipes.get(model.model)
        bits = "16, 16, 16"
        if recipe is not None:
            bits = f"{weight_bits(recipe):.2f}, {activation_bits(recipe)}, {cache_bits(recipe):.2f}"
        cells = [_headline_cell(report.compare(model, task), is_reference=recipe is None) for task in tasks]
        rows.append([f"`{model.model}`" if recipe is not None else "full precision", bits, *cells])
    return _table(rows)


def _headline(models: tuple[ModelReport, ...], task: str) -> Metric:
    return next(result.headline for model in models if (result := model.result(task)) is not None)


def _headline_cell(differences: list[Difference], *, is_reference: bool) -> str:
    if not differences:
        return ""
    one = differences[0]
    recovery = "" if is_reference else recovery_text(one)
    return value_text(one.metric) + (f" ({recovery})" if recovery else "")


def _full_table(comparison: Comparison) -> list[str]:
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
    return _table(rows)


def _quantization_table(comparison: Comparison) -> list[str]:
    rows = [["recipe", "size of weights", "time", "rounded to nearest for want of GPTQ"]]
    for name, report in comparison.quantizations.items():
        if not report:
            rows.append([name, "", "", ""])
            continue
        size = f"{report['bytes_before'] / 1e6:.1f} → {report['bytes_after'] / 1e6:.1f} MB"
        rows.append([name, size, f"{report['seconds']:.0f} s", ", ".join(report["fallbacks"]) or "none"])
    return _table(rows)


def _table(rows: list[list[str]]) -> list[str]:
    header, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *body]]
