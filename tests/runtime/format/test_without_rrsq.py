"""A checkpoint where rrsq is not imported: a loader that does not know the format must stop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_LOAD = (
    "import sys, transformers\n"
    "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
    "print('loaded', 'rrsq' in sys.modules)"
)


def load(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # A command that another test ran in this process has silenced transformers for its children too.
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )


def test_transformers_alone_stops(qwen2_checkpoint: Path) -> None:
    done = load(_LOAD, qwen2_checkpoint)
    assert done.returncode != 0
    assert "loaded" not in done.stdout
    assert "mismatch" in done.stderr
    assert "q_proj.weight" in done.stderr


def test_with_the_import_it_loads(qwen2_checkpoint: Path) -> None:
    done = load(f"import rrsq\n{_LOAD}", qwen2_checkpoint)
    assert done.stdout.strip() == "loaded True", done.stderr


def test_lm_eval_alone_stops(qwen2_checkpoint: Path) -> None:
    code = "import sys\nfrom lm_eval.models.huggingface import HFLM\nHFLM(sys.argv[1])\nprint('loaded')"
    done = load(code, qwen2_checkpoint)
    assert done.returncode != 0
    assert "loaded" not in done.stdout
    assert "got rrsq" in done.stderr
