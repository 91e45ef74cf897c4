"""Which kernel is chosen, and what is said where none is."""

from __future__ import annotations

import pytest
import torch

from rrsq import kernels
from rrsq.errors import KernelUnavailableError, UsageError
from rrsq.kernels.dispatch import Call, Constraints, explain, forced_backend, kernels_of, operations, select
from rrsq.kernels.operation import _from_environment
from rrsq.kernels.registry import OPERATIONS

CPU = torch.device("cpu")


def test_every_operation_has_an_eager_and_a_triton_kernel():
    assert set(operations()) == {*OPERATIONS, "gptq_block"}
    for operation in OPERATIONS:
        assert {kernel.backend for kernel in kernels_of(operation)} == {"eager", "triton"}
        for kernel in kernels_of(operation):
            if kernel.backend == "eager":
                assert callable(kernel.load())


def test_a_cpu_uses_the_reference_unless_asked():
    assert select(Call("linear_folded", CPU)).backend == "eager"


@pytest.fixture
def environment(monkeypatch):
    """Sets ``RRSQ_KERNELS``, which is read once in a process."""

    def set_to(backend: str) -> None:
        monkeypatch.setenv("RRSQ_KERNELS", backend)
        _from_environment.cache_clear()

    yield set_to
    monkeypatch.undo()
    _from_environment.cache_clear()


def test_context_manager_wins_over_the_environment(environment):
    environment("triton")
    assert forced_backend() == "triton"
    with kernels.use_kernels("eager"):
        assert forced_backend() == "eager"
    assert forced_backend() == "triton"
    environment("cutlass")
    with pytest.raises(UsageError, match="RRSQ_KERNELS must be one of eager, triton"):
        forced_backend()
    with pytest.raises(UsageError), kernels.use_kernels("cutlass"):
        pass


def test_error_lists_every_candidate_with_its_reasons(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    call = Call("quantize_folded", CPU, (("x", torch.float64),), (("channels", 8), ("group_size", 24)))
    with kernels.use_kernels("triton"), pytest.raises(KernelUnavailableError) as caught:
        select(call)
    message = str(caught.value)
    assert "eager.quantize_folded: the backend triton was asked for" in message
    for reason in (
        "runs on cuda, not on cpu",
        "x of torch.float64 is not supported",
        "channels = 8 is less than 32",
        "group_size = 24 is not a power of two",
    ):
        assert reason in message


def test_constraints():
    constraints = Constraints(divisible={"k": 8}, at_most={"k": 64}, modules=("no_such_package",))
    call = Call("linear_folded", CPU, (), (("k", 68), ("other", 3)))
    assert constraints.violations(call) == [
        "the package no_such_package is not installed",
        "k = 68 is not a multiple of 8",
        "k = 68 is more than 64",
    ]
    assert Constraints().violations(call) == []


def test_explain_puts_the_best_first_and_gives_reasons():
    candidates = explain(Call("linear_folded", CPU))
    assert [candidate.kernel.backend for candidate in candidates] == ["triton", "eager"]
    assert candidates[0].reasons
    assert not candidates[1].reasons


def test_report_names_the_kernel_of_each_operation():
    reports = kernels.kernel_report("cpu")
    assert [report.operation for report in reports] == list(OPERATIONS)
    for report in reports:
        assert report.chosen == f"eager.{report.operation}"
        assert report.rejected[0][0] == f"triton.{report.operation}"
