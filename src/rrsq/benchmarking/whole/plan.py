"""From what was asked for to the contenders' jobs, with everything checked that needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrsq.errors import UsageError, did_you_mean
from rrsq.recipe import Recipe
from rrsq.runtime.format.format import parse_info
from rrsq.runtime.format.json_files import read_config
from rrsq.runtime.format.loading import is_checkpoint, load_config, locate_model
from rrsq.runtime.format.validate import check_description, check_layers

from .contenders import BASE, CONTENDERS, OURS
from .descriptions import describe, public_config
from .loads import Load
from .process import Job

__all__ = ["Subject", "Workload", "jobs", "open_checkpoint", "random_model"]


@dataclass(frozen=True)
class Subject:
    """What is timed.

    Attributes:
        name: as it was asked for.
        recipe: name of its recipe.
        folder: of the checkpoint; None: the weights are random.
        description: its ``config.json``.
        config: the same as transformers holds it.
    """

    name: str
    recipe: str
    folder: str | None
    description: Mapping[str, Any]
    config: Any

    @property
    def context(self) -> int | None:
        """The longest text that the model takes; None if it does not say."""
        found = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return None if found is None else int(found)


@dataclass(frozen=True)
class Workload:
    """What is asked of each contender; see :class:`~.process.Job`."""

    loads: tuple[Load, ...]
    new_tokens: int
    repeats: int


def open_checkpoint(path: str) -> Subject:
    """A checkpoint's folder; only headers are read.

    Raises:
        ModelLoadError: there is no such folder.
        UsageError: it is none of a checkpoint.
        CheckpointError: it is damaged, incomplete, or of another format version.
    """
    folder, _ = locate_model(path)
    if not is_checkpoint(folder):
        raise UsageError(
            f"--model {path}: with --whole it is the folder of a checkpoint of 'rrsq quantize'. Random"
            " weights of a public model's shape are timed with --shape, for example --shape llama-3-8b."
        )
    description = read_config(Path(folder))
    info = parse_info(description["quantization_config"])
    config = load_config(folder)
    check_description(config, info)
    check_layers(Path(folder), config.get_text_config().num_hidden_layers)
    return Subject(path, info.recipe.name, folder, description, config)


def random_model(name: str, recipe: Recipe, layers: int | None = None) -> Subject:
    """What a recipe makes of a public model's shape, with random codes; :func:`public_config` raises."""
    config = public_config(name, layers)
    label = name if layers is None else f"{name}, {layers} layers"
    return Subject(label, recipe.name, None, describe(config, recipe), config)


def jobs(
    subject: Subject,
    engine: str,
    against: Sequence[str],
    workload: Workload,
    options: Mapping[str, Any],
) -> list[Job]:
    """The contenders in the order in which they run: what ratios are taken to first, the checkpoint last.

    Args:
        subject: the checkpoint.
        engine: ``vllm`` or ``transformers``.
        against: names in :data:`CONTENDERS`.
        workload: what to time.
        options: of the engine, for all of them.

    Raises:
        UsageError: an engine has no such contender, or a load exceeds the model's context.
    """
    known = CONTENDERS[engine]
    for name in against:
        if name not in known:
            where = ", ".join(other for other, names in CONTENDERS.items() if name in names)
            raise UsageError(
                f"--against {name:.50}: with --engine {engine} there are {', '.join(known)}."
                + (f" It is one of {where}." if where else did_you_mean(name, known))
            )
    longest = max(load.context for load in workload.loads) + workload.new_tokens
    if subject.context is not None and longest > subject.context:
        raise UsageError(
            f"Prompts of {longest - workload.new_tokens} tokens and {workload.new_tokens} new ones exceed the"
            f" model's context of {subject.context}: give a smaller --context or fewer --new-tokens."
        )
    plain = {key: value for key, value in subject.description.items() if key != "quantization_config"}
    plain = {**plain, "dtype": "bfloat16"}
    plain.pop("torch_dtype", None)
    made = []
    for name in sorted(dict.fromkeys(against), key=lambda name: name != BASE):
        contender = known[name]
        section = {} if contender.section is None else {"quantization_config": dict(contender.section)}
        made.append(
            _job(name, engine, None, {**plain, **section}, {**options, **contender.options}, workload)
        )
    ours = None if subject.folder else subject.description
    return [*made, _job(OURS, engine, subject.folder, ours, options, workload)]


def _job(
    name: str,
    engine: str,
    folder: str | None,
    description: Mapping[str, Any] | None,
    options: Mapping[str, Any],
    workload: Workload,
) -> Job:
    return Job(
        name, engine, folder, description, options, workload.loads, workload.new_tokens, workload.repeats
    )
