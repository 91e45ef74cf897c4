"""What timing whole models gives: tables and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from .contenders import BASE, OURS
from .loads import Load, Measurement
from .process import Outcome

__all__ = ["WholeReport", "tables"]

Kind = Literal["decode", "prefill"]


@dataclass(frozen=True)
class WholeReport:
    """All contenders of a run.

    Attributes:
        model: the checkpoint, or the shape.
        recipe: its recipe's name.
        engine: ``vllm`` or ``transformers``.
        command: that was run.
        new_tokens, repeats: of each load.
        loads: in order.
        outcomes: in the order in which they ran.
        versions: of libraries.
    """

    model: str
    recipe: str
    engine: str
    command: str
    new_tokens: int
    repeats: int
    loads: tuple[Load, ...]
    outcomes: tuple[Outcome, ...]
    versions: Mapping[str, str]

    def ratio(self, name: str, load: Load, kind: Kind) -> float | None:
        """Times faster than bf16 in the same run; None where one of the two is missing."""
        pair = [self._measurement(each, load) for each in (BASE, name)]
        if pair[0] is None or pair[1] is None:
            return None
        base, own = (float(getattr(each, kind)) for each in pair)
        return base / own if own > 0 else None

    def _measurement(self, name: str, load: Load) -> Measurement | None:
        found = [outcome for outcome in self.outcomes if outcome.name == name]
        return found[0].measurement(load) if found else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        document = asdict(self)
        for outcome in document["outcomes"]:
            for one in outcome["measurements"]:
                load, measured = Load(one["batch"], one["context"]), Measurement(**one)
                one["tokens_per_second"] = measured.tokens_per_second
                one["prompt_tokens_per_second"] = measured.prompt_tokens_per_second
                one["decode_ratio"] = self.ratio(outcome["name"], load, "decode")
                one["prefill_ratio"] = self.ratio(outcome["name"], load, "prefill")
        return document


def tables(report: WholeReport) -> list[Table]:
    """One of what each contender took, one of the times."""
    return [_summary(report.outcomes), _times(report)]


def _summary(outcomes: Sequence[Outcome]) -> Table:
    table = Table(title="memory", title_justify="left", title_style="bold")
    table.add_column("")
    for heading in ("weights", "peak", "KV cache, tokens", "start, s"):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        if not outcome.device:
            table.add_row(outcome.name, "did not run", style="dim")
            continue
        table.add_row(
            outcome.name,
            decimal(outcome.weight_bytes),
            "" if outcome.peak_bytes is None else decimal(outcome.peak_bytes),
            "" if outcome.cache_tokens is None else str(outcome.cache_tokens),
            f"{outcome.start_seconds:.0f}",
            style="bold" if outcome.name == OURS else None,
        )
    return table


def _times(report: WholeReport) -> Table:
    table = Table(title="batch x context", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("")
    for heading in ("step, ms", f"x {BASE}", "tokens/s", "prefill, ms", f"x {BASE}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for load in report.loads:
        for index, outcome in enumerate(report.outcomes):
            label = str(load) if index == 0 else ""
            measured = outcome.measurement(load)
            if measured is None:
                table.add_row(label, escape(outcome.name), "-", style="dim")
                continue
            ratios = [report.ratio(outcome.name, load, kind) for kind in ("decode", "prefill")]
            decode, prefill = ("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
            table.add_row(
                label,
                outcome.name,
                f"{measured.decode:.3f}",
                decode,
                f"{measured.tokens_per_second:.0f}",
                f"{measured.prefill:.1f}",
                prefill,
                style="bold" if outcome.name == OURS else None,
            )
        table.add_section()
    return table
