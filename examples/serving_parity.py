"""Compare a checkpoint in vLLM with the same checkpoint in transformers, and with itself under load.

    python examples/serving_parity.py out/ --requests 200
    python examples/serving_parity.py rotated/ --export plain/

Three things, on one GPU, each engine in a process of its own:

- greedy texts of a few prompts, in vLLM and in transformers;
- perplexity over windows of WikiText-2 (--text names a file, --windows 0 leaves it out);
- with --requests N: N requests of mixed lengths that arrive at random, many of which begin alike, with prefix
  caching and a KV cache small enough that requests are preempted. Each text is compared with that of the same
  request alone in an engine with room.

With --export, vLLM runs what 'rrsq export' made of the checkpoint, and without rrsq's plugin.

Two texts may part where the two best tokens are as likely: sums in another order, and with 4-bit activations
a value that falls to another code, change logits a little. How much is measured: by how far the gap between
the two best logits is another in the second run, at all steps where both runs have written the same so far.
A text that parts is explained if the gap there is no wider than the widest such difference, and the other
text's token is the second best. The exit code is 1 if one is not explained, one is lost, or the perplexities
are more than 0.3 % apart.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS = (
    "The capital of France is",
    "def quicksort(numbers):",
    "Once upon a time there was a",
    "Water boils at a temperature of",
)
NEW_TOKENS = 64
PERPLEXITY_TOLERANCE = 0.003
SHARED_PREFIXES = 6
PREFIX_LENGTH = 160
CACHE_TOKENS = 6144
LONGEST = 2048

Text = dict[str, Any]
"""A continuation: ``tokens``, at each step the two best ones (``best``) and the ``gap`` of their logits."""


def requests_of(tokens: list[int], count: int) -> list[dict[str, Any]]:
    """Requests of mixed lengths cut out of a text; two of three begin with one of a few prefixes.

    Each has a prompt, the tokens to write, and the step of the engine at which it arrives.
    """
    choose = random.Random(0)

    def piece(length: int) -> list[int]:
        start = choose.randrange(len(tokens) - length)
        return tokens[start : start + length]

    prefixes = [piece(PREFIX_LENGTH) for _ in range(SHARED_PREFIXES)]
    made, arrival = [], 0.0
    for index in range(count):
        prompt = piece(int(2 ** choose.uniform(2, 10)))
        if index % 3:
            prompt = choose.choice(prefixes) + prompt
        arrival += choose.expovariate(0.8)
        made.append({"prompt": prompt, "new": choose.randrange(16, 193), "step": int(arrival)})
    return made


def in_transformers(folder: str, job: dict[str, Any]) -> dict[str, Any]:
    """Greedy continuations and each window's loss."""
    import torch

    import rrsq

    model: Any = rrsq.load(folder, device="cuda")
    texts: list[Text] = []
    losses: list[float] = []
    with torch.inference_mode():
        for prompt in job["prompts"]:
            tokens = torch.tensor([prompt], device="cuda")
            made = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
            )
            best = [score[0].float().topk(2) for score in made.scores]
            texts.append(
                {
                    "tokens": made.sequences[0, len(prompt) :].tolist(),
                    "best": [step.indices.tolist() for step in best],
                    "gap": [float(step.values[0] - step.values[1]) for step in best],
                }
            )
        for window in job["windows"]:
            tokens = torch.tensor([window], device="cuda")
            logits = model(tokens, use_cache=False).logits[0, :-1].float()
            losses.append(float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:])))
    return {"texts": texts, "losses": losses}


def _text(output: Any) -> Text:
    """What vLLM wrote, of its finished output."""
    steps = [
        sorted(step.items(), key=lambda item: -item[1].logprob)[:2] for step in output.outputs[0].logprobs
    ]
    return {
        "tokens": list(output.outputs[0].token_ids),
        "best": [[token for token, _ in step] for step in steps],
        "gap": [step[0][1].logprob - step[1][1].logprob for step in steps],
    }


def in_vllm(folder: str, job: dict[str, Any]) -> dict[str, Any]:
    """The same by vLLM; and each of the requests alone."""
    from vllm import LLM, SamplingParams

    engine: Any = LLM(
        folder,
        **{
            "max_model_len": job["longest"],
            "gpu_memory_utilization": 0.5,
            "enable_prefix_caching": False,
            **job["options"],
        },
    )
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=2, detokenize=False)
    made = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in job["prompts"]], greedy, use_tqdm=False
    )
    scored = engine.generate(
        [{"prompt_token_ids": window} for window in job["windows"]],
        SamplingParams(prompt_logprobs=0, max_tokens=1, temperature=0, detokenize=False),
        use_tqdm=False,
    )
    losses = []
    for window, output in zip(job["windows"], scored, strict=True):
        entries: Any = output.prompt_logprobs
        chosen = [entry[token].logprob for token, entry in zip(window[1:], entries[1:], strict=True)]
        losses.append(-sum(chosen) / len(chosen))
    alone = []
    for request in job["requests"]:
        (output,) = engine.generate(
            [{"prompt_token_ids": request["prompt"]}], _sampling(request), use_tqdm=False
        )
        alone.append(_text(output))
    return {"texts": [_text(output) for output in made], "losses": losses, "alone": alone}


def _sampling(request: dict[str, Any]) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=request["new"], ignore_eos=True, logprobs=2, detokenize=False
    )


def under_load(folder: str, job: dict[str, Any]) -> dict[str, Any]:
    """All requests in one engine with a small cache, each when it arrives."""
    from vllm import LLM

    llm: Any = LLM(
        folder,
        **{
            "max_model_len": job["longest"],
            "gpu_memory_utilization": 0.5,
            "enable_prefix_caching": True,
            "max_num_batched_tokens": 512,  # Prompts are run in parts.
            "max_num_seqs": 64,
            "disable_log_stats": False,
            **job["options"],
            "num_gpu_blocks_override": CACHE_TOKENS // job["options"].get("block_size", 16),
        },
    )
    engine = llm.llm_engine
    waiting = sorted(enumerate(job["requests"]), key=lambda item: item[1]["step"])
    texts: list[Text | None] = [None] * len(waiting)
    step = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0][1]["step"] <= step:
            index, request = waiting.pop(0)
            engine.add_request(str(index), {"prompt_token_ids": request["prompt"]}, _sampling(request))
        # Without requests a step would wait for ever.
        for output in engine.step() if engine.has_unfinished_requests() else ():
            if output.finished:
                texts[int(str(output.request_id).partition("-")[0])] = _text(output)
        step += 1
    counted = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    wanted = ("num_preemptions", "prefix_cache_queries", "prefix_cache_hits")
    return {
        "texts": texts,
        "counted": {name: counted.get(f"vllm:{name}", 0) for name in wanted},
        "steps": step,
    }


RUNS = {"transformers": in_transformers, "vllm": in_vllm, "load": under_load}


@dataclass(frozen=True)
class Parting:
    """Where a text parts from its reference.

    Attributes:
        index: of the text.
        step: the first token that is another.
        gap: of the reference's two best logits there.
        second: whether the other token is the reference's second best.
    """

    index: int
    step: int
    gap: float
    second: bool


def compare(reference: list[Text], other: list[Text | None]) -> tuple[list[Parting], list[int], list[float]]:
    """Two runs of the same requests.

    Returns:
        Where texts part; which are lost or of another length without parting; and how much the gap between
        the two best logits differs at each step up to there, sorted.
    """
    partings, lost, differences = [], [], []
    for index, (ours, theirs) in enumerate(zip(reference, other, strict=True)):
        if theirs is None:
            lost.append(index)
            continue
        pairs = zip(ours["tokens"], theirs["tokens"], strict=False)
        same = next((step for step, (a, b) in enumerate(pairs) if a != b), None)
        if same is None and len(ours["tokens"]) != len(theirs["tokens"]):
            lost.append(index)
        for step in range(len(ours["tokens"]) if same is None else same):
            if step < len(theirs["best"]) and ours["best"][step] == theirs["best"][step]:
                differences.append(abs(ours["gap"][step] - theirs["gap"][step]))
        if same is not None:
            second = ours["best"][same][1] == theirs["tokens"][same]
            partings.append(Parting(index, same, ours["gap"][same], second))
    return partings, lost, sorted(differences)


def report(what: str, reference: list[Text], other: list[Text | None]) -> bool:
    """Print a comparison; whether all that differs is explained."""
    partings, lost, differences = compare(reference, other)
    widest = differences[-1] if differences else 0.0
    usual = differences[len(differences) * 99 // 100] if differences else 0.0
    same = len(reference) - len(partings) - len(lost)
    print(
        f"{what}: {len(reference)} texts, {same} the same, {len(partings)} part, {len(lost)} lost. The gap of"
        f" the two best logits differs by {usual:.4f} at most at 99 % of {len(differences)} steps, by"
        f" {widest:.4f} at all."
    )
    good = not lost
    for parting in sorted(partings, key=lambda parting: parting.gap):
        explained = parting.second and parting.gap <= widest
        good &= explained
        print(
            f"  text {parting.index} parts at token {parting.step}, where the two best logits are"
            f" {parting.gap:.4f} apart{'' if explained else ': NOT EXPLAINED'}"
        )
    return good


def report_perplexity(ours: list[float], theirs: list[float]) -> bool:
    """Print both perplexities; whether they are close."""
    first, second = (math.exp(sum(losses) / len(losses)) for losses in (ours, theirs))
    print(f"perplexity: transformers {first:.4f}, vLLM {second:.4f} ({second / first - 1:+.3%})")
    return abs(second / first - 1) <= PERPLEXITY_TOLERANCE


def job_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the engines are asked."""
    from rrsq.quantizer.calibration.text import load_documents
    from rrsq.quantizer.calibration.windows import evaluation_windows
    from rrsq.runtime.format.loading import load_tokenizer

    tokenizer: Any = load_tokenizer(options.checkpoint)
    job: dict[str, Any] = {"windows": [], "requests": [], "options": json.loads(options.engine_options)}
    job["longest"] = max(LONGEST, options.length) + 1
    job["prompts"] = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    if options.windows or options.requests:
        documents = load_documents(options.text, split="test", data_root=options.data_root)
        start = tokenizer.bos_token_id if options.bos else None
        windows = evaluation_windows(tokenizer, documents, options.length, options.windows or 8, start)
        job["windows"] = windows.tolist() if options.windows else []
        text = [token for window in windows.tolist() for token in window]
        job["requests"] = requests_of(text, options.requests)
    return job


def main() -> int:
    """Run the engines, each in a process of its own, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--text", default="wikitext2", help="wikitext2, or a file of UTF-8 text")
    parser.add_argument("--data-root", type=Path, help="folder that is laid out like the Hub")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--bos", action="store_true", help="begin each window with the BOS token")
    parser.add_argument("--requests", type=int, default=0, help="requests under load; 0 leaves it out")
    parser.add_argument("--export", help="folder that vLLM runs, without rrsq, in place of the checkpoint")
    parser.add_argument("--engine-options", default="{}", help="JSON, for vLLM's LLM")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        result = RUNS[options.run](options.checkpoint, json.loads(options.job.read_text()))
        options.job.with_suffix(f".{options.run}").write_text(json.dumps(result))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps(job_of(options)))
        results = {}
        for run in ("transformers", "vllm", "load") if options.requests else ("transformers", "vllm"):
            plain = options.export is not None and run != "transformers"
            model = options.export if plain else options.checkpoint
            words = [sys.executable, __file__, model, "--run", run, "--job", str(job)]
            # An empty list of plugins: vLLM loads none.
            environment = {**os.environ, "VLLM_PLUGINS": ""} if plain else None
            subprocess.run(words, check=True, env=environment)
            results[run] = json.loads(job.with_suffix(f".{run}").read_text())
    ours, theirs = results["transformers"], results["vllm"]
    good = [report("vLLM against transformers", ours["texts"], theirs["texts"])]
    if ours["losses"]:
        good.append(report_perplexity(ours["losses"], theirs["losses"]))
    if options.requests:
        load = results["load"]
        good.append(report("under load against alone", theirs["alone"], load["texts"]))
        counted = load["counted"]
        print(
            f"  in {load['steps']} steps, {counted['num_preemptions']} preemptions,"
            f" {counted['prefix_cache_hits']} of {counted['prefix_cache_queries']} tokens of prompts found in"
            " the cache"
        )
        if not counted["num_preemptions"]:
            print("  NOT SHOWN: nothing was preempted; make the cache smaller (CACHE_TOKENS)")
            good.append(False)
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
