"""LoRA (arXiv 2106.09685) beside quantized linears, by PEFT: its ``LoraConfig`` takes them as linears.

Importing this module registers them; ``import rrsq`` sees to that (``rrsq/_register.py``).
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from peft.tuners.lora import Linear, LoraConfig

from ..errors import UsageError
from .modules.linear import QuantizedLinear

__all__ = ["LoraQuantizedLinear"]

_INITIALIZATIONS = ("gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that do without the weight, beside True and False."""
_VARIANTS = ((), ("alora_invocation_tokens",))
"""Those of PEFT's variants that do without the weight: plain LoRA, and aLoRA."""


class LoraQuantizedLinear(Linear):
    """A frozen :class:`~.modules.linear.QuantizedLinear` with low-rank products added to its output."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """By PEFT's name, those that do without the weight."""
        return {key: kind for key, kind in super().lora_variants.items() if key in _VARIANTS}

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        # PEFT's own warns of a layer that it does not know.
        return module.in_features, module.out_features

    def update_layer(self, *args: Any, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            UsageError: it needs the weight in floating point.
        """
        initialization = config.init_lora_weights
        if config.use_dora or not (isinstance(initialization, bool) or initialization in _INITIALIZATIONS):
            what = "DoRA" if config.use_dora else f"init_lora_weights='{initialization}'"
            raise UsageError(
                f"{what} needs the weights of the linears in floating point, and those of this model are"
                " 4-bit integers. Use plain LoRA."
            )
        super().update_layer(*args, config=config, **kwargs)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: 4-bit integers cannot take up what an adapter learned.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "An adapter cannot be merged into 4-bit integers. Keep it beside them (save_pretrained), or merge"
            " it into the full-precision model and quantize the result."
        )


def _register() -> None:
    made = LoraConfig.__post_init__

    @functools.wraps(made)
    def with_quantized_linears(self: LoraConfig) -> None:
        made(self)
        # What PEFT's developer guide ("Custom models") says to do with each configuration.
        self._register_custom_module({QuantizedLinear: LoraQuantizedLinear})

    LoraConfig.__post_init__ = with_quantized_linears


# Before 0.21 adapters are made otherwise: PEFT itself then refuses the linears.
if "config" in inspect.signature(Linear.update_layer).parameters:
    _register()
