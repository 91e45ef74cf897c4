"""Plans: tables that ship, the user's cache, and the rule where there is neither."""

from __future__ import annotations

import json
from importlib import resources

import pytest
import torch

from rrsq.errors import UsageError
from rrsq.kernels import plans as tuning
from rrsq.kernels.plans import FusedPlan, GemvPlan, TwoPassPlan, plan_from_data, plan_to_data

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_tables(monkeypatch, tmp_path):
    monkeypatch.setenv("RRSQ_CACHE", str(tmp_path))
    tuning.reload_tables()
    yield
    tuning.reload_tables()


def shipped_tables():
    folder = resources.files("rrsq.kernels") / "tuned"
    return [path for path in folder.iterdir() if path.name.endswith(".json")]


@pytest.mark.parametrize("path", shipped_tables(), ids=lambda path: path.name)
def test_shipped_tables_hold_known_plans(path):
    for shape, plans in json.loads(path.read_text())["linear_int8"].items():
        assert all(int(part) > 0 for part in shape.split("x"))
        for tokens, data in plans.items():
            plan = plan_from_data(data)
            assert plan_to_data(plan) == data
            assert int(tokens) == 1 or not isinstance(plan, GemvPlan)


def test_few_tokens_take_the_kernels_that_unpack_in_registers():
    assert isinstance(tuning.plan_for(1, 4096, 4096, True, CPU), GemvPlan)
    assert isinstance(tuning.plan_for(2, 4096, 4096, True, CPU), FusedPlan)
    assert isinstance(tuning.plan_for(4096, 4096, 4096, True, CPU), TwoPassPlan)


def test_rows_that_have_no_words_take_two_passes():
    assert isinstance(tuning.plan_for(1, 4096, 100, False, CPU), TwoPassPlan)


def test_the_cache_of_the_user_comes_first():
    plan = FusedPlan(32, 64, 64, 1, 4, 2)
    table = {"linear_int8": {"64x64": {"1000": plan_to_data(plan)}}}
    tuning.cache_path(CPU).write_text(json.dumps(table))
    tuning.reload_tables()
    assert tuning.plan_for(7, 640, 640, True, CPU) == plan
    assert isinstance(tuning.plan_for(7, 640, 640, False, CPU), TwoPassPlan)


@pytest.mark.parametrize("text", ["{", "{}", '{"linear_int8": {"64x64": {"1": {"kind": "magic"}}}}'])
def test_a_broken_cache_is_named(text):
    tuning.cache_path(CPU).write_text(text)
    tuning.reload_tables()
    with pytest.raises(UsageError, match=r"kernels-cpu\.json cannot be read"):
        tuning.plan_for(1, 64, 64, True, CPU)
