"""All lm-eval tasks of a run, as one task: they are prepared together and run in one call of lm-eval."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rrsq.errors import UsageError
from rrsq.evaluation.results import TaskResult
from rrsq.evaluation.tasks import TaskOptions
from rrsq.quantizer.calibration.text import quiet_datasets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rrsq.evaluation.harness.catalogue import PreparedTasks
    from rrsq.evaluation.served import ServedModel

__all__ = ["HarnessTasks"]

# lm-eval's, which makes the choice of solved examples reproducible.
DEFAULT_SEED = 1234


class HarnessTasks:
    """Tasks of lm-eval by short name (``arc_e``) or by lm-eval's name of a task, group or tag.

    Args:
        names: as they were asked for.
    """

    needs_reference = False
    over_windows = False

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._prepared: PreparedTasks | None = None

    def prepare(self, options: TaskOptions) -> None:
        """Find the tasks and load their data.

        Raises:
            UsageError: lm-eval is not installed, has no such task, or a task was named twice.
            DataError: the data of a task are neither under the data root nor on the Hub.
        """
        _require_lm_eval(self.names)
        with _quiet():
            from rrsq.evaluation.harness.catalogue import prepare_tasks

            self._prepared = prepare_tasks(self.names, options.data_root, options.num_fewshot)

    def data_keys(self) -> dict[str, str]:
        """By name, SHA-256 (hex) of all its questions."""
        return {entry.asked: _digest(entry.tasks()) for entry in self._ready().entries}

    def select(self, names: Sequence[str]) -> HarnessTasks:
        """The tasks of some of the names, prepared as they are."""
        selected = HarnessTasks(tuple(name for name in self.names if name in names))
        selected._prepared = self._ready().select(names)
        return selected

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: TaskOptions
    ) -> dict[str, list[TaskResult]]:
        """Ask the model all questions. A name has one result; that of a tag, one for each of its tasks."""
        import torch

        prepared = self._ready()
        started = time.perf_counter()
        with _quiet():
            from rrsq.evaluation.harness.model import LoadedModel

            report = options.on_progress
            lm = LoadedModel(
                model,
                tokenizer,
                options.batch_size,
                None if report is None else lambda done, total: report(done, total, ""),
            )
            while True:
                try:
                    document = self._evaluate(lm, options)
                    break
                except torch.OutOfMemoryError:
                    if not lm.halve_budget():
                        raise
        seconds = time.perf_counter() - started

        from rrsq.evaluation.harness.read import read_results

        return read_results(document, prepared, options, seconds)

    def run_served(
        self, model: ServedModel, tokenizer: PreTrainedTokenizerBase, options: TaskOptions
    ) -> dict[str, list[TaskResult]]:
        """The same through lm-eval's own model of the engine, which has its own tokenizer and batches."""
        from rrsq.evaluation.harness.read import read_results

        started = time.perf_counter()
        with _quiet():
            document = self._evaluate(model.language_model(), options)
        return read_results(document, self._ready(), options, time.perf_counter() - started)

    def _evaluate(self, lm: Any, options: TaskOptions) -> dict[str, Any]:
        """Run lm-eval with its own seeds; its ``simple_evaluate`` would also ask git, pip and the Hub."""
        from lm_eval.evaluator import evaluate

        _set_seeds()
        prepared = self._ready()
        for task in prepared.tasks():
            _set_fewshot(task, options.num_fewshot)
        document = evaluate(lm=lm, task_dict=prepared.loaded(), limit=options.limit, log_samples=False)
        assert document is not None
        return dict(document)

    def _ready(self) -> PreparedTasks:
        if self._prepared is None:
            raise RuntimeError("prepare() has not been called")
        return self._prepared


def _digest(tasks: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for task in tasks:
        for document in task.eval_docs:
            digest.update(json.dumps([task.task_name, document], default=str, sort_keys=True).encode())
    return digest.hexdigest()


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """Set a task's number of solved examples by lm-eval's rule: a task that says 0 keeps it."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=DEFAULT_SEED)


def _set_seeds() -> None:
    """Seed all generators as lm-eval does at the start of a run."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(DEFAULT_SEED)
    torch.manual_seed(DEFAULT_SEED)


def _require_lm_eval(names: tuple[str, ...]) -> None:
    from importlib.util import find_spec

    from rrsq.errors import did_you_mean
    from rrsq.evaluation.harness.names import INSTALL_HINT, SHORT_NAMES
    from rrsq.evaluation.tasks import task_kinds

    if find_spec("lm_eval") is None:
        known = [*task_kinds(), *SHORT_NAMES]
        hints = "".join(did_you_mean(name, known) for name in names if name not in known)
        raise UsageError(
            f"{', '.join(names)}: tasks of lm-eval, which is not installed.{hints} {INSTALL_HINT}"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what lm-eval and datasets say, print or draw off the terminal; errors pass."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet_datasets(), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
