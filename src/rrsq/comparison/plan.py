"""What a comparison is to do, as data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rrsq.comparison.folder import FULL_PRECISION
from rrsq.comparison.subjects import CacheChoice
from rrsq.errors import UsageError
from rrsq.evaluation.tasks import Task, TaskOptions
from rrsq.quantizer.production.produce import CalibrationText
from rrsq.recipe import Recipe, load_recipe

__all__ = ["ComparisonPlan", "read_recipes"]


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison."""

    model: str
    """Hub id, Hugging Face folder or ``.gguf`` file."""
    folder: Path
    """Where steps and the report are kept."""
    recipes: dict[str, Recipe]
    """By the name of their folder."""
    tasks: Sequence[Task]
    options: TaskOptions
    calibration: CalibrationText
    caches: tuple[CacheChoice, ...] = ("own",)
    """The KV caches to measure each recipe with."""
    noise_floor: bool = True
    """Whether the full-precision model is measured in another rounding too."""
    device: str = "cpu"
    dtype: str = "auto"

    @property
    def seed(self) -> int:
        """Of the rotations' signs, as of the calibration windows."""
        return self.calibration.seed


def read_recipes(names: Sequence[str]) -> dict[str, Recipe]:
    """Load recipes by name or path.

    Raises:
        RecipeError: one does not exist or is not valid.
        UsageError: none was named, or two would go by the same name.
    """
    recipes: dict[str, Recipe] = {}
    for name in names:
        recipe = load_recipe(name)
        folder = re.sub(r"[^\w.-]+", "-", recipe.name).strip(".-")
        if folder in recipes or folder == FULL_PRECISION or not folder:
            raise UsageError(
                f"Recipe '{name}' goes by the name '{recipe.name}', which is taken. Give each recipe a name"
                " of its own ('name:' in its YAML file)."
            )
        recipes[folder] = recipe
    if not recipes:
        raise UsageError("No recipe was named. Example: --recipes rrs-w4a4kv4,quarot-w4a4kv4")
    return recipes
