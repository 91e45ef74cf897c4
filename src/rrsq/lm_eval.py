"""lm-eval's own command line for rrsq's checkpoints: ``python -m rrsq.lm_eval`` takes what ``lm_eval`` does.

lm-eval loads a model through transformers, which knows the format only once rrsq is imported, and lm-eval has
no place to name modules to import. This imports rrsq, then runs lm-eval::

    python -m rrsq.lm_eval run --model hf --model_args pretrained=out/ --tasks arc_easy
    accelerate launch -m rrsq.lm_eval run --model hf --model_args pretrained=out/ --tasks mmlu
"""

from __future__ import annotations

import importlib.util
import sys

import rrsq
from rrsq.evaluation.harness.names import INSTALL_HINT

__all__ = ["main"]


def main() -> None:
    """Run lm-eval's command line on ``sys.argv``. Exits with 2 if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        print(f"Error: lm-eval is not installed. {INSTALL_HINT}", file=sys.stderr)
        sys.exit(2)
    from lm_eval.__main__ import cli_evaluate

    rrsq.register()
    cli_evaluate()


if __name__ == "__main__":
    main()
