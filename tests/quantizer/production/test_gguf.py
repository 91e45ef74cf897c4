"""A GGUF file is loaded as the model that it was made of."""

from __future__ import annotations

from pathlib import Path

import torch

import rrsq
from rrsq.runtime.format.loading import load_tokenizer
from tiny_gguf import save_gguf
from tiny_quantized import load_tiny, logits_of, random_tokens


def test_logits_and_tokens_are_those_of_the_folder(tiny_llama_dir: Path, tmp_path: Path) -> None:
    path = str(save_gguf(tiny_llama_dir, tmp_path / "tiny.gguf"))
    tokens = random_tokens(2, 16)
    loaded = rrsq.load(path, device="cpu", dtype="float32")
    torch.testing.assert_close(logits_of(loaded, tokens), logits_of(load_tiny(tiny_llama_dir), tokens))
    text = "The river of the winter song, 东京."
    assert load_tokenizer(path)(text)["input_ids"] == load_tokenizer(str(tiny_llama_dir))(text)["input_ids"]
