"""``rrsq quantize --target-bits``: the finished checkpoint keeps the budget, and its recipe repeats it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from safetensors.torch import load_file
from typer.testing import CliRunner

import rrsq
from cli_failures import failure
from rrsq.cli.app import app
from rrsq.errors import RecipeError, UsageError
from rrsq.models import family_named
from rrsq.quantizer.budget import measure
from rrsq.runtime.format.describe import LinearBits, linear_bits
from rrsq.runtime.format.json_files import read_config
from rrsq.runtime.format.loading import read_info
from rrsq.runtime.format.shards import read_shards
from tiny_families import tiny_model

SMALL: dict[str, Any] = {"num_samples": 2, "sequence_length": 32, "device": "cpu"}
WORDS = ("--num-samples", "2", "--sequence-length", "32", "--device", "cpu")


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "300"})


def bits_of(out: Path) -> LinearBits:
    """What is in the shards of a checkpoint, and what its recipe says of the activations."""
    tensors = [(name, tuple(place.shape), place.size) for name, place in read_shards(out).items()]
    family = family_named(read_config(out)["model_type"])
    found = linear_bits(tensors, read_info(out).recipe, family)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def text(tiny_text_file: Path) -> dict[str, Any]:
    return {"calibration_data": tiny_text_file, **SMALL}


@pytest.mark.parametrize(("fixture", "target"), [("tiny_llama_dir", 5.5), ("tiny_qwen2_dir", 8.0)])
def test_the_checkpoint_keeps_the_budget_and_its_recipe_repeats_it(
    fixture: str, target: float, text: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model: Path = request.getfixturevalue(fixture)
    notes: list[str] = []
    rrsq.quantize(model, tmp_path / "a", target_bits=target, on_note=notes.append, **text)
    bits = bits_of(tmp_path / "a").weights
    assert target - 1 < bits <= target
    note = next(note for note in notes if note.startswith("Allocated"))
    assert note.startswith(f"Allocated {bits:.4g} bits a weight of linears and output head")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    inspected = command("inspect", tmp_path / "a").output
    assert f"{bits:.2f} a weight, " in inspected
    rrsq.quantize(model, tmp_path / "b", recipe=tmp_path / "a" / "recipe.yaml", **text)
    assert read_info(tmp_path / "a") == read_info(tmp_path / "b")
    ours, again = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert ours.keys() == again.keys()
    assert all(bool((ours[name] == again[name]).all()) for name in ours)


def test_both_budgets_are_kept(text: dict[str, Any], tiny_llama_dir: Path, tmp_path: Path) -> None:
    """The activations' one is of the weights that they meet; no weight is in 16 bits for it."""
    kept = tmp_path / "s.json"
    options = {"target_bits": 5.0, "target_activation_bits": 4.8, "sensitivities": kept}
    rrsq.quantize(tiny_llama_dir, tmp_path / "out", **options, **text)
    bits, recipe = bits_of(tmp_path / "out"), read_info(tmp_path / "out").recipe
    assert 4.5 < bits.weights <= 5.0
    assert 4.5 < bits.activations <= 4.8
    assert {o.activations.bits for o in recipe.overrides if o.activations} >= {8}
    assert recipe.name == "rrs-w4a4kv4-w5-a4.8"
    assert kept.is_file()


def test_more_bits_have_less_loss(text: dict[str, Any], tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Of one measurement; the note says the estimates."""
    losses = []
    for number, target in enumerate((4.4, 4.8, 6.0, 10.0)):
        notes: list[str] = []
        rrsq.quantize(
            tiny_llama_dir, tmp_path / str(number), target_bits=target, sensitivities=tmp_path / "s.json",
            on_note=notes.append, **text,
        )  # fmt: skip
        line = next(note for note in notes if note.startswith("Allocated"))
        losses.append(float(line.split("divergence ")[1].split()[0]))
        assert any("measured before" in note for note in notes) == (number > 0)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


def test_kept_modules_are_outside_of_the_budget(
    text: dict[str, Any], tiny_qwen2_dir: Path, tmp_path: Path
) -> None:
    """An output head that is kept costs nothing, and linears by pattern do not either."""
    rrsq.quantize(tiny_qwen2_dir, tmp_path / "out", target_bits=4.9, ignore=["lm_head", "*.v_proj"], **text)
    recipe = read_info(tmp_path / "out").recipe
    assert recipe.modules_to_not_convert == ("lm_head", "*.v_proj")
    assert bits_of(tmp_path / "out").weights <= 4.9
    assert "lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_what_a_stopped_run_measured_is_kept(
    text: dict[str, Any], tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second layer; the same call measures nothing and goes on from there."""

    def stop(done: int, total: int, per_layer: int, doing: str) -> None:
        if doing.startswith("layer 2/3: weights"):
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(rrsq.errors.InterruptedRunError):
        rrsq.quantize(tiny_llama_dir, out, target_bits=5.0, on_step=stop, **text)
    kept = measure.kept_losses(out)
    assert kept.is_file()
    monkeypatch.setattr(measure, "measure_losses", lambda *args, **options: pytest.fail("measured again"))
    notes: list[str] = []
    rrsq.quantize(tiny_llama_dir, out, target_bits=5.0, on_note=notes.append, **text)
    assert any("Going on from layer 2 of 3" in note for note in notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_what_was_kept_of_another_text_is_measured_anew(
    text: dict[str, Any], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    kept = measure.kept_losses(tmp_path / "out")
    rrsq.quantize(tiny_llama_dir, tmp_path / "other", target_bits=5.0, sensitivities=kept, **text)
    kept.write_text(kept.read_text().replace('"the seed": 0', '"the seed": 7'))
    notes: list[str] = []
    rrsq.quantize(tiny_llama_dir, tmp_path / "out", target_bits=5.0, on_note=notes.append, **text)
    assert not any("measured before" in note for note in notes)
    assert read_info(tmp_path / "out") == read_info(tmp_path / "other")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target-bits", "3.9"], "--target-bits 3.9 is out of reach: with the recipe 'rrs-w4a4kv4' this"),
        (["--target-bits", "33"], "this model can have 4.372 to 27.206."),
        (["--target-bits", "nan"], "number of bits above zero"),
        (["--target-activation-bits", "3"], "this model can have 4 to 16"),
        (["--target-activation-bits", "16.5"], "this model can have 4 to 16"),
        (["--target-bits", "5", "--recipe", "w16a16kv4"], "quantizes no linear of a layer"),
        (["--target-bits", "5", "--calibration", "calib"], "Leave out one of them"),
        (["--sensitivities", "s.json"], "is of --target-bits"),
        (["--target-bits", "5", "--sensitivities", "nowhere/s.json"], "name a file in a folder that exists"),
        (["--target-bits", "5", "--sensitivities", "."], "name a file in a folder that exists"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_an_impossible_budget_is_one_error(
    words: list[str],
    message: str,
    dry: tuple[str, ...],
    tiny_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command("quantize", tiny_llama_dir, "-o", "out", *words, *dry)
    assert message in failure(done, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_mixture_is_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(RecipeError, match="mixture of experts"):
        rrsq.quantize(tmp_path / "model", tmp_path / "out", target_bits=5, **SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: "{", "cannot be read"),
        (lambda data: json.dumps({**data, "format": 2}), "its format is 2"),
        (lambda data: json.dumps({**data, "identity": {}}), "changed since"),
        (
            lambda data: json.dumps({**data, "losses": {**data["losses"], "inputs": []}}),
            "some are missing",
        ),
    ],
)
def test_a_named_file_of_something_else_is_refused(
    change: Any, message: str, text: dict[str, Any], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "s.json"
    rrsq.quantize(tiny_llama_dir, tmp_path / "out", target_bits=5.0, sensitivities=kept, **text)
    before = change(json.loads(kept.read_text()))
    kept.write_text(before)
    with pytest.raises(UsageError, match=message):
        rrsq.quantize(tiny_llama_dir, tmp_path / "new", target_bits=5.0, sensitivities=kept, **text)
    assert kept.read_text() == before
    assert not (tmp_path / "new").exists()
    dry = command(
        "quantize", tiny_llama_dir, "-o", tmp_path / "new", "--target-bits", "5", "--sensitivities", kept,
        "--dry-run",
    )  # fmt: skip
    assert message in failure(dry, 2)


def test_a_dry_run_tells_what_the_budget_gives_once_it_is_measured(
    text: dict[str, Any], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    words = ("--target-bits", "5", "--sensitivities", tmp_path / "s.json", "--dry-run")
    before = command("quantize", tiny_llama_dir, "-o", tmp_path / "dry", *words)
    assert before.exit_code == 0, before.output
    assert "is known when the sensitivities are measured" in before.output
    assert list(tmp_path.iterdir()) == []
    kept = tmp_path / "s.json"
    rrsq.quantize(tiny_llama_dir, tmp_path / "out", target_bits=5.0, sensitivities=kept, **text)
    after = command("quantize", tiny_llama_dir, "-o", tmp_path / "dry", *words).output
    assert f"{bits_of(tmp_path / 'out').weights:.2f} a weight, " in after
    assert "rrs-w4a4kv4-w5" in after
    assert not (tmp_path / "dry").exists()


def test_arguments_are_numbers(tiny_llama_dir: Path, tmp_path: Path) -> None:
    wrong: Any
    for wrong in ("5", True, float("inf"), -1):
        with pytest.raises(UsageError, match="number of bits above zero"):
            rrsq.quantize(tiny_llama_dir, tmp_path / "out", target_bits=wrong, **SMALL)
