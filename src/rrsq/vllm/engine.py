"""vLLM's engine for offline use, reduced to what rrsq asks of it.

Nothing else in rrsq calls vLLM to run a model, so that a stand-in for two names, ``vllm.LLM`` and
``vllm.SamplingParams``, is a whole engine.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EngineError, UsageError
from ..runtime.format.loading import is_checkpoint, locate_model
from .launch import check_checkpoint, check_installation, engine_environment

__all__ = [
    "Engine",
    "check_engine",
    "device_name",
    "parse_engine_options",
    "served_folder",
    "set_environment",
]


def check_engine(checkpoint: str | None, tensor_parallel_size: int = 1) -> str | None:
    """What can be known before vLLM is imported: whether it is there, with a GPU, and fits a checkpoint.

    Args:
        checkpoint: folder of one of rrsq's; None: the model is another.
        tensor_parallel_size: processes that share each linear.

    Returns:
        A warning, or None.

    Raises:
        UsageError: vLLM is not installed, will not find the plugin, or has no GPU; the checkpoint cannot be
            served.
        CheckpointError: the checkpoint is damaged.
    """
    if checkpoint is not None:
        check_checkpoint(checkpoint, tensor_parallel_size)
    warning = check_installation()
    gpus = _gpus()
    if gpus < tensor_parallel_size:
        raise UsageError(
            f"vLLM needs {tensor_parallel_size} NVIDIA GPU{'s' if tensor_parallel_size > 1 else ''}; torch"
            f" sees {gpus or 'none'}. --engine transformers runs on a CPU too."
        )
    return warning


def parse_engine_options(text: str) -> dict[str, Any]:
    """Read ``--engine-options``: a JSON object. Raises :class:`UsageError` for anything else."""
    try:
        options = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"--engine-options {text!s:.200}: no valid JSON ({error!s:.100}).") from error
    if not isinstance(options, dict):
        raise UsageError(
            f"--engine-options {text:.200}: expected an object, for example"
            ' {"gpu_memory_utilization": 0.5}.'
        )
    return options


def served_folder(model: str, data_root: Path | str | None = None) -> str | None:
    """The folder of a checkpoint of rrsq's; None for another model.

    Raises:
        ModelLoadError: there is no such model.
        UsageError: it is a GGUF file.
    """
    folder, options = locate_model(model, data_root)
    if "gguf_file" in options:
        raise UsageError(
            f"'{model}' is a GGUF file, which --engine vllm does not take. Use --engine transformers, or"
            " quantize it first."
        )
    return folder if is_checkpoint(folder) else None


def set_environment() -> None:
    """Set the variables that vLLM reads when it is imported; those of the user's own stay."""
    quiet = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    for name, value in {**quiet, **engine_environment()}.items():
        os.environ.setdefault(name, value)


def device_name() -> str:
    """Of the GPU."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


class Engine:
    """A model in vLLM.

    Args:
        model: a folder or Hub id.
        options: of vLLM's ``LLM``.

    Raises:
        EngineError: it did not start.
    """

    def __init__(self, model: str, options: Mapping[str, Any]) -> None:
        set_environment()
        try:
            from vllm import LLM

            self._llm: Any = LLM(model=model, **options)
        except Exception as error:  # Whatever an option or a model makes vLLM raise.
            raise EngineError.of(f"vLLM did not start with '{model}'", error) from error

    @classmethod
    def around(cls, llm: Any) -> Engine:
        """One that somebody else started: an object of vLLM's ``LLM``."""
        engine = cls.__new__(cls)
        engine._llm = llm
        return engine

    @property
    def vocabulary(self) -> int:
        """Tokens that the model has an embedding for."""
        return int(self._llm.llm_engine.vllm_config.model_config.get_vocab_size())

    @property
    def dtype(self) -> str:
        """Of what is not quantized: ``bfloat16``."""
        return str(self._llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch.")

    @property
    def cache_tokens(self) -> int:
        """Tokens that the KV cache has room for."""
        cache = self._llm.llm_engine.vllm_config.cache_config
        return int(cache.num_gpu_blocks or 0) * int(cache.block_size or 0)

    def apply(self, function: Callable[[Any], int]) -> int:
        """What a function of the module gives in the first of vLLM's workers; it runs in all of them.

        Needs ``VLLM_ALLOW_INSECURE_SERIALIZATION=1`` in the environment.
        """
        return int(self._llm.apply_model(function)[0])

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int | None = None,
        to_the_end: bool = False,
    ) -> list[list[int]]:
        """Continue prompts, all at once.

        Args:
            prompts: token ids.
            max_tokens: new ones of each at most.
            temperature: 0 takes the likeliest token.
            seed: of the sampling.
            to_the_end: go on after an end of text, up to ``max_tokens``.

        Returns:
            The new token ids.

        Raises:
            EngineError: vLLM stopped, or cannot take the prompts.
        """
        options: dict[str, Any] = {"temperature": temperature, "seed": seed, "detokenize": False}
        if to_the_end:
            options |= {"min_tokens": max_tokens, "ignore_eos": True}
        outputs = self._generate(prompts, max_tokens=max_tokens, **options)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def log_probabilities(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Natural logarithms of the probability of each token but the first, given those before it.

        Raises:
            EngineError: vLLM stopped, or cannot take the windows.
        """
        outputs = self._generate(windows, max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        return [
            [
                float(entry[token].logprob)
                for token, entry in zip(window[1:], output.prompt_logprobs[1:], strict=True)
            ]
            for window, output in zip(windows, outputs, strict=True)
        ]

    def _generate(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> Any:
        from vllm import SamplingParams

        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        try:
            return self._llm.generate(asked, SamplingParams(**sampling), use_tqdm=False)
        except Exception as error:
            raise EngineError.of("vLLM stopped", error) from error

    def close(self) -> None:
        """End vLLM's processes, which gives their memory back."""
        core = getattr(self._llm.llm_engine, "engine_core", None)
        shutdown = getattr(core, "shutdown", None)
        if shutdown is not None:
            shutdown()
        del self._llm
        gc.collect()
