"""A stand-in for vLLM, by the two names that rrsq's engine uses of it: ``LLM`` and ``SamplingParams``.

Its models are those of transformers on a CPU, so that texts and probabilities are real ones.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from rrsq.vllm import engine, launch

__all__ = ["StandIn", "lm_eval_model"]


VARIABLES = (
    "VLLM_PLUGINS",
    "VLLM_LOGGING_LEVEL",
    "VLLM_LOGGING_STREAM",
    "VLLM_USE_FLASHINFER_SAMPLER",
    "VLLM_ALLOW_INSECURE_SERIALIZATION",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN",
)


class SamplingParams(types.SimpleNamespace):
    """Keeps what it is given; what vLLM does not know is an error."""

    KNOWN = frozenset(
        {"temperature", "seed", "detokenize", "max_tokens", "min_tokens", "ignore_eos", "prompt_logprobs"}
    )

    def __init__(self, **options: Any) -> None:
        assert options.keys() <= self.KNOWN, options
        super().__init__(**{"min_tokens": 0, "ignore_eos": False, "prompt_logprobs": None, **options})


class StandIn:
    """What was done with the stand-in.

    Attributes:
        engines: all that were started.
        fails_on: a text in a model's ``config.json`` by which it does not start.
    """

    CACHE_TOKENS = 37 * 16

    def __init__(self) -> None:
        self.engines: list[Any] = []
        self.fails_on: str | None = None

    @classmethod
    @contextmanager
    def installed(cls, monkeypatch: pytest.MonkeyPatch, gpus: int = 8) -> Iterator[StandIn]:
        """vLLM, the plugin and GPUs seem to be there."""
        stand_in = cls()
        module: Any = types.ModuleType("vllm")
        module.SamplingParams = SamplingParams
        module.LLM = lambda **options: LLM(stand_in, **options)
        point = importlib.metadata.EntryPoint("rrsq", "rrsq.vllm:register", "vllm.general_plugins")
        monkeypatch.setitem(sys.modules, "vllm", module)
        monkeypatch.setattr(launch, "version", lambda name: f"{launch.TESTED_VERSION}.3")
        monkeypatch.setattr(launch, "entry_points", lambda group: [point])
        for name in VARIABLES:  # What the engine sets is gone after the test.
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        monkeypatch.setattr(engine, "_gpus", lambda: gpus)
        yield stand_in


def lm_eval_model(folder: str, options: dict[str, Any]) -> Any:
    """In the place of lm-eval's ``vllm`` model: its ``hf`` model around the stand-in's."""
    from lm_eval.api.model import LM
    from transformers import AutoTokenizer

    import vllm  # type: ignore[import-not-found]
    from rrsq.evaluation.harness.model import LoadedModel

    llm = vllm.LLM(model=folder, **options)
    inner: Any = LoadedModel(llm.model, AutoTokenizer.from_pretrained(folder))

    class Model(LM):
        model = llm

        def loglikelihood(self, requests: Any) -> Any:
            return inner.loglikelihood(requests)

        def loglikelihood_rolling(self, requests: Any) -> Any:
            return inner.loglikelihood_rolling(requests)

        def generate_until(self, requests: Any) -> Any:
            return inner.generate_until(requests)

    return Model()


class LLM:
    """The parts of ``vllm.LLM``."""

    def __init__(self, stand_in: StandIn, **options: Any) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.options, self.asked, self.closed = options, [], False
        folder = Path(options["model"])
        if stand_in.fails_on and stand_in.fails_on in (folder / "config.json").read_text(encoding="utf-8"):
            raise RuntimeError(f"no {stand_in.fails_on} here\nsecond line")
        config = AutoConfig.from_pretrained(folder)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if options.get("load_format", "auto") == "dummy":
                self.model: Any = AutoModelForCausalLM.from_config(config)
            else:
                self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.model.eval()
        read = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_config = types.SimpleNamespace(
            get_vocab_size=lambda: read["vocab_size"], dtype=self.model.dtype
        )
        cache_config = types.SimpleNamespace(num_gpu_blocks=37, block_size=16)
        self.llm_engine = types.SimpleNamespace(
            vllm_config=types.SimpleNamespace(model_config=model_config, cache_config=cache_config),
            engine_core=types.SimpleNamespace(shutdown=self._shutdown),
        )
        stand_in.engines.append(self)

    def _shutdown(self) -> None:
        self.closed = True

    def apply_model(self, function: Callable[[Any], Any]) -> list[Any]:
        return [function(self.model)]

    def generate(self, prompts: list[dict[str, list[int]]], sampling: Any, use_tqdm: bool) -> list[Any]:
        assert not self.closed
        tokens = [prompt["prompt_token_ids"] for prompt in prompts]
        self.asked.append((tokens, sampling))
        longest = max(map(len, tokens)) + sampling.max_tokens
        if longest > self.options["max_model_len"]:
            raise ValueError(f"a request of {longest} tokens is too long")
        return [self._answer(each, sampling) for each in tokens]

    @torch.inference_mode()
    def _answer(self, prompt: list[int], sampling: Any) -> Any:
        given = torch.tensor([prompt])
        logprobs = None
        if sampling.prompt_logprobs is not None:
            logits = self.model(given, use_cache=False).logits[0].float().log_softmax(-1)
            logprobs = [None]
            for position, token in enumerate(prompt[1:]):
                chosen = types.SimpleNamespace(logprob=float(logits[position, token]))
                logprobs.append({token: chosen})
        stop = {} if not sampling.ignore_eos else {"eos_token_id": -1}
        made = self.model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=sampling.max_tokens,
            do_sample=False,
            pad_token_id=0,
            **stop,
        )
        new = made[0, len(prompt) :].tolist()
        return types.SimpleNamespace(
            outputs=[types.SimpleNamespace(token_ids=tuple(new))], prompt_logprobs=logprobs
        )
