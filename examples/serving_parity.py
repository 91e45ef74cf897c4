"""Compare a checkpoint in vLLM with the same checkpoint in transformers, on real text.

    python examples/serving_parity.py out/ --text notes.txt

Greedy texts of a few prompts (where they part, the gap between the two best logits is printed), and
perplexity over windows of a text. Both run on the GPU, one after the other, each in its own process.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPTS = (
    "The capital of France is",
    "def quicksort(numbers):",
    "Once upon a time there was a",
    "Water boils at a temperature of",
)
NEW_TOKENS = 64


def token_windows(path: Path, tokenizer: Any, windows: int, length: int) -> list[list[int]]:
    """The first windows of a text."""
    ids = tokenizer(path.read_text(encoding="utf-8")).input_ids
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:windows]


def in_transformers(folder: str, prompts: list[list[int]], windows: list[list[int]]) -> dict[str, Any]:
    """Greedy continuations with the gap of the two best logits at each step, and each window's loss."""
    import torch

    import rrsq

    model: Any = rrsq.load(folder, device="cuda")
    texts, gaps, losses = [], [], []
    with torch.inference_mode():
        for prompt in prompts:
            tokens = torch.tensor([prompt], device="cuda")
            made = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
            )
            texts.append(made.sequences[0, len(prompt) :].tolist())
            gaps.append([float(s[0].topk(2).values.diff().abs()) for s in made.scores])
        for window in windows:
            tokens = torch.tensor([window], device="cuda")
            logits = model(tokens, use_cache=False).logits[0, :-1].float()
            losses.append(float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:])))
    return {"texts": texts, "gaps": gaps, "losses": losses}


def in_vllm(folder: str, prompts: list[list[int]], windows: list[list[int]]) -> dict[str, Any]:
    """The same by vLLM; it has no gaps."""
    from vllm import LLM, SamplingParams

    longest = max(map(len, [*windows, *prompts])) + NEW_TOKENS
    engine = LLM(folder, max_model_len=longest, gpu_memory_utilization=0.5, enable_prefix_caching=False)
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    made = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy)
    texts = [list(output.outputs[0].token_ids) for output in made]
    scored = engine.generate(
        [{"prompt_token_ids": window} for window in windows],
        SamplingParams(prompt_logprobs=0, max_tokens=1, temperature=0),
    )
    losses = []
    for window, output in zip(windows, scored, strict=True):
        entries: Any = output.prompt_logprobs
        chosen = [entry[token].logprob for token, entry in zip(window[1:], entries[1:], strict=True)]
        losses.append(-sum(chosen) / len(chosen))
    return {"texts": texts, "losses": losses}


def report(ours: dict[str, Any], theirs: dict[str, Any], prompts: list[str]) -> None:
    """Where texts part, and both perplexities."""
    for prompt, text, gaps, other in zip(prompts, ours["texts"], ours["gaps"], theirs["texts"], strict=True):
        same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), None)
        if same is None:
            print(f"{prompt!r}: the same {min(len(text), len(other))} tokens")
        else:
            print(f"{prompt!r}: parts at token {same}, where the best logits are {gaps[same]:.4f} apart")
    if ours["losses"]:
        first, second = (math.exp(sum(x["losses"]) / len(x["losses"])) for x in (ours, theirs))
        print(f"perplexity: transformers {first:.4f}, vLLM {second:.4f} ({second / first - 1:+.3%})")


def main() -> None:
    """Run both, each in a process of its own, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--text", type=Path, help="UTF-8 text for perplexity")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--run", choices=("transformers", "vllm"), help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        job = json.loads(options.job.read_text())
        run = in_vllm if options.run == "vllm" else in_transformers
        result = run(options.checkpoint, job["prompts"], job["windows"])
        options.job.with_suffix(f".{options.run}").write_text(json.dumps(result))
        return

    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(options.checkpoint)
    windows = (
        []
        if options.text is None
        else token_windows(options.text, tokenizer, options.windows, options.length)
    )
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
        job.write_text(json.dumps({"prompts": prompts, "windows": windows}))
        for engine in ("transformers", "vllm"):
            words = [sys.executable, __file__, options.checkpoint, "--run", engine, "--job", str(job)]
            subprocess.run(words, check=True)
        results = [json.loads(job.with_suffix(f".{name}").read_text()) for name in ("transformers", "vllm")]
    report(results[0], results[1], list(PROMPTS))


if __name__ == "__main__":
    main()
