"""The trade in pictures: quality over size and over measured speed, a point a method."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from rrsq.comparison.benchmarks import Benchmark
from rrsq.comparison.document import Figure, Part, Text
from rrsq.comparison.scatter import Axis, Level, Point, scatter
from rrsq.comparison.sizes import speed_of, stored_bits
from rrsq.comparison.steps import Comparison
from rrsq.comparison.subjects import Subject
from rrsq.evaluation.results import Metric
from rrsq.evaluation.scores import ACCURACIES, AVERAGE

__all__ = ["pictures"]

_SHAPES = {"kv16": "square", "kv4": "triangle"}


def pictures(comparison: Comparison, benchmarks: Sequence[Benchmark] = ()) -> list[Part]:
    """Each task's headline over each measure of size and speed that is there, and what the marks mean."""
    timed = {one.subject: one for one in benchmarks}
    measures: list[tuple[Axis, Callable[[Subject], float | None]]] = [
        (Axis("bits a weight, of all that is stored"), partial(stored_bits, comparison)),
        (Axis("evaluated tokens a second"), partial(speed_of, comparison)),
    ]
    if benchmarks:
        measures.append((Axis("peak memory, GB"), partial(_peak, timed)))
    for load in dict.fromkeys(load for one in benchmarks for load in one.tokens_per_second):
        title = f"new tokens a second, batch x context {load}"
        measures.append((Axis(title), partial(_new_tokens, timed, load)))
    figures = [
        figure
        for task in _drawn_tasks(comparison)
        for axis, measure in measures
        if (figure := _figure(comparison, task, axis, measure)) is not None
    ]
    return [Text(_legend(comparison)), *figures] if figures else []


def _legend(comparison: Comparison) -> str:
    text = "A colour a recipe."
    if any(subject.cache != "own" for subject in comparison.subjects):
        text += (
            " Circles: with the recipe's own KV cache; squares: with 16-bit keys and values; triangles: with"
            " the cache of `rrs-w4a4kv4`."
        )
    text += " Bars are standard errors."
    if any(subject.is_floor for subject in comparison.subjects):
        text += " Dashed, the noise floor: the full-precision model in another rounding."
    return text


def _drawn_tasks(comparison: Comparison) -> list[str]:
    """All tasks, divergences first; of several with an accuracy only the average."""
    report = comparison.report
    tasks = report.tasks()
    results = {result.task: result.headline for model in report.models for result in model.results}
    if AVERAGE in tasks:
        tasks = [task for task in tasks if results[task].name not in ACCURACIES]
    return sorted(tasks, key=lambda task: not results[task].relative)


def _figure(
    comparison: Comparison, task: str, across: Axis, measure: Callable[[Subject], float | None]
) -> Figure | None:
    """None where fewer than two models have both numbers."""
    found: list[tuple[Subject, float, Metric]] = []
    levels: list[Level] = []
    groups = {name: index for index, name in enumerate(comparison.recipes, 1)}
    for subject, model in zip(comparison.subjects, comparison.report.models, strict=True):
        result = model.result(task)
        if result is None or not math.isfinite(result.headline.value):
            continue
        if subject.is_floor:
            levels.append(Level(result.headline.value, f"noise floor ({subject.dtype})"))
        elif (x := measure(subject)) is not None:
            found.append((subject, x, result.headline))
    if len(found) < 2:
        return None
    metric = found[0][2]
    log = not metric.higher_is_better and all(one.value > 0 for _, _, one in found)
    points = [
        Point(
            x,
            one.value,
            subject.name.replace("full-precision", "full precision"),
            groups.get(subject.recipe or "", 0),
            _SHAPES.get(subject.name.rsplit("@", 1)[-1], "circle"),
            one.stderr,
        )
        for subject, x, one in found
    ]
    if log:
        levels = [level for level in levels if level.y > 0]
    arrow = "higher is better" if metric.higher_is_better else "lower is better"
    caption = f"{task}: {metric.name} over {across.title}"
    return Figure(scatter(points, levels, across, Axis(f"{metric.name} ({arrow})", log), caption), caption)


def _peak(timed: dict[str, Benchmark], subject: Subject) -> float | None:
    one = timed.get(subject.name)
    return None if one is None or one.peak_bytes is None else one.peak_bytes / 1e9


def _new_tokens(timed: dict[str, Benchmark], load: str, subject: Subject) -> float | None:
    one = timed.get(subject.name)
    return None if one is None else one.tokens_per_second.get(load)
