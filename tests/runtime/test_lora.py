"""LoRA by PEFT beside frozen quantized linears: trained, saved, loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import rrsq
from rrsq.errors import UsageError
from rrsq.runtime.modules.linear import QuantizedLinear
from tiny_quantized import logits_of, quantize_tiny, random_tokens, recipe_of, save_tiny

TOKENS = random_tokens(4, 16)
LINEARS = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(folder: Path) -> Any:
    return rrsq.load(str(folder), device="cpu")


def adapted(folder: Path, *names: str, **options: Any) -> Any:
    """A loaded model with seeded adapters that do something."""
    model = get_peft_model(load(folder), LoraConfig(r=4, target_modules=list(names), **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_an_adapter_is_added_to_its_linear_alone(qwen2_checkpoint: Path) -> None:
    """With q_proj and v_proj adapted, k_proj still gives its own product, and q_proj its own and LoRA's."""
    model = adapted(qwen2_checkpoint, "q_proj", "v_proj", lora_alpha=12)
    attention = model.base_model.model.model.layers[0].self_attn
    assert isinstance(attention.k_proj, QuantizedLinear)
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        name = next(name for name, child in attention.named_children() if child is module)
        seen[name], seen[f"{name} input"] = output, args[0]

    for name in ("q_proj", "k_proj", "v_proj"):
        attention.get_submodule(name).register_forward_hook(keep)
    logits_of(model, TOKENS)
    plain = load(qwen2_checkpoint).model.layers[0].self_attn
    x = seen["k_proj input"]
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            expected = plain.get_submodule(name)(x)
            if name != "k_proj":
                lora = attention.get_submodule(name)
                a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
                expected = expected + x @ a.T @ b.T * 3.0
                assert float((expected - plain.get_submodule(name)(x)).abs().max()) > 0.01
            torch.testing.assert_close(seen[name], expected)


def test_before_training_nothing_changes(qwen2_checkpoint: Path) -> None:
    model = load(qwen2_checkpoint)
    expected = logits_of(model, TOKENS)
    model = get_peft_model(model, LoraConfig(target_modules=LINEARS))
    torch.testing.assert_close(logits_of(model, TOKENS), expected)
    torch.testing.assert_close(logits_of(model.unload(), TOKENS), expected, rtol=0, atol=0)


def test_training_lowers_the_loss_and_leaves_the_integers(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    model = load(qwen2_checkpoint)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = get_peft_model(model, LoraConfig(r=8, target_modules=LINEARS, init_lora_weights="gaussian"))
    model.train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * len(LINEARS)
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.02)
    losses = []
    for _ in range(20):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(qwen2_checkpoint), tmp_path / "adapter")
    logits = logits_of(again, TOKENS)
    assert torch.equal(logits, logits_of(model, TOKENS))
    for name, tensor in model.unload().state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert float((logits - logits_of(model.base_model.model, TOKENS)).abs().max()) > 0.1


def test_by_the_adapters_of_transformers(qwen2_checkpoint: Path) -> None:
    model = load(qwen2_checkpoint)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model(TOKENS, labels=TOKENS).loss.backward()
    gradient = model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.grad
    assert float(gradient.norm()) > 0


def test_gradient_checkpointing_gives_the_same_gradients(qwen2_checkpoint: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(qwen2_checkpoint, "q_proj", "v_proj")
        if checkpointing:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable()
        model.train()
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_generation_with_an_adapter(qwen2_checkpoint: Path) -> None:
    """Token by token as in one forward pass: the cache holds what the adapted projections give."""
    model = adapted(qwen2_checkpoint, *LINEARS)
    tokens = model.generate(input_ids=TOKENS[:1], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    greedy = logits_of(model, tokens)[:, TOKENS.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(greedy, tokens[:, TOKENS.shape[1] :])


def test_the_trainer_of_transformers(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=0.02, report_to=[], save_strategy="no", use_cpu=True
    )
    model = adapted(qwen2_checkpoint, "q_proj", "v_proj")
    before = logits_of(model, TOKENS)
    Trainer(model, arguments, train_dataset=rows).train()
    assert float((logits_of(model.eval(), TOKENS) - before).abs().max()) > 0.01
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(load(qwen2_checkpoint), arguments, train_dataset=rows)


@pytest.mark.parametrize(
    ("options", "what"),
    [({"use_dora": True}, "DoRA"), ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'")],
)
def test_what_needs_float_weights_is_refused(
    qwen2_checkpoint: Path, options: dict[str, Any], what: str
) -> None:
    with pytest.raises(UsageError, match=f"^{what} needs the weights"):
        get_peft_model(load(qwen2_checkpoint), LoraConfig(target_modules=["q_proj"], **options))


def test_merging_is_refused(qwen2_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="cannot be merged into 4-bit integers"):
        adapted(qwen2_checkpoint, "q_proj").merge_and_unload()


def test_other_models_are_adapted_as_before(tiny_qwen2_dir: Path) -> None:
    model = get_peft_model(load(tiny_qwen2_dir), LoraConfig(target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer) is peft.tuners.lora.Linear


@pytest.mark.parametrize("bits", [8, 4])
def test_beside_a_quantized_embedding_with_a_tied_head(
    bits: int, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """The gradients are those of the same model with the embedding that the codes stand for."""
    recipe = recipe_of("rrs-w4a4kv4", [f"embedding.bits={bits}", "head.bits=16"])
    out = save_tiny(quantize_tiny(tiny_llama_dir, recipe), tiny_llama_dir, tmp_path / "out")
    gradients = []
    for floating in (False, True):
        model = adapted(out, "q_proj", "v_proj")
        inner = model.base_model.model
        if floating:
            rows = inner.model.embed_tokens(torch.arange(inner.config.vocab_size))
            inner.model.embed_tokens = nn.Embedding.from_pretrained(rows)
            inner.lm_head = nn.Linear(*reversed(rows.shape), bias=False)
            inner.lm_head.weight = nn.Parameter(rows, requires_grad=False)
        model.enable_input_require_grads()
        inner.gradient_checkpointing_enable()
        model.train()
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 3 * 4
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="not supported"):
        adapted(out, "embed_tokens")
