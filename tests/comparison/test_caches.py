"""``rrsq compare --caches``: the same checkpoints with other KV caches, and the noise floor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from rrsq.cli.app import app
from rrsq.comparison import source as source_module
from rrsq.comparison import steps as steps_module
from rrsq.comparison.cache import (
    measure_cache_means,
    read_cache_means,
    replace_cache,
    write_cache_means,
)
from rrsq.comparison.subjects import cache_of, read_caches, subjects
from rrsq.errors import UsageError
from rrsq.evaluation.divergence import divergence
from rrsq.evaluation.reference import Reference
from rrsq.quantizer.calibration.text import load_documents
from rrsq.quantizer.calibration.windows import evaluation_windows
from rrsq.recipe import load_recipe
from rrsq.runtime.format.loading import load_model, load_tokenizer
from tiny_gguf import save_gguf
from tiny_quantized import load_tiny, logits_of, quantize_tiny, random_tokens, recipe_of

SMALL = ("--device", "cpu", "--dtype", "float32", "--sequence-length", "64", "--limit", "3")
CALIBRATION = ("--num-samples", "4", "--calibration-length", "64")
RECIPES = "rtn-w4a4,quarot-w4a4kv4,rrs-w4a4kv4"


def compared(model: Path, folder: Path, hub: Path, *more: str, recipes: str = RECIPES) -> dict[str, Any]:
    """The report of a comparison by perplexity and divergence."""
    named = ("--recipes", recipes, "--tasks", "wikitext2,kl", "-o", str(folder), "--data-root", str(hub))
    done = CliRunner().invoke(app, ["compare", str(model), *named, *CALIBRATION, *SMALL, *more])
    assert done.exit_code == 0, done.output
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    report["said"] = done.stderr
    return report


def by_name(report: dict[str, Any], task: str, metric: str) -> dict[str, float]:
    return {
        model["path"]: one["value"]
        for model in report["models"]
        for result in model["results"]
        for one in result["metrics"]
        if (result["task"], one["name"]) == (task, metric)
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_dir: Path, tiny_hub: Path) -> Path:
    """Of Qwen2, whose key biases tell caches apart."""
    folder = tmp_path_factory.mktemp("caches") / "folder"
    compared(tiny_qwen2_dir, folder, tiny_hub, "--caches", "own,16,4")
    return folder


@pytest.fixture(scope="module")
def report(done: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((done / "report.json").read_text())
    return read


def test_a_cache_is_measured_once(report: dict[str, Any]) -> None:
    """What a recipe's own cache is already is not measured again under another name."""
    assert [model["path"] for model in report["models"]] == [
        "full-precision", "full-precision@bfloat16", "full-precision@kv4",
        "rtn-w4a4", "rtn-w4a4@kv4",
        "quarot-w4a4kv4", "quarot-w4a4kv4@kv16", "quarot-w4a4kv4@kv4",
        "rrs-w4a4kv4", "rrs-w4a4kv4@kv16",
    ]  # fmt: skip


def test_numbers_are_those_of_the_checkpoint_with_that_cache(
    done: Path, report: dict[str, Any], tiny_qwen2_dir: Path, tiny_hub: Path
) -> None:
    documents = load_documents("wikitext2", split="test", data_root=tiny_hub)
    windows = evaluation_windows(load_tokenizer(str(tiny_qwen2_dir)), documents, 64, 3)
    reference = Reference(load_model(str(tiny_qwen2_dir), device="cpu", dtype="float32"))
    found = by_name(report, "kl", "kl_mean")

    def kl(model: Any) -> float:
        return divergence(model, reference, windows).mean.value

    for recipe in ("quarot-w4a4kv4", "rrs-w4a4kv4"):
        model: Any = load_model(str(done / recipe / "checkpoint"), device="cpu", dtype="float32")
        assert found[recipe] == kl(model)
        for layer in model.model.layers:
            layer.self_attn._forward_pre_hooks.clear()
        assert found[f"{recipe}@kv16"] == kl(model)
    # The cache alone is what a recipe makes that quantizes nothing else, on the same calibration text.
    assert found["full-precision@kv4"] == pytest.approx(_cache_alone(tiny_qwen2_dir, tiny_hub, kl), rel=0.05)
    floor = load_model(str(tiny_qwen2_dir), device="cpu", dtype="bfloat16")
    assert 0 < found["full-precision@bfloat16"] == kl(floor)
    assert len(set(found.values())) == len(found)


def _cache_alone(model: Path, hub: Path, kl: Callable[[Any], float]) -> float:
    from rrsq.quantizer.calibration.windows import calibration_windows

    documents = load_documents("wikitext2", split="train", data_root=hub)
    windows = calibration_windows(load_tokenizer(str(model)), documents, 4, 64, 0)
    return kl(quantize_tiny(model, recipe_of("w16a16kv4"), windows=windows).model)


def test_the_report_has_caches_side_by_side(done: Path, report: dict[str, Any]) -> None:
    lines = (done / "report.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("## By KV cache")
    found = by_name(report, "wikitext2", "perplexity")
    own, none, ours = (found[f"quarot-w4a4kv4{end}"] for end in ("", "@kv16", "@kv4"))
    assert f"| `quarot-w4a4kv4` | {own:.4f} | {none:.4f} | {ours:.4f} |" in lines[start:]
    full, alone = found["full-precision"], found["full-precision@kv4"]
    assert f"| full precision | {full:.4f} | {full:.4f} | {alone:.4f} |" in lines[start:]
    row = next(line for line in lines if line.startswith("| `quarot-w4a4kv4@kv16` |"))
    assert "| 4.01, 4, 16.00 |" in row
    kl = next(result for result in report["models"][1]["results"] if result["task"] == "kl")
    cells = [f"{metric['value']:.4f} ±{metric['stderr']:.4f}" for metric in kl["metrics"]]
    assert [metric["name"] for metric in kl["metrics"]] == [
        "kl_mean",
        "kl_median",
        "kl_p90",
        "kl_p99",
        "top1",
    ]
    assert f"| full precision in bfloat16 | {' | '.join(cells)} |" in lines
    page = (done / "report.html").read_text(encoding="utf-8")
    assert page.count("noise floor (bfloat16)  ") == 4


def test_weights_are_quantized_once_and_a_further_cache_only_measures(
    tiny_llama_dir: Path, tiny_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    produce, run = steps_module.produce_checkpoint, steps_module.run_tasks

    def produced(model: Any, recipe: Any, *rest: Any, **options: Any) -> Any:
        steps.append(f"quantize {recipe.name}")
        return produce(model, recipe, *rest, **options)

    def ran(name: str, model: Any, tokenizer: Any, tasks: Any, *rest: Any) -> Any:
        steps.append(f"{name} {tasks[0].names[0]}")
        return run(name, model, tokenizer, tasks, *rest)

    monkeypatch.setattr(steps_module, "produce_checkpoint", produced)
    monkeypatch.setattr(steps_module, "run_tasks", ran)
    arguments = (tiny_llama_dir, tmp_path / "folder", tiny_hub, "--no-noise-floor")
    compared(*arguments, "--caches", "16", recipes="quarot-w4a4kv4")
    name = "quarot-w4a4kv4"
    assert steps == [
        f"quantize {name}", "full-precision wikitext2", f"{name}@kv16 wikitext2", f"{name}@kv16 kl"
    ]  # fmt: skip
    steps.clear()
    report = compared(*arguments, "--caches", "16,4", recipes=name)
    assert steps == [
        "full-precision@kv4 wikitext2", "full-precision@kv4 kl", f"{name}@kv4 wikitext2", f"{name}@kv4 kl"
    ]  # fmt: skip
    assert f"{name}: quantized already" in report["said"]
    # The means were kept: without any task of the full-precision model, it is not loaded for them.
    loaded: list[str] = []
    load = steps_module.load_model

    def loads(path: str, **options: Any) -> Any:
        loaded.append(path)
        return load(path, **options)

    monkeypatch.setattr(steps_module, "load_model", loads)
    record = tmp_path / "folder" / f"{name}@kv4" / "results.json"
    results = json.loads(record.read_text())
    del results["tasks"]["wikitext2"]
    record.write_text(json.dumps(results))
    compared(*arguments, "--caches", "16,4", recipes=name)
    assert loaded == [str(tmp_path / "folder" / name / "checkpoint")]


def test_a_gguf_file_is_converted_once(
    tiny_llama_dir: Path, tiny_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    file = save_gguf(tiny_llama_dir, tmp_path / "tiny.gguf")
    converted: list[str] = []
    load = source_module.load_model

    def loads(path: str, **options: Any) -> Any:
        converted.append(path)
        return load(path, **options)

    monkeypatch.setattr(source_module, "load_model", loads)
    monkeypatch.setattr(steps_module, "load_model", _no_gguf(steps_module.load_model))
    folder = tmp_path / "folder"
    report = compared(file, folder, tiny_hub, "--no-noise-floor", recipes="rtn-w4a4")
    assert converted == [str(file)]
    place = folder / "full-precision" / "converted" / "tiny"
    one = load_model(str(place), device="cpu", dtype="float32")
    direct = load_model(str(file), device="cpu")
    assert one.config.dtype == torch.float32
    for name, tensor in direct.state_dict().items():
        assert torch.equal(one.state_dict()[name], tensor.float())
    assert report["subjects"][0]["stored_bits_per_weight"] == 16
    compared(file, folder, tiny_hub, "--no-noise-floor", recipes="rtn-w4a4,w16a16kv4")
    assert converted == [str(file)]
    (place / "converted.json").write_text("{}")
    compared(file, folder, tiny_hub, "--no-noise-floor", recipes="rtn-w4a4,w16a16kv4,gptq-w4a16")
    assert converted == [str(file)] * 2


def _no_gguf(load: Callable[..., Any]) -> Callable[..., Any]:
    def loads(path: str, **options: Any) -> Any:
        assert not path.endswith(".gguf")
        return load(path, **options)

    return loads


def test_a_cache_can_be_replaced_and_taken_away(tiny_qwen2_dir: Path) -> None:
    tokens = random_tokens(2, 24, seed=3)
    plain = load_tiny(tiny_qwen2_dir)
    expected = logits_of(plain, tokens)
    means = measure_cache_means(plain, tokens)
    assert torch.equal(logits_of(plain, tokens), expected)
    replace_cache(plain, cache_of("4", None), means)
    assert not torch.equal(logits_of(plain, tokens), expected)
    replace_cache(plain, None, None)
    assert torch.equal(logits_of(plain, tokens), expected)
    assert not any("kv_quantizer" in name for name, _ in plain.named_modules())


def test_generation_uses_the_cache_that_was_put_in(done: Path, tiny_qwen2_dir: Path) -> None:
    """What decodes in place of the model's forward pass must not go on with the cache that was there."""
    model: Any = load_model(str(done / "quarot-w4a4kv4" / "checkpoint"), device="cpu", dtype="float32")
    tokens = random_tokens(1, 24, seed=3)
    own = model.forward.quantizers
    means = measure_cache_means(load_tiny(tiny_qwen2_dir), tokens)
    replace_cache(model, cache_of("4", load_recipe("quarot-w4a4kv4")), means)
    assert not any(new is old for new in model.forward.quantizers for old in own)
    replace_cache(model, None, None)
    assert "forward" not in vars(model)
    cache = model.generate(tokens, max_new_tokens=2, return_dict_in_generate=True).past_key_values
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer"] * 2


def test_means_of_keys_are_those_of_the_projection(tiny_qwen2_dir: Path) -> None:
    model: Any = load_tiny(tiny_qwen2_dir)
    tokens = random_tokens(3, 24, seed=4)
    seen: list[torch.Tensor] = []
    handles = [
        layer.self_attn.k_proj.register_forward_hook(lambda module, args, out: seen.append(out))
        for layer in model.model.layers
    ]
    logits_of(model, tokens)
    for handle in handles:
        handle.remove()
    expected = torch.stack([keys.double().mean((0, 1)) for keys in seen]).view(2, 2, -1)
    means = measure_cache_means(model, tokens)
    torch.testing.assert_close(means["key"].double(), expected, rtol=1e-4, atol=1e-5)
    first = torch.stack([keys[:, 0].double().mean(0) for keys in seen]).view(2, 2, -1)
    torch.testing.assert_close(means["sink"].double(), first, rtol=1e-4, atol=1e-5)


def test_means_of_something_else_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cache-means.safetensors"
    assert read_cache_means(path, "a") is None
    means = {name: torch.randn(2, 2, 4) for name in ("key", "sink", "key_square", "query_square")}
    write_cache_means(path, means, "a")
    read = read_cache_means(path, "a")
    assert read is not None
    assert read.keys() == means.keys()
    assert all(torch.equal(read[name], mean) for name, mean in means.items())
    assert read_cache_means(path, "b") is None
    path.write_bytes(path.read_bytes()[:-9])
    assert read_cache_means(path, "a") is None


def test_values_are_rotated_where_their_weights_are_not() -> None:
    rotates = {
        name: cache_of("4", load_recipe(name)) for name in ("rtn-w4a4", "quarot-w4a4kv4", "rrs-w4a4kv4")
    }
    assert [cache is not None and cache.values.rotate for cache in rotates.values()] == [True, False, False]
    assert rotates["rrs-w4a4kv4"] == load_recipe("rrs-w4a4kv4").kv_cache
    assert cache_of("4", None) == load_recipe("w16a16kv4").kv_cache
    only = subjects({"rtn-w4a4": load_recipe("rtn-w4a4")}, ["16"], None)
    assert [subject.name for subject in only] == ["full-precision", "rtn-w4a4"]


@pytest.mark.parametrize("text", ["own,8", "", " , "])
def test_other_caches_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="own, 16, 4"):
        read_caches(text)
