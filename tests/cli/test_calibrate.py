"""``rrsq calibrate`` and ``rrsq quantize --calibration`` as a user runs them, rightly and wrongly."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cli_failures import failure
from rrsq.cli.app import app

SMALL = ["--num-samples", "4", "--sequence-length", "32"]


def rrsq(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "100"})


@pytest.fixture(scope="module", autouse=True)
def _pictures_not_drawn() -> Iterator[None]:
    """Drawing takes a second a picture, and other tests look at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rrsq.diagnostics.write.to_png", lambda figure: b"not drawn")
        yield


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_dir: Path, tiny_text_file: Path
) -> tuple[Path, str]:
    """A calibration folder and what the command printed."""
    out = tmp_path_factory.mktemp("calibrate") / "calib"
    result = rrsq("calibrate", tiny_qwen2_dir, "-o", out, "--calibration-data", tiny_text_file, *SMALL)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_sizes_are_stated_and_the_worst_are_listed(run: tuple[Path, str]) -> None:
    folder, output = run
    assert output.index("On the disk: ") < output.index("inputs that quantization hurts most")
    assert "In memory: about" in output
    data = json.loads((folder / "report.json").read_text())["inputs"]
    worst = sorted(data, key=lambda entry: -entry["output_error"])
    rows = [line.split("│")[1:-1] for line in output.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells == [
        [
            str(entry["layer"]),
            entry["input"],
            *(f"{entry['ratio'][stage]:.1f}" for stage in ("original", "rotated", "smoothed")),
            f"{entry['output_error']:.1%}",
        ]
        for entry in worst
    ]
    assert len(cells) == 8


def test_the_folder_holds_what_the_help_says(run: tuple[Path, str]) -> None:
    names = {str(path.relative_to(run[0])) for path in run[0].rglob("*") if path.is_file()}
    worst = {name for name in names if name.startswith("figures/worst-")}
    assert len(worst) == 8
    assert names - worst == {
        "calibration.json",
        "head.safetensors",
        "layer-0000.safetensors",
        "layer-0001.safetensors",
        "report.html",
        "report.json",
        *(f"figures/{name}.png" for name in ("errors", "ratios", "channels", "tokens")),
    }
    assert [path.name for path in run[0].parent.iterdir()] == ["calib"]


def test_quantize_uses_it(run: tuple[Path, str], tiny_qwen2_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = rrsq("quantize", tiny_qwen2_dir, "-o", out, "--calibration", run[0])
    assert result.exit_code == 0, result.output
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["calibration"]["stored"] is True
    assert config["calibration"]["num_samples"] == 4
    assert config["layer_snr_db"] == [None, None]
    assert "statistics of the full-precision model" in (out / "README.md").read_text()
    listing = rrsq("inspect", out, "--layers").output
    assert "down weights" in listing
    assert "output SNR (dB)" not in listing


@pytest.mark.parametrize("recipe", ["rrs-w4a4kv4", "rrs1-w4a4kv4"])
def test_quantize_is_close_to_running_the_text(
    recipe: str, run: tuple[Path, str], tiny_qwen2_dir: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    """Layer 0 behind a 16-bit embedding sees the same either way, but for rounding to bfloat16 on the way."""
    # Refinement moves scales by where codes are.
    options = ["--set", "weights.refinement=0", "--set", "embedding.bits=16"]
    words = ["quantize", tiny_qwen2_dir, "--recipe", recipe, *options]
    rrsq(*words, "-o", tmp_path / "stored", "--calibration", run[0])
    rrsq(*words, "-o", tmp_path / "direct", "--calibration-data", tiny_text_file, *SMALL)
    stored, direct = (load_file(tmp_path / name / "model.safetensors") for name in ("stored", "direct"))
    # What follows the statistics without a step: the balance, which is in the norms, and the keys' mean.
    smooth = [name for name in stored if re.search(r"layers\.0\..*(norm\.weight|weight_scale|offset)$", name)]
    assert len(smooth) == 2 + 7 + 1
    for name in smooth:
        assert float((stored[name] - direct[name]).norm() / direct[name].norm()) < 2**-8
    # A code that GPTQ rounds the other way takes others with it: of the two, one recipe has few near a tie.
    name = "model.layers.0.self_attn.q_proj.weight_packed"
    same = (stored[name] == direct[name]).float().mean()
    assert float(same) > {"rrs-w4a4kv4": 0.9, "rrs1-w4a4kv4": 0.98}[recipe]


def test_bos_is_stored(tiny_qwen2_dir: Path, tiny_text_file: Path, tmp_path: Path) -> None:
    out, arguments = tmp_path / "calib", ["--calibration-data", tiny_text_file, *SMALL, "--no-hessians"]
    assert rrsq("calibrate", tiny_qwen2_dir, "-o", out, *arguments, "--bos", "always").exit_code == 0
    assert json.loads((out / "calibration.json").read_text())["bos_each_window"] is True


@pytest.mark.parametrize(
    ("name", "value"),
    [("--calibration-data", "16"), ("--num-samples", "16"), ("--sequence-length", "16"), ("--bos", "never")],
)
def test_options_of_the_text_do_not_go_with_a_folder(
    run: tuple[Path, str], tiny_qwen2_dir: Path, tmp_path: Path, name: str, value: str
) -> None:
    result = rrsq("quantize", tiny_qwen2_dir, "-o", tmp_path / "out", "--calibration", run[0], name, value)
    assert f"{name} has no effect with --calibration" in failure(result, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_model_is_refused(
    run: tuple[Path, str], tiny_qwen2_dir: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_qwen2_dir, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    result = rrsq("quantize", model, "-o", tmp_path / "out", "--calibration", run[0])
    assert "differ in their weights" in failure(result, 2)
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_needs_more_is_refused_before_the_model_is_loaded(
    run: tuple[Path, str], tiny_qwen2_dir: Path, tmp_path: Path
) -> None:
    arguments = ["quantize", tiny_qwen2_dir, "-o", tmp_path / "out", "--calibration", run[0]]
    message = failure(rrsq(*arguments, "--recipe", "rrs-paper-w4a4kv4", "--seed", "7"), 2)
    assert "--recipe rrs-paper-w4a4kv4 --seed 7" in message
    assert "loading the model" not in message


def test_a_folder_that_is_none(tiny_qwen2_dir: Path, tmp_path: Path) -> None:
    result = rrsq("quantize", tiny_qwen2_dir, "-o", tmp_path / "out", "--calibration", tmp_path)
    assert "is no calibration folder" in failure(result, 2)


def test_an_existing_output_is_kept_unless_it_may_be_replaced(
    run: tuple[Path, str], tiny_qwen2_dir: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    arguments = ["calibrate", tiny_qwen2_dir, "--calibration-data", tiny_text_file, *SMALL]
    assert "--overwrite" in failure(rrsq(*arguments, "-o", run[0]), 2)
    (tmp_path / "thesis.txt").write_text("dear")
    message = failure(rrsq(*arguments, "-o", tmp_path, "--overwrite"), 2)
    assert "is not a calibration folder; it is not replaced" in message
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--recipe", "rrs-w4a4kv"], "Did you mean 'rrs-w4a4kv4'?"),
        (["--calibration-data", "missing.txt"], "missing.txt"),
        (["--num-samples", "0"], "num-samples"),
    ],
)
def test_wrong_options(tiny_qwen2_dir: Path, tmp_path: Path, arguments: list[str], expected: str) -> None:
    result = rrsq("calibrate", tiny_qwen2_dir, "-o", tmp_path / "calib", *arguments)
    assert expected in failure(result, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_found_before_the_run(
    tiny_qwen2_dir: Path, tiny_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    text = ["--calibration-data", tiny_text_file, *SMALL]
    result = rrsq("calibrate", tiny_qwen2_dir, "-o", tmp_path / "calib", *text)
    assert "0 MB free and the calibration takes" in failure(result, 1)
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_a_warning(
    tiny_qwen2_dir: Path, tiny_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    class Interrupted:
        def __call__(self, *args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr("rrsq.diagnostics.layer_pass.calibrate_layers", Interrupted())
    memory = psutil.virtual_memory()._replace(available=10**6)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    text = ["--calibration-data", tiny_text_file, *SMALL]
    result = rrsq("calibrate", tiny_qwen2_dir, "-o", tmp_path / "calib", *text)
    assert "Warning: The run needs about" in result.output
    assert "Interrupted: stopped by the user before a layer was finished" in result.output
    assert result.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def finished_layers(work: Path) -> int:
    manifest = work / "manifest.json"
    return json.loads(manifest.read_text())["finished"] if manifest.exists() else 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_goes_on(
    tiny_llama_dir: Path, tiny_text_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Killed when a layer is done, politely or not, it goes on and ends as if nothing had been."""
    text = tmp_path / "text.txt"
    text.write_text(tiny_text_file.read_text() * 6)
    out, work = tmp_path / "calib", tmp_path / ".calib.work"
    arguments = [
        "calibrate", str(tiny_llama_dir), "-o", str(out), "--calibration-data", str(text),
        "--num-samples", "600", "--sequence-length", "32", "--no-hessians",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-m", "rrsq.cli", *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        deadline = time.monotonic() + 120
        while not finished_layers(work) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(number)
        message = process.stderr.read() if process.stderr is not None else ""
    kept = finished_layers(work)
    assert kept in (1, 2), message
    assert not out.exists()
    assert "Traceback" not in message
    if number == signal.SIGINT:
        assert process.returncode == 1
        assert f"{kept} finished layers are kept" in " ".join(message.split())
    result = rrsq(*arguments)
    assert result.exit_code == 0, result.output
    assert f"{kept} of 3 layers are finished" in result.output
    assert (out / "report.html").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calib", "text.txt"]
