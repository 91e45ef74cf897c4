"""Short names of tasks, and where lm-eval keeps those tasks. Importing this imports nothing."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["INSTALL_HINT", "SHORT_NAMES", "KnownTask", "known_task"]

INSTALL_HINT = "Install it with 'pip install \"rrsq[eval]\"'."


@dataclass(frozen=True)
class KnownTask:
    """A task that need not be searched for among lm-eval's thousands, which takes seconds."""

    name: str
    """lm-eval's name."""
    folder: str
    """Folder of its YAML file below ``lm_eval/tasks``."""


SHORT_NAMES = {
    "arc_e": KnownTask("arc_easy", "arc"),
    "arc_c": KnownTask("arc_challenge", "arc"),
    "boolq": KnownTask("boolq", "super_glue/boolq"),
    "obqa": KnownTask("openbookqa", "openbookqa"),
    "piqa": KnownTask("piqa", "piqa"),
    "winogrande": KnownTask("winogrande", "winogrande"),
    "hellaswag": KnownTask("hellaswag", "hellaswag"),
    "lambada": KnownTask("lambada_openai", "lambada"),
    "mmlu": KnownTask("mmlu", "mmlu/default"),
}
"""What the tables of quantization papers report. They come before lm-eval's own names."""


def known_task(name: str) -> KnownTask | None:
    """The task of a short name, of the lm-eval name behind one, or a part of mmlu; None for any other."""
    by_full_name = {task.name: task for task in SHORT_NAMES.values()}
    part = KnownTask(name, SHORT_NAMES["mmlu"].folder) if name.startswith("mmlu_") else None
    return SHORT_NAMES.get(name) or by_full_name.get(name) or part
