"""Serving checkpoints with vLLM (https://docs.vllm.ai): the plugin that teaches it the format.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` in each of its processes, so that
``vllm serve out/`` and ``LLM("out/")`` need neither ``import rrsq`` nor ``--quantization``. Importing this
package does not import vLLM, nor do :mod:`.limits`, which says what can be served, and :mod:`.places`; the
other modules do.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Make vLLM know the quantization method and the models it is served by; may be called again."""
    from .config import register_quantization
    from .models import register_models

    register_quantization()
    register_models()
