"""lm-eval's tasks through rrsq, against lm-eval run without it on data that it is given by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks import __file__ as lm_eval_tasks

from rrsq.errors import DataError, UsageError
from rrsq.evaluation.harness import model as harness_model
from rrsq.evaluation.harness.batches import plan_batches, token_budget, tokens_share_scales
from rrsq.evaluation.harness.task import HarnessTasks
from rrsq.evaluation.results import TaskResult
from rrsq.evaluation.tasks import TaskOptions, parse_tasks
from rrsq.runtime.format.loading import load_model, load_tokenizer
from tiny_quantized import quantize_tiny, recipe_of

FOLDER = Path(lm_eval_tasks).parent
# Short name, lm-eval's name and YAML file, and the files of each split, below the data root.
BY_HAND = {
    "arc_e": ("arc_easy", "arc/arc_easy.yaml", "allenai/ai2_arc/ARC-Easy", ("train", "test")),
    "arc_c": ("arc_challenge", "arc/arc_challenge.yaml", "allenai/ai2_arc/ARC-Challenge", ("test",)),
    "boolq": ("boolq", "super_glue/boolq/default.yaml", "aps/super_glue/boolq", ("validation",)),
    "obqa": ("openbookqa", "openbookqa/openbookqa.yaml", "allenai/openbookqa/main", ("test",)),
}


def write_by_hand(hub: Path, folder: Path) -> TaskManager:
    """lm-eval's tasks on parquet files of the data root, without rrsq."""
    for task, (_, original, data, splits) in BY_HAND.items():
        files = {split: str(hub / data / f"{split}-00000-of-00001.parquet") for split in splits}
        config: dict[str, Any] = {"include": str(FOLDER / original), "dataset_path": "parquet"}
        config |= {"dataset_name": None, "dataset_kwargs": {"data_files": files}}
        config |= {
            f"{split}_split": split if split in splits else None for split in ("training", "validation")
        }
        config["training_split"] = "train" if "train" in splits else None
        config["test_split"] = "test" if "test" in splits else None
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return TaskManager(include_path=str(folder), include_defaults=False)


def lm_eval_alone(model: Path, manager: TaskManager, tasks: list[str], **options: Any) -> dict[str, Any]:
    """What lm-eval gives when it loads the model and asks one question at a time."""
    arguments = {"pretrained": str(model), "dtype": "float32"}
    names = [BY_HAND[task][0] for task in tasks]
    found = simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=names,
        device="cpu",
        batch_size=1,
        task_manager=manager,
        **options,
    )
    assert found is not None
    return dict(found["results"])


def ask(names: list[str], folder: Path, options: TaskOptions) -> list[TaskResult]:
    tasks = HarnessTasks(tuple(names))
    tasks.prepare(options)
    model = load_model(str(folder), device="cpu", dtype="float32")
    measured = tasks.run(model, load_tokenizer(str(folder)), options)
    return [result for name in names for result in measured[name]]


def assert_equal(result: TaskResult, expected: dict[str, Any]) -> None:
    for metric in result.metrics:
        assert metric.value == expected[f"{metric.name},none"]
        assert metric.stderr == pytest.approx(expected[f"{metric.name}_stderr,none"])


@pytest.fixture
def own_manager(tiny_task_hub: Path, tmp_path: Path) -> TaskManager:
    return write_by_hand(tiny_task_hub, tmp_path)


def test_numbers_are_those_of_lm_eval_alone(
    tiny_llama_dir: Path, tiny_qwen2_dir: Path, tiny_task_hub: Path, own_manager: TaskManager
) -> None:
    names = list(BY_HAND)
    said: list[tuple[int, int, str]] = []
    options = TaskOptions(data_root=tiny_task_hub, on_progress=lambda *call: said.append(call))
    tasks = HarnessTasks(tuple(names))
    tasks.prepare(options)
    for folder in (tiny_llama_dir, tiny_qwen2_dir):  # The prepared tasks serve one model after the other.
        model = load_model(str(folder), device="cpu", dtype="float32")
        measured = tasks.run(model, load_tokenizer(str(folder)), options)
        results = [result for name in names for result in measured[name]]
        expected = lm_eval_alone(folder, own_manager, names)
        assert [result.task for result in results] == names
        for result in results:
            assert_equal(result, expected[BY_HAND[result.task][0]])
    metrics = {result.task: [metric.name for metric in result.metrics] for result in results}
    assert metrics == {name: ["acc_norm", "acc"] for name in names} | {"boolq": ["acc"]}
    requests = 4 * (24 + 16 + 16) + 2 * 20
    assert said[-1][:2] == (requests, requests)


def test_solved_examples_and_limit_are_lm_evals(
    tiny_llama_dir: Path, tiny_task_hub: Path, own_manager: TaskManager
) -> None:
    options = TaskOptions(data_root=tiny_task_hub, limit=9, num_fewshot=2)
    (result,) = ask(["arc_e"], tiny_llama_dir, options)
    expected = lm_eval_alone(tiny_llama_dir, own_manager, ["arc_e"], limit=9, num_fewshot=2)
    assert_equal(result, expected["arc_easy"])
    assert result.details["num_questions"] == 9
    assert "2-shot, the first 9 questions" in result.convention
    (zero_shot,) = ask(["arc_e"], tiny_llama_dir, TaskOptions(data_root=tiny_task_hub, limit=9))
    assert zero_shot.data_fingerprint != result.data_fingerprint


def test_a_group_is_averaged_as_lm_eval_does(tiny_llama_dir: Path, tiny_task_hub: Path) -> None:
    (result,) = ask(["mmlu_other"], tiny_llama_dir, TaskOptions(data_root=tiny_task_hub))
    each = [metrics["acc"] for metrics in result.details["tasks"].values()]
    assert result.task == "mmlu_other"
    assert len(each) == 13
    assert result.details["num_questions"] == 39
    assert result.headline.value == pytest.approx(sum(each) / 13)  # All subjects have three questions.
    assert result.headline.stderr is not None


def test_batches_do_not_change_the_numbers(tiny_llama_dir: Path, tiny_task_hub: Path) -> None:
    runs = [
        ask(["arc_e", "boolq"], tiny_llama_dir, TaskOptions(data_root=tiny_task_hub, batch_size=size))
        for size in (1, 7, None)
    ]
    for other in runs[1:]:
        assert [result.metrics for result in other] == [result.metrics for result in runs[0]]


def test_all_tasks_run_in_one_call(
    tiny_llama_dir: Path, tiny_task_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    original = harness_model.LoadedModel.loglikelihood

    def count(self: Any, requests: list[Any], disable_tqdm: bool = False) -> Any:
        calls.append(len(requests))
        return original(self, requests, disable_tqdm)

    monkeypatch.setattr(harness_model.LoadedModel, "loglikelihood", count)
    tasks = parse_tasks("arc_e,text:x.txt,boolq")
    assert [task.names for task in tasks] == [("text:x.txt",), ("arc_e", "boolq")]
    ask(["arc_e", "boolq"], tiny_llama_dir, TaskOptions(data_root=tiny_task_hub, limit=5))
    assert calls == [5 * 4 + 5 * 2]


def test_less_memory_than_thought_halves_the_batches(
    tiny_llama_dir: Path, tiny_task_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widest: list[int] = []
    original = harness_model.LoadedModel._model_call

    def small_device(self: Any, inps: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if inps.numel() > 300:
            raise torch.OutOfMemoryError("more than this device has")
        widest.append(inps.numel())
        return original(self, inps, *args, **kwargs)

    monkeypatch.setattr(harness_model.LoadedModel, "_model_call", small_device)
    options = TaskOptions(data_root=tiny_task_hub)
    (result,) = ask(["boolq"], tiny_llama_dir, options)
    assert 150 < max(widest) <= 300
    monkeypatch.undo()
    assert ask(["boolq"], tiny_llama_dir, options)[0].metrics == result.metrics
    monkeypatch.setattr(harness_model.LoadedModel, "_model_call", small_device)
    with pytest.raises(torch.OutOfMemoryError):
        ask(["boolq"], tiny_llama_dir, TaskOptions(data_root=tiny_task_hub, batch_size=20))


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_batches_hold_as_many_tokens_as_allowed(lengths: list[int], budget: int) -> None:
    lengths = sorted(lengths, reverse=True)
    plan = plan_batches(lengths, budget)
    assert len(plan) == len(lengths)
    start = 0
    while start < len(lengths):
        size = plan[start]
        assert plan[start : start + size] == [size] * size
        assert size == 1 or size * lengths[start] <= budget
        is_last = start + size == len(lengths)
        assert is_last or (size + 1) * lengths[start] > budget
        start += size


@pytest.mark.parametrize(
    ("recipe", "shared"), [("rrs-w4a4kv4", False), ("quarot-w4a4kv4", False), ("rrs-paper-w4a4kv4", True)]
)
def test_models_whose_tokens_share_scales_are_asked_one_question_at_a_time(
    tiny_llama_dir: Path, recipe: str, shared: bool
) -> None:
    model: Any = quantize_tiny(tiny_llama_dir, recipe_of(recipe)).model
    assert tokens_share_scales(model) is shared
    lm = harness_model.LoadedModel(model, load_tokenizer(str(tiny_llama_dir)))
    assert lm.batch_size == (1 if shared else "auto")
    assert harness_model.LoadedModel(model, load_tokenizer(str(tiny_llama_dir)), 3).batch_size == 3


def test_budget_shrinks_with_the_free_memory(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rrsq.evaluation.harness import batches

    model = load_model(str(tiny_llama_dir), device="cpu", dtype="float32")
    per_token = 2 * 512 * 4 + 4 * (4 * 160 + 8 * 96)
    for free, expected in ((2 * 10 * per_token, 10), (0, 1), (10**12, batches.MOST_TOKENS["cpu"])):
        memory = type("Memory", (), {"available": free})
        monkeypatch.setattr(batches.psutil, "virtual_memory", lambda memory=memory: memory)
        assert token_budget(model) == expected


def test_a_tag_gives_each_of_its_tasks_and_unknown_names_their_neighbours(
    tiny_llama_dir: Path, tiny_task_hub: Path
) -> None:
    options = TaskOptions(data_root=tiny_task_hub, limit=2)
    results = ask(["ai2_arc"], tiny_llama_dir, options)
    assert [result.task for result in results] == ["arc_challenge", "arc_easy"]
    with pytest.raises(UsageError, match=r"no task 'wikitxt2'\. Did you mean 'wikitext2' or .*wikitext"):
        HarnessTasks(("wikitxt2",)).prepare(options)
    with pytest.raises(UsageError, match=r"no task 'arc_esay'\. Did you mean .*'arc_easy'"):
        HarnessTasks(("arc_esay",)).prepare(options)


def test_wrong_requests_say_what_is_wrong(tiny_task_hub: Path, tmp_path: Path) -> None:
    options = TaskOptions(data_root=tiny_task_hub)
    with pytest.raises(UsageError, match="'arc_e' and 'arc_easy' both hold lm-eval's task 'arc_easy'"):
        HarnessTasks(("arc_e", "arc_easy")).prepare(options)
    looked = f"(?s)'piqa' needs the data set baber/piqa.*looked in {tiny_task_hub}/baber/piqa, which is not"
    with pytest.raises(DataError, match=looked):
        HarnessTasks(("piqa",)).prepare(options)
    fewshot = TaskOptions(data_root=tiny_task_hub, num_fewshot=1)
    folder = tiny_task_hub / "allenai" / "ai2_arc"
    with pytest.raises(DataError, match=f"needs the split 'train'.*{folder} holds only.*test"):
        HarnessTasks(("arc_c",)).prepare(fewshot)
    broken = tmp_path / "Rowan" / "hellaswag"
    broken.mkdir(parents=True)
    (broken / "validation.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=f"The data of task 'hellaswag' in {broken} cannot be"):
        HarnessTasks(("hellaswag",)).prepare(TaskOptions(data_root=tmp_path))


def test_without_lm_eval_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"Did you mean 'wikitext2'.*pip install \"rrsq\[eval\]\""):
        HarnessTasks(("wikitxt2",)).prepare(TaskOptions())
