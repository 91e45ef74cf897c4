"""The results of an evaluation in a checkpoint's model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rrsq.errors import UsageError
from rrsq.evaluation.scores import EvaluationReport, ModelReport, recovery_text, value_text, write_text
from rrsq.runtime.format.loading import locate_model, read_info

__all__ = ["check_cards", "update_cards"]

CARD = "README.md"
BEGIN = "<!-- Results of `rrsq eval --update-card`: what stands here is replaced. -->"
END = "<!-- End of the results. -->"


def check_cards(folders: Sequence[str], models: Sequence[str]) -> None:
    """Refuse cards that could not be updated, before anything is measured.

    Args:
        folders: of checkpoints, whose cards are to be updated.
        models: that are measured.

    Raises:
        UsageError: one is not measured, or its card is not as it must be.
        ModelLoadError, CheckpointError: one is no checkpoint of rrsq's.
    """
    for folder in folders:
        if _place(folder) not in [_place(model) for model in models]:
            raise UsageError(f"--update-card {folder}: name it among the models too: rrsq eval ... {folder}")
        read_info(_place(folder))
        _parts(_place(folder) / CARD)


def update_cards(folders: Sequence[str], report: EvaluationReport) -> list[Path]:
    """Write what was measured into the cards of checkpoints, in the place of earlier results.

    Args:
        folders: of checkpoints that are in the report.
        report: of all models.

    Returns:
        The cards.

    Raises:
        UsageError: a card is not as it must be.
        StorageError: a card cannot be written.
    """
    written = []
    for folder in folders:
        model = next(model for model in report.models if _place(model.model) == _place(folder))
        card = _place(folder) / CARD
        before, after = _parts(card)
        write_text(card, "\n\n".join([before, results_section(model, report), after]).rstrip() + "\n")
        written.append(card)
    return written


def results_section(model: ModelReport, report: EvaluationReport) -> str:
    """Markdown of one model's numbers, beside the reference's, between the markers."""
    reference = report.reference
    compared = reference is not None and reference is not model
    rows = [["task", "metric", "value", *(["full precision", "recovery"] if compared else [])]]
    for task in report.tasks():
        for one in report.compare(model, task):
            row = [task, one.metric.name, value_text(one.metric)]
            if compared and reference is not None:
                result = reference.result(task)
                other = None if result is None else result.metric(one.metric.name)
                row += ["" if other is None else value_text(other), recovery_text(one)]
            rows.append(row)
    header, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [BEGIN, "## Results", ""]
    lines += [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body)]
    lines.append("")
    if compared and reference is not None:
        name = reference.model.rstrip("/").rsplit("/", 1)[-1]
        lines += [
            f"Full precision is {name}. Recovery: accuracy over its accuracy (100 % is nothing lost), or"
            " perplexity over its perplexity (×1 is nothing lost).",
            "",
        ]
    lines += [f"- **{result.task}**: {result.convention}" for result in model.results]
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    return "\n".join([*lines, "", f"Measured on {model.device} in {model.dtype}, with {versions}.", END])


def _place(path: str) -> Path:
    return Path(locate_model(path)[0]).resolve()


def _parts(card: Path) -> tuple[str, str]:
    """What stands before and behind the results; they come last in a card without any.

    Raises:
        UsageError: there is no card, or its markers do not belong together.
    """
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--update-card: '{card}' cannot be read. A checkpoint has its model card there."
        ) from error
    counts = text.count(BEGIN), text.count(END)
    if counts == (0, 0):
        return text.rstrip(), ""
    if counts != (1, 1) or text.index(END) < text.index(BEGIN):
        raise UsageError(
            f"--update-card: the markers of the results in '{card}' ('{BEGIN}', '{END}') must stand there"
            " once, in this order. Mend them, or take them out with what is between them."
        )
    before, rest = text.split(BEGIN)
    return before.rstrip(), rest.split(END)[1].strip()
