"""Running a checkpoint needs nothing of what made it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOMS = (
    "quantizer",
    "diagnostics",
    "comparison",
    "evaluation",
    "benchmarking",
    "exporting",
    "doctor",
    "work_folder",
)
WAYS = {
    "from_pretrained": "import rrsq\n"
    "from transformers import AutoModelForCausalLM\n"
    "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])",
    "rrsq.load": "import rrsq\nmodel = rrsq.load(sys.argv[1])",
    "rrsq generate": "from rrsq.cli.app import app\n"
    "app(['generate', sys.argv[1], 'The river', '--max-new-tokens', '2'], standalone_mode=False)",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_runs_without_the_quantizer(way: str, qwen2_checkpoint: Path) -> None:
    code = f"import json, sys\n{WAYS[way]}\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(qwen2_checkpoint)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    modules = json.loads(done.stdout.splitlines()[-1])
    ours = [name.removeprefix("rrsq.") for name in modules if name.startswith("rrsq.")]
    assert "runtime.format.integration" in ours
    assert [name for name in ours if name.split(".")[0] in ROOMS] == []
