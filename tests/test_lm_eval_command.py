"""A checkpoint in lm-eval's own command line gives the numbers that rrsq gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lm_eval.tasks import __file__ as lm_eval_tasks

from rrsq.evaluation.run import evaluate_models
from rrsq.evaluation.tasks import TaskOptions, parse_tasks
from tiny_quantized import quantize_tiny, recipe_of, save_tiny

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_checkpoint_in_lm_evals_command_line(
    tiny_llama_dir: Path, tiny_task_hub: Path, tmp_path: Path
) -> None:
    checkpoint = save_tiny(
        quantize_tiny(tiny_llama_dir, recipe_of("rrs-w4a4kv4")), tiny_llama_dir, tmp_path / "out"
    )
    task = {
        "include": str(Path(lm_eval_tasks).parent / "arc" / "arc_easy.yaml"),
        "task": "local_arc_easy",
        "tag": None,
        "dataset_path": str(tiny_task_hub / "allenai" / "ai2_arc"),
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(yaml.safe_dump(task))
    result = tmp_path / "result.json"
    command = [
        sys.executable, "-m", "rrsq.lm_eval", "run", "--model", "hf",
        "--model_args", f"pretrained={checkpoint},dtype=float32", "--tasks", "local_arc_easy",
        "--include_path", str(tmp_path / "tasks"), "--device", "cpu", "--output_path", str(result),
    ]  # fmt: skip
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("result*.json")
    theirs = json.loads(file.read_text())["results"]["local_arc_easy"]

    tasks = parse_tasks("arc_e")
    options = TaskOptions(data_root=tiny_task_hub)
    tasks[0].prepare(options)
    (report,) = evaluate_models([str(checkpoint)], tasks, options, device="cpu", dtype="float32")
    for metric in report.results[0].metrics:
        assert metric.value == theirs[f"{metric.name},none"]
        assert metric.stderr == pytest.approx(theirs[f"{metric.name}_stderr,none"])


def test_without_lm_eval_it_says_how_to_install_it() -> None:
    code = (
        "import importlib.util as util, runpy\n"
        "found = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'lm_eval' else found(name, *rest)\n"
        "runpy.run_module('rrsq.lm_eval', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("Error: lm-eval is not installed.")
    assert "Traceback" not in done.stderr
