"""Serving checkpoints with vLLM (https://docs.vllm.ai): the plugin that teaches it the format.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` in each of its processes, so that
``vllm serve out/`` and ``LLM("out/")`` need neither ``import rrsq`` nor ``--quantization``. Importing this
package does not import vLLM, nor do :mod:`.limits`, which says what can be served, and :mod:`.places`; the
other modules do.
"""

from __future__ import annotations

import warnings

__all__ = ["register"]


def register() -> None:
    """Make vLLM know the quantization method and the models it is served by; may be called again.

    vLLM calls it whatever model it serves: with a release that the plugin does not fit, it only warns.
    """
    try:
        from .cache import register_cache
        from .config import register_quantization
        from .models import register_models
    except ImportError as error:
        from importlib.metadata import version

        warnings.warn(
            f"The plugin of rrsq does not fit vLLM {version('vllm')} ({error}): its checkpoints cannot be"
            " served. pip install 'rrsq[vllm]' installs a release that it fits.",
            stacklevel=2,
        )
        return
    register_cache()
    register_quantization()
    register_models()
