"""The steps of ``--target-bits``: measure a model once, keep what was measured, allocate."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from ...errors import UsageError
from ...models import family_for
from ...recipe import Recipe
from ...runtime.format.loading import load_config
from ...storage import library_versions, storage_errors, write_whole
from ...work_folder import changed, work_path
from ..calibration.fingerprint import config_fingerprint
from ..production.produce import Calibration, StepCallback
from ..production.source import NoteCallback, empty_model, open_model
from .choices import ModelChoices, model_choices
from .plan import Allocation, Budget, allocated_recipe, check_budget
from .sensitivity import Losses, measure_losses

__all__ = ["SENSITIVITY_TOKENS", "allocate_bits", "check_possible", "foreseen_allocation", "kept_losses"]

SENSITIVITY_TOKENS = 4096
"""Of the calibration text: so many tokens, in whole windows, are measured on."""
_MAX_BYTES = 2**26


class _File(BaseModel):
    """What a file of sensitivities holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    identity: dict[str, Any]
    losses: Losses


def kept_losses(out: Path) -> Path:
    """Where what was measured stays until the output is whole, if the user names no file for it."""
    return work_path(out).with_suffix(".sensitivities.json")


def check_possible(model: str, recipe: Recipe, budget: Budget, data_root: Path | None = None) -> None:
    """Refuse a budget from a model's configuration alone, before anything is read or fetched.

    Raises:
        RecipeError: the model has experts, or the recipe quantizes nothing.
        UsageError: the budget is below the least or above the most that is possible.
    """
    _, choices = _from_configuration(model, recipe, data_root)
    check_budget(budget, choices, recipe)


def _from_configuration(model: str, recipe: Recipe, data_root: Path | None) -> tuple[Any, ModelChoices]:
    config = load_config(model, data_root)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    empty = empty_model(config, dtype)
    return empty, model_choices(empty, family_for(config), recipe, dtype)


def foreseen_allocation(
    model: str, recipe: Recipe, budget: Budget, file: Path, data_root: Path | None = None
) -> Allocation | None:
    """The allocation by a file of sensitivities; of the model only the configuration is read.

    Returns:
        None where there is no such file yet.

    Raises:
        UsageError: it is damaged, or of another recipe or model.
    """
    empty, choices = _from_configuration(model, recipe, data_root)
    check_budget(budget, choices, recipe)
    kept = _read(file)
    if kept is None:
        return None
    fingerprint = kept.identity.get("the model")
    then = {
        "the recipe": kept.identity.get("the recipe"),
        "the model": fingerprint.get("config") if isinstance(fingerprint, dict) else None,
    }
    now = {"the recipe": _recipe_identity(recipe), "the model": config_fingerprint(empty.config)}
    _refuse_other(file, changed(then, now))
    _check_fit(file, choices, kept.losses)
    return allocated_recipe(recipe, family_for(empty.config), choices, kept.losses, budget)


def allocate_bits(
    model: str,
    recipe: Recipe,
    budget: Budget,
    calibration: Calibration,
    file: Path,
    *,
    named: bool,
    seed: int = 0,
    device: str = "cpu",
    data_root: Path | None = None,
    on_step: StepCallback = lambda done, total, per_layer, text: None,
    on_note: NoteCallback = lambda text: None,
) -> Allocation:
    """Measure what each choice costs, unless that was done, and spend a budget.

    Args:
        model: Hub id, Hugging Face folder or ``.gguf`` file.
        recipe: that is varied.
        budget: of bits.
        calibration: with windows, of which the first ones are measured on.
        file: where the sensitivities are kept; made if it is not there.
        named: the user named that file: one of something else is not replaced.
        seed: of the rotations' signs, and of the tokens that are drawn.
        device: where layers are computed.
        data_root: folder laid out like the Hub, looked in before it.
        on_step, on_note: as :func:`rrsq.quantizer.production.produce.produce_checkpoint` takes them.

    Raises:
        NonFiniteError: a gradient is NaN or infinite.
        UsageError: the budget is impossible, or the named file is damaged or of something else.
    """
    assert calibration.windows is not None
    opened = open_model(model, data_root)
    family = family_for(opened.model.config)
    choices = model_choices(opened.model, family, recipe, opened.dtype)
    check_budget(budget, choices, recipe)
    identity = json.loads(
        json.dumps(
            {
                "the recipe": _recipe_identity(recipe),
                "the model": asdict(opened.fingerprint),
                "the calibration text": calibration.info.model_dump(mode="json"),
                "the seed": seed,
                "the kind of device": torch.device(device).type,
                "the versions of the libraries": library_versions(),
            }
        )
    )
    kept = _read(file) if named else _read_or_none(file)
    if kept is not None and named:
        _refuse_other(file, changed(kept.identity, identity))
        _check_fit(file, choices, kept.losses)
    if kept is not None and kept.identity == identity:
        losses = kept.losses
        on_note(f"Sensitivities were measured before, on {losses.tokens} tokens.")
    else:
        count = max(SENSITIVITY_TOKENS // calibration.windows.shape[1], 1)
        losses = measure_losses(
            opened.model,
            family,
            recipe,
            calibration.windows[:count],
            choices,
            opened.weights.fill,
            seed=seed,
            device=device,
            on_step=lambda done, total, text: on_step(0, 0, 0, f"sensitivities {done}/{total}, {text}"),
        )
        with storage_errors(file):
            write_whole(file, _File(identity=identity, losses=losses).model_dump_json(indent=1))
    found = allocated_recipe(recipe, family, choices, losses, budget)
    on_note(
        f"Allocated {found.bits:.4g} bits a weight of linears"
        f"{' and output head' if choices.head_bits else ''} and {found.activation_bits:.4g} an activation."
        f" Estimated divergence {found.loss:.3g} nats a token with weights rounded to nearest;"
        f" {found.loss_before:.3g} of '{recipe.name}' as it is."
    )
    return found


def _recipe_identity(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude={"name", "description"})


def _refuse_other(file: Path, names: list[str]) -> None:
    if names:
        raise UsageError(
            f"'{file}' holds sensitivities that were measured otherwise: {' and '.join(names)} changed since"
            " then. Name another file for --sensitivities, or delete this one."
        )


def _check_fit(file: Path, choices: ModelChoices, losses: Losses) -> None:
    """Refuse a file whose numbers are not those of the choices."""
    wanted = [(each.layer, each.path, len(each.weights), len(each.activations)) for each in choices.inputs]
    found = [(each.layer, each.path, len(each.weights), len(each.activations)) for each in losses.inputs]
    if found != wanted or len(losses.head) != len(choices.head_bits):
        raise UsageError(f"'{file}' cannot be read as a file of sensitivities: some are missing.")


def _read(file: Path) -> _File | None:
    """What a file holds; None where there is none."""
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError("it is too large")
        found = _File.model_validate_json(file.read_text(encoding="utf-8"))
        if found.format != 1:
            raise ValueError(f"its format is {found.format}")
        return found
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError, ValueError) as error:
        reason = "it is none" if isinstance(error, ValidationError) else str(error)
        raise UsageError(f"'{file}' cannot be read as a file of sensitivities: {reason:.200}.") from error


def _read_or_none(file: Path) -> _File | None:
    """The same of a file that is measured anew if it is damaged."""
    try:
        return _read(file)
    except UsageError:
        return None
