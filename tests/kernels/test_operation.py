"""What an operation is: its op, its choice of a kernel, and what governs the choice."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rrsq import kernels
from rrsq.errors import KernelUnavailableError
from rrsq.kernels import operation as module
from rrsq.kernels.operation import Constraints, Target, operation, operations, use_kernels

CPU = torch.device("cpu")


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _sizes(x: Tensor, *_: object) -> tuple[tuple[str, int], ...]:
    return (("channels", x.shape[1]),)


@operation(fake=_fake, sizes=_sizes, dtypes=("x",), typical={"channels": 8})
def times_two_plus(x: Tensor, addend: float, twice: bool = True, mask: Tensor | None = None) -> Tensor:
    """``2 x + addend``."""
    y = (2 * x if twice else x) + addend
    return y if mask is None else y * mask


@times_two_plus.kernel(
    "triton",
    Constraints(divisible={"channels": 4}, dtypes={"x": frozenset({torch.float32})}),
)
def _marked(x: Tensor, addend: float, twice: bool, mask: Tensor | None) -> Tensor:
    """Recognizable: the result is negative."""
    return -times_two_plus.reference(x, addend, twice, mask)


@operation(fake=lambda *_: None, mutates=("total",))
def add_to(total: Tensor, x: Tensor) -> None:
    """``total += x``."""
    total += x


# Other tests list all operations, before these run and after.
_OWN = {name: module._operations.pop(name) for name in ("times_two_plus", "add_to")}


@pytest.fixture(scope="module", autouse=True)
def known() -> Iterator[None]:
    module._operations.update(_OWN)
    yield
    for name in _OWN:
        module._operations.pop(name)


X = torch.arange(8.0).view(2, 4)


@pytest.fixture
def environment(monkeypatch):
    """Sets ``RRSQ_KERNELS``, which is read once in a process."""

    def set_to(backend: str) -> None:
        monkeypatch.setenv("RRSQ_KERNELS", backend)
        module._from_environment.cache_clear()

    yield set_to
    monkeypatch.undo()
    module._from_environment.cache_clear()


def test_the_schema_is_that_of_the_signature():
    schema = str(torch.ops.rrsq.times_two_plus.default._schema)
    assert schema == (
        "rrsq::times_two_plus(Tensor x, float addend, bool twice=True, Tensor? mask=None) -> Tensor"
    )
    assert str(torch.ops.rrsq.add_to.default._schema) == "rrsq::add_to(Tensor(a0!) total, Tensor x) -> ()"
    assert operations()["times_two_plus"] is times_two_plus
    assert times_two_plus.__doc__ == "``2 x + addend``."


def test_arguments_are_bound_as_python_does():
    expected = 2 * X + 1
    for actual in (
        times_two_plus(X, 1.0),
        times_two_plus(x=X, addend=1.0),
        times_two_plus(X, addend=1.0, twice=True),
        times_two_plus(X, 1.0, True, None),
        torch.ops.rrsq.times_two_plus(X, 1.0),
    ):
        assert torch.equal(actual, expected)
    assert torch.equal(times_two_plus(X, 1.0, mask=torch.zeros(4)), torch.zeros(2, 4))
    with pytest.raises(TypeError, match="addend"):
        times_two_plus(X)
    with pytest.raises(TypeError, match="other"):
        times_two_plus(X, 1.0, other=2)


def test_the_best_capable_kernel_is_called():
    with use_kernels("triton"):
        assert torch.equal(times_two_plus(X, 1.0), -(2 * X + 1))
        assert torch.equal(torch.ops.rrsq.times_two_plus(X, 1.0), -(2 * X + 1))
        with pytest.raises(KernelUnavailableError, match="channels = 3 is not a multiple of 4"):
            times_two_plus(X[:, :3], 1.0)
        with pytest.raises(KernelUnavailableError, match=r"x of torch\.float64 is not supported"):
            times_two_plus(X.double(), 1.0)
    assert torch.equal(times_two_plus(X[:, :3], 1.0), 2 * X[:, :3] + 1)


def test_a_bound_implementation_is_the_chosen_one():
    assert times_two_plus.bind(CPU, channels=4, x=torch.float32) is times_two_plus.reference
    with use_kernels("triton"):
        assert times_two_plus.bind(CPU, channels=4) is _marked
        with pytest.raises(KernelUnavailableError, match="no kernel for times_two_plus on cpu"):
            times_two_plus.bind(CPU, channels=5)


def test_a_kernel_that_comes_later_is_considered():
    @operation(fake=_fake)
    def late(x: Tensor) -> Tensor:
        return x + 1

    module._operations.pop("late")  # type: ignore[attr-defined]
    with use_kernels("eager"):
        assert torch.equal(late(X), X + 1)
        late.kernel("eager", Constraints())(lambda x: x + 2)
        assert torch.equal(late(X), X + 2)
        late.kernel("eager", Constraints(), priority=5)(lambda x: x + 3)
        assert torch.equal(late(X), X + 2)


def test_tensors_without_data_give_shapes():
    meta = times_two_plus(X.to("meta"), 1.0)
    assert (meta.device.type, meta.shape) == ("meta", X.shape)
    with torch._subclasses.FakeTensorMode() as mode:
        assert times_two_plus(mode.from_tensor(X), 1.0).shape == X.shape


def test_compiled_code_holds_the_op_and_follows_use_kernels():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: times_two_plus(x + 1, addend=1.0) - 1, fullgraph=True, backend=backend)
    assert torch.equal(compiled(X), 2 * (X + 1))
    with use_kernels("triton"):
        assert torch.equal(compiled(X), -(2 * (X + 1) + 1) - 1)
    assert len(graphs) == 1
    assert torch.ops.rrsq.times_two_plus in [node.target for node in graphs[0].graph.nodes]


def test_an_op_that_writes_to_its_argument():
    def twice(total, x):
        add_to(total, x)
        add_to(total, x)
        return total + 1

    for function in (twice, torch.compile(twice, fullgraph=True, backend="aot_eager")):
        total = X.clone()
        assert torch.equal(function(total, X), 3 * X + 1)
        assert torch.equal(total, 3 * X)


def test_use_kernels_holds_for_its_own_thread():
    results, inside, checked = {}, threading.Event(), threading.Event()

    def with_kernels():
        with use_kernels("triton"):
            inside.set()
            assert checked.wait(10)
            results["asked"] = times_two_plus(X, 1.0)

    def without():
        assert inside.wait(10)
        results["other"] = times_two_plus(X, 1.0)
        checked.set()

    threads = [threading.Thread(target=target) for target in (with_kernels, without)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(results["asked"], -results["other"])


def test_use_kernels_wins_over_the_environment(environment):
    environment("triton")
    assert module.forced_backend() == "triton"
    assert torch.equal(times_two_plus(X, 1.0), -(2 * X + 1))
    with use_kernels("eager"):
        assert module.forced_backend() == "eager"
        assert torch.equal(times_two_plus(X, 1.0), 2 * X + 1)
    assert module.forced_backend() == "triton"


def test_use_kernels_is_undone_by_an_error():
    with pytest.raises(KeyError), use_kernels("triton"):
        raise KeyError
    assert module.forced_backend() is None


@pytest.mark.parametrize(("current", "switched"), [(0, True), (1, False)])
def test_a_call_on_another_gpu_than_the_current_one_switches(monkeypatch, current, switched):
    """A machine with two GPUs, as far as the choice can tell."""
    used = []

    class Device:
        def __init__(self, device):
            used.append(device.index)

        def __enter__(self): ...

        def __exit__(self, *_): ...

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", Device)
    run = times_two_plus.bind(torch.device("cuda", 1), channels=4)
    assert torch.equal(run(X, 1.0, True, None), -(2 * X + 1))
    assert used == ([1] if switched else [])


@pytest.mark.gpu
def test_a_call_on_the_second_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    from rrsq import kernels

    packed = torch.randint(0, 256, (8, 64), dtype=torch.uint8)
    expected = kernels.weight_operand(packed)
    assert torch.cuda.current_device() == 0
    assert torch.equal(kernels.weight_operand(packed.to("cuda:1")).cpu(), expected)


def test_constraints_of_sizes_and_dtypes():
    constraints = Constraints(
        divisible={"k": 8},
        at_least={"n": 4},
        at_most={"k": 64},
        power_of_two=frozenset({"n"}),
        dtypes={"x": frozenset({torch.float16})},
    )
    assert constraints.violations(Target("cpu"), {"k": 68, "other": 3, "n": 3, "x": torch.float32}) == [
        "k = 68 is not a multiple of 8",
        "k = 68 is more than 64",
        "n = 3 is less than 4",
        "n = 3 is not a power of two",
        "x of torch.float32 is not supported",
    ]
    assert constraints.violations(Target("cpu"), {"k": 64, "n": 4, "x": torch.float16}) == []
    assert Constraints().violations(Target("cpu"), {"k": 68}) == []


@pytest.mark.parametrize(
    "constraints",
    [{"at_most": {"tokens": 65}}, {"at_least": {"tokens": 66}}, {"divisible": {"tokens": 8}}],
    ids=lambda constraints: next(iter(constraints)),
)
def test_a_constraint_may_not_tell_tokens_of_a_size_class_apart(constraints):
    with pytest.raises(ValueError, match="one size class"):
        times_two_plus.kernel("triton", Constraints(**constraints))
    Constraints(at_most={"tokens": 64}, at_least={"tokens": 65}).check_token_classes()


def test_reasons_come_with_the_best_kernel_first():
    triton, eager = times_two_plus.explain(Target("cpu"), {"channels": 6})
    assert (triton.kernel.backend, eager.kernel.backend) == ("triton", "eager")
    assert triton.reasons == (
        "on a CPU the interpreter only runs when asked for",
        "channels = 6 is not a multiple of 4",
    )
    assert eager.reasons == ()


def test_constraints_of_a_device():
    constraints = Constraints.on_gpu()
    gpu, old = Target("cuda", (9, 0), assumed=True), Target("cuda", (7, 5), assumed=True)
    assert constraints.violations(gpu, {}) == []
    assert constraints.violations(old, {}) == ["needs compute capability 8.0, this device has 7.5"]
    assert Constraints(modules=("no_such_package",)).violations(Target("cuda", (9, 0)), {}) == [
        "the package no_such_package is not installed"
    ]


def test_a_cpu_runs_the_interpreter_only_when_asked(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert Constraints.on_gpu().violations(Target("cpu"), {}) == []
    assert times_two_plus.select(Target("cpu"), {}).backend == "eager"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert Constraints.on_gpu().violations(Target("cpu"), {}) == ["runs on cuda, not on cpu"]


IMPORT_WITHOUT_TRITON = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
import torch
torch.cuda.is_available = torch.cuda.get_device_capability = None
from rrsq import kernels
packed = torch.full((2, 8), 0x79, dtype=torch.uint8)
assert kernels.weight_operand(packed).tolist() == [[1] * 8 + [-1] * 8] * 2
assert "triton" not in sys.modules
"""


def test_kernels_are_imported_without_triton_and_ask_for_no_gpu():
    subprocess.run([sys.executable, "-c", IMPORT_WITHOUT_TRITON], check=True)


def test_a_kernel_without_triton_says_so():
    from rrsq.kernels._triton import _Triton

    @_Triton.jit
    def kernel(): ...

    @_Triton.jit(do_not_specialize=["tokens"])
    def another(): ...

    for function in (kernel, another):
        with pytest.raises(ModuleNotFoundError, match="needs triton"):
            function[(1,)]()


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("leading", [(1, 1), (2, 3), (5, 13)], ids=str)
def test_prepared_rows_keep_their_leading_dimensions(backend, leading, device):
    """Of one token, of a few (prepared for their shape) and of many (for any number)."""
    if backend == "triton":
        pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*leading, 64, generator=generator).to(device)
    packed = torch.randint(0, 256, (24, 32), generator=generator, dtype=torch.uint8).to(device)
    multiplier = torch.randint(1, 16, (24, 2), generator=generator, dtype=torch.uint8).to(device)
    scale = torch.rand(24, generator=generator).to(device)
    with kernels.use_kernels(backend):
        operand, scales = kernels.quantize_signed.prepare(x, 4, 16, 16)(x)
        weight = packed, scale, multiplier, None, torch.float32, None
        y = kernels.linear_int8.prepare(operand, scales, *weight)(operand, scales)
        expected, expected_scales = kernels.quantize_signed(x.flatten(0, 1), 4, 16, 16)
        product = kernels.linear_int8(expected, expected_scales, *weight)
    assert (operand.shape, scales.shape, y.shape) == (x.shape, (x[..., 0].numel(),), (*leading, 24))
    assert torch.equal(operand.flatten(0, 1), expected)
    assert torch.equal(y.flatten(0, 1), product)
