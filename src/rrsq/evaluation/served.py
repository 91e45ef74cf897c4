"""Measuring models through vLLM: ``rrsq eval --engine vllm``.

A task that can be measured there has a method ``run_served``, which is given a :class:`ServedModel` in the
place of a loaded model. A comparison of whole distributions has none: vLLM hands out the probabilities of the
tokens of a text and of a few candidates, not of the whole vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from rrsq.errors import EngineError, UsageError
from rrsq.evaluation.results import TaskResult
from rrsq.evaluation.run import StepCallback
from rrsq.evaluation.scores import ModelReport, quantization_method
from rrsq.evaluation.tasks import Task, TaskOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rrsq.vllm.engine import Engine

__all__ = ["EngineSettings", "ServableTask", "ServedModel", "check_served", "evaluate_served"]

_GPU_MEMORY = 0.7  # Probabilities of whole prompts take memory that vLLM does not plan for.
_REQUESTS = 16


@dataclass(frozen=True)
class EngineSettings:
    """How vLLM is started.

    Attributes:
        tensor_parallel_size: GPUs that share each layer.
        dtype: of what is not quantized; ``auto`` is the configuration's.
        options: further ones of vLLM's ``LLM``; they win over what is chosen here.
    """

    tensor_parallel_size: int = 1
    dtype: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class ServableTask(Protocol):
    """A task that an engine is enough for."""

    def run_served(
        self, model: ServedModel, tokenizer: PreTrainedTokenizerBase, options: TaskOptions
    ) -> Mapping[str, Sequence[TaskResult]]:
        """Measure the model; results by name."""


class ServedModel:
    """A model in vLLM, which is started when it is first asked for.

    Args:
        path: a checkpoint, a Hugging Face folder or a Hub id.
        data_root: see :func:`~rrsq.runtime.format.loading.locate_model`.
        settings: of vLLM.
    """

    def __init__(self, path: str, data_root: Path | None, settings: EngineSettings) -> None:
        from rrsq.runtime.format.loading import load_config, locate_model

        self._folder, _ = locate_model(path, data_root)
        self._settings = settings
        self._engine: Engine | None = None
        self._longest: int | None = None
        self.config = load_config(path, data_root)
        self.dtype = ""
        """Of what is not quantized; known once the engine was started."""

    def engine(self, longest: int) -> Engine:
        """The engine, for requests of so many tokens, the one that is asked for included.

        Raises:
            EngineError: it did not start.
        """
        from rrsq.vllm.engine import Engine

        if self._engine is not None and self._longest == longest:
            return self._engine
        context = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and longest == context + 1:
            # A window as long as the context, whose next token is never run: vLLM wants room for it.
            os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
        own = {"max_model_len": longest, "skip_tokenizer_init": True}
        return self._started(lambda options: Engine(self._folder, {**own, **options}), longest)

    def language_model(self) -> Any:
        """lm-eval's own ``vllm`` model.

        Raises:
            EngineError: it did not start.
        """
        from rrsq.vllm.engine import Engine

        made: list[Any] = []

        def start(options: Mapping[str, Any]) -> Engine:
            made.append(_lm_eval_model(self._folder, options))
            return Engine.around(made[0].model)

        self._started(start, None)
        return made[0]

    def _started(self, start: Callable[[Mapping[str, Any]], Engine], longest: int | None) -> Engine:
        self.close()
        settings = self._settings
        options: dict[str, Any] = {
            "dtype": settings.dtype,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "gpu_memory_utilization": _GPU_MEMORY,
            "max_num_seqs": _REQUESTS,
            "enable_prefix_caching": False,
        }
        self._engine, self._longest = start({**options, **settings.options}), longest
        self.dtype = self._engine.dtype
        return self._engine

    def close(self) -> None:
        """End the engine, if there is one."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def _lm_eval_model(folder: str, options: Mapping[str, Any]) -> Any:
    """lm-eval imports vLLM when this module of it is imported."""
    from rrsq.vllm.engine import set_environment

    set_environment()
    try:
        from lm_eval.models.vllm_causallms import VLLM

        return VLLM(pretrained=folder, **options)
    except Exception as error:
        raise EngineError.of(f"lm-eval's vllm model did not start with '{folder}'", error) from error


def check_served(
    models: Sequence[str], tasks: Sequence[Task], data_root: Path | None, settings: EngineSettings
) -> str | None:
    """Refuse what vLLM cannot do, before anything is fetched or loaded.

    Returns:
        A warning, or None.

    Raises:
        UsageError: a task needs more than vLLM hands out; vLLM is not there; a model cannot be served.
        ModelLoadError: there is no such model.
        CheckpointError: a checkpoint is damaged.
    """
    from rrsq.vllm.engine import check_engine, served_folder

    for task in tasks:
        if not isinstance(task, ServableTask):
            names = ", ".join(task.names)
            raise UsageError(
                f"--engine vllm cannot measure {names}: it compares probabilities of the whole vocabulary,"
                " and vLLM hands out those of a few tokens. Leave it out, or use --engine transformers."
            )
    warning = None
    for model in models:
        checkpoint = served_folder(model, data_root)
        warning = check_engine(checkpoint, settings.tensor_parallel_size)
    return warning


def evaluate_served(
    models: Sequence[str],
    tasks: Sequence[Task],
    options: TaskOptions,
    settings: EngineSettings,
    on_step: StepCallback = lambda model, doing, done, total, text: None,
) -> list[ModelReport]:
    """Run prepared tasks on one model after the other, each in vLLM.

    Args:
        models: paths or Hub ids, the reference first.
        tasks: prepared, and passed by :func:`check_served`.
        options: for all tasks.
        settings: of vLLM.
        on_step: told of progress.
    """
    from rrsq.runtime.format.loading import load_tokenizer

    reports = []
    for path in models:
        on_step(path, "loading", 0, 0, "")
        tokenizer = load_tokenizer(path, data_root=options.data_root)
        model = ServedModel(path, options.data_root, settings)
        results: list[TaskResult] = []
        try:
            for task in tasks:
                doing = ", ".join(task.names)

                def on_progress(
                    done: int, total: int, text: str, path: str = path, doing: str = doing
                ) -> None:
                    on_step(path, doing, done, total, text)

                on_step(path, doing, 0, 0, "")
                assert isinstance(task, ServableTask)
                found = task.run_served(model, tokenizer, replace(options, on_progress=on_progress))
                results += (result for several in found.values() for result in several)
        finally:
            model.close()
        method = quantization_method(model.config)
        reports.append(ModelReport(path, _device(settings), model.dtype, method, tuple(results)))
    return reports


def _device(settings: EngineSettings) -> str:
    from rrsq.vllm.engine import device_name

    count = settings.tensor_parallel_size
    return f"vLLM on {device_name()}" + (f" x {count}" if count > 1 else "")
