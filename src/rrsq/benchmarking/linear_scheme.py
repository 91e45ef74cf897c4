"""How a recipe quantizes the linears that are timed."""

from __future__ import annotations

from dataclasses import dataclass

from rrsq.errors import UsageError
from rrsq.recipe import Recipe
from rrsq.runtime.scheme import group_size_for

__all__ = ["LinearScheme"]


@dataclass(frozen=True)
class LinearScheme:
    """What of a recipe decides the work of a linear: INT4 weights and integer activations.

    Attributes:
        weight_group_size: channels that an integer multiplier of the weight covers; None: none has one.
        bits: of an activation, 4 or 8.
        group_size: channels that an integer multiplier of the activations covers; None: none has one.
        clip: fraction of the largest magnitude that the largest code stands for.
        block: channels that are rotated together while every input is quantized, to signed levels where it
            has groups; None: levels are not signed, and what is rotated is rotated as a whole.
    """

    weight_group_size: int | None
    bits: int
    group_size: int | None
    clip: float
    block: int | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> LinearScheme:
        """That of a recipe, leaving out its overrides.

        Raises:
            UsageError: its linears are not an integer product with integer scales.
        """
        activations, smoothing = recipe.activations, recipe.activations.smoothing
        reason = None
        if recipe.weights.bits != 4 or activations.bits == 16:
            reason = "its activations stay in 16 bits"
        elif smoothing is not None and smoothing.scales != "integer":
            reason = "its group scales are real numbers, which the row 'rrsq-float-scales' of others times"
        if reason is not None:
            raise UsageError(
                f"Linears of recipe '{recipe.name}' cannot be timed alone: {reason}. Time whole models with"
                " --whole, or a recipe such as rrs-w4a4kv4."
            )
        group_size = None if smoothing is None else smoothing.group_size
        blocks = None if recipe.rotation is None else recipe.rotation.blocks
        block = (blocks or 1) if activations.signed else blocks
        return cls(recipe.weights.group_size, activations.bits, group_size, activations.clip, block)

    def for_channels(self, channels: int) -> LinearScheme:
        """The scheme with group sizes that divide a number of input channels."""
        sizes = self.weight_group_size, self.group_size, self.block
        weight, own, block = (group_size_for(size, channels) for size in sizes)
        return LinearScheme(weight, self.bits, own, self.clip, block)

    @property
    def weight_bits(self) -> float:
        """Bits a weight takes, its share of a multiplier included."""
        return 4 + (0 if self.weight_group_size is None else 8 / self.weight_group_size)

    def __str__(self) -> str:
        """In words, for a line below a table."""
        weights, activations = (
            "one scale a row" if self.weight_group_size is None else f"groups of {self.weight_group_size}",
            "one scale a token" if self.group_size is None else f"groups of {self.group_size}",
        )
        if self.block is not None:
            signed = "" if self.group_size is None else "signed "
            activations = f"{signed}{activations}, rotated in blocks of {self.block}"
        return f"4-bit weights ({weights}), {self.bits}-bit activations ({activations})"
