"""Two processes that share the calibration text, on the CPU, against one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from forked import exit_codes, torchrun_environments
from killed_run import produce, started
from rrsq.errors import UsageError
from rrsq.quantizer.calibration.workers import Workers
from rrsq.work_folder import work_path
from tiny_families import tiny_model


def two_processes(model: Path, out: Path) -> list[int | None]:
    """Exit codes of two processes that make one checkpoint, as torchrun would start them."""
    environments = torchrun_environments(2)
    processes = [started(model, out, each, wait=False, windows=9) for each in environments]
    return exit_codes(processes, seconds=120)


@pytest.fixture(params=["llama", "mixtral"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a dense model, or of a mixture of experts."""
    if request.param == "llama":
        return request.getfixturevalue("tiny_llama_dir")
    tiny_model(request.param).save_pretrained(tmp_path / "source")
    request.getfixturevalue("tiny_tokenizer").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.timeout(150)
def test_two_processes_make_what_one_makes(source: Path, tmp_path: Path) -> None:
    """Their sums are in another order, so that a code may fall on the other side of a tie."""
    assert two_processes(source, tmp_path / "two") == [0, 0]
    assert not work_path(tmp_path / "two").exists()
    produce(source, tmp_path / "one", windows=9)
    one, two = (
        {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one.keys() == two.keys()
    different = total = 0
    for name, tensor in one.items():
        if name.endswith("weight_packed") and ".layers.0." in name:
            different += int((tensor != two[name]).sum())
            total += tensor.numel()
    assert different < 0.01 * total
    for name in ("keys", "values"):
        path = f"model.layers.0.self_attn.kv_quantizer.{name}.offset"
        if path in one:
            torch.testing.assert_close(two[path], one[path], rtol=1e-5, atol=1e-5)
    snr = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["layer_snr_db"]
        for name in ("one", "two")
    ]
    assert snr[0] == pytest.approx(snr[1], abs=0.5)


def test_each_gets_a_run_of_the_windows() -> None:
    windows = torch.arange(14).view(7, 2)
    parts = [Workers(rank, 3).part(windows) for rank in range(3)]
    assert torch.equal(torch.cat(parts), windows)
    assert [len(part) for part in parts] == [3, 2, 2]
    with pytest.raises(UsageError, match="8 processes cannot share 7"):
        Workers(0, 8).part(windows)
