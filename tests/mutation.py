"""Mutation testing: would a test fail if this line were wrong?

    python tests/mutation.py run RESULTS.json [MODULE ...] [--mutants 30] [--seed 0] [-j 2] [--minutes 60]
        [--seconds 300]
    python tests/mutation.py survivors RESULTS.json [MODULE ...] [-j 2]
    python tests/mutation.py report RESULTS.json

``run`` draws mutants of each module (all that TESTS names, or those given), puts one after the other into a
copy of the tree and runs the tests that TESTS maps to the module until one fails. A mutant is one small
change of one expression or statement. Results are written after each mutant; the same command goes on where
the last one stopped. ``survivors`` runs those again that no test noticed, after tests were added. A mutant
may be equivalent to the original, or concern what only a GPU runs: what survives is for a person to read.

All tests are run first with nothing changed. With ``--seconds`` they are not, and each mutant has so long: of
each only the test that noticed is run again with nothing changed, and "unsure" is what it does not pass then.

Processes are forked from one that has imported torch and transformers, so that a mutant takes hardly longer
than its tests. Linux only.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "src",
    "tests",
    "recipes",
    "docs",
    "examples",
    "README.md",
    "pyproject.toml",
    "Makefile",
    "constraints.txt",
)
SLOWER = 4
"""A mutant hangs if it takes so many times as long as its tests with nothing changed, and GRACE seconds."""
GRACE = 20

_K, _R = "src/rrsq/kernels", "src/rrsq/runtime"
_LINEAR = ["tests/kernels/test_linear_int8.py", "tests/kernels/test_operation.py"]
_CACHE = ["tests/runtime/kv_cache", "tests/kernels/test_cache.py"]
_DECODING = ["tests/kernels/test_cache_decoding.py", "tests/runtime/kv_cache/test_codes_cache.py"]
_MODULES = ["tests/runtime/modules/test_quantized_linear.py", "tests/runtime/modules/test_input_quantizer.py"]
TESTS: dict[str, list[str]] = {
    f"{_K}/cache.py": ["tests/kernels/test_cache.py", *_DECODING],
    f"{_K}/cache_append.py": _DECODING,
    f"{_K}/cache_attend.py": _DECODING,
    f"{_K}/cache_read.py": _DECODING,
    f"{_K}/codes.py": ["tests/kernels/test_quantize_tokens.py", "tests/kernels/test_quantize_smoothed.py"],
    f"{_K}/float_gemm.py": ["tests/kernels/test_linear_w4a16.py", "tests/kernels/test_linear_w8a16.py"],
    f"{_K}/gemv.py": _LINEAR,
    f"{_K}/gptq_block.py": ["tests/kernels/test_gptq_block.py"],
    f"{_K}/grouped_linear.py": [
        "tests/kernels/test_grouped_linear.py",
        "tests/kernels/test_grouped_linear_floats.py",
    ],
    f"{_K}/linear_group_scaled.py": ["tests/kernels/test_linear_group_scaled.py"],
    f"{_K}/linear_int8.py": _LINEAR,
    f"{_K}/linear_w4a16.py": ["tests/kernels/test_linear_w4a16.py"],
    f"{_K}/linear_w8a16.py": ["tests/kernels/test_linear_w8a16.py"],
    f"{_K}/operation.py": ["tests/kernels/test_operation.py", "tests/kernels/test_operations.py"],
    f"{_K}/packed_gemm.py": _LINEAR,
    f"{_K}/packing.py": ["tests/kernels/test_packing.py", "tests/kernels/test_linear_w4a16.py", *_LINEAR],
    f"{_K}/plans.py": ["tests/kernels/test_plans.py", *_LINEAR],
    f"{_K}/quantize_signed.py": ["tests/kernels/test_quantize_signed.py", "tests/kernels/test_not_finite.py"],
    f"{_K}/quantize_smoothed.py": [
        "tests/kernels/test_quantize_smoothed.py",
        "tests/kernels/test_not_finite.py",
    ],
    f"{_K}/quantize_tokens.py": ["tests/kernels/test_quantize_tokens.py", "tests/kernels/test_not_finite.py"],
    f"{_K}/rms_norm.py": ["tests/kernels/test_rms_norm.py"],
    f"{_K}/rotation.py": ["tests/kernels/test_rotation.py"],
    f"{_R}/modules/experts.py": ["tests/runtime/modules/test_experts.py"],
    f"{_R}/modules/gradient.py": ["tests/runtime/modules/test_gradient.py"],
    f"{_R}/modules/input.py": ["tests/runtime/modules"],
    f"{_R}/modules/int8_linear.py": [
        "tests/kernels/test_linear_w8a16.py",
        "tests/runtime/modules/test_host_cost.py",
    ],
    f"{_R}/modules/linear.py": ["tests/runtime/modules"],
    f"{_R}/modules/norms.py": ["tests/models/test_family_rotation.py"],
    f"{_R}/modules/rotation.py": [*_MODULES, "tests/kernels/test_rotation.py"],
    f"{_R}/norms.py": ["tests/runtime/test_norms.py", "tests/runtime/test_fusion.py"],
    f"{_R}/kv_cache/attention.py": _CACHE,
    f"{_R}/kv_cache/gradient.py": _CACHE,
    f"{_R}/kv_cache/layers.py": _CACHE,
    f"{_R}/kv_cache/quantizer.py": _CACHE,
    f"{_R}/kv_cache/rope.py": _CACHE,
    f"{_R}/kv_cache/static.py": _CACHE,
    "src/rrsq/quantizer/gptq.py": ["tests/quantizer/test_gptq.py"],
    "src/rrsq/quantizer/cholesky.py": ["tests/quantizer/test_cholesky.py", "tests/quantizer/test_gptq.py"],
    "src/rrsq/quantizer/grid.py": ["tests/quantizer/test_grid.py", "tests/quantizer/test_gptq.py"],
}

_COMPARISONS: dict[type[ast.cmpop], tuple[str, tuple[str, ...]]] = {
    ast.Lt: ("<", ("<=", ">=")),
    ast.LtE: ("<=", ("<", ">")),
    ast.Gt: (">", (">=", "<=")),
    ast.GtE: (">=", (">", "<")),
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
    ast.Is: ("is", ("is not",)),
    ast.IsNot: ("is not", ("is",)),
    ast.In: ("in", ("not in",)),
    ast.NotIn: ("not in", ("in",)),
}
_OPERATORS: dict[type[ast.operator], tuple[str, tuple[str, ...]]] = {
    ast.Add: ("+", ("-",)),
    ast.Sub: ("-", ("+",)),
    ast.Mult: ("*", ("/",)),
    ast.Div: ("/", ("*",)),
    ast.FloorDiv: ("//", ("*",)),
    ast.Mod: ("%", ("//",)),
    ast.Pow: ("**", ("*",)),
    ast.LShift: ("<<", (">>",)),
    ast.RShift: (">>", ("<<",)),
    ast.BitAnd: ("&", ("|",)),
    ast.BitOr: ("|", ("&",)),
    ast.BitXor: ("^", ("|",)),
    ast.MatMult: ("@", ("*",)),
}

_SYMMETRIC = {"min", "max", "minimum", "maximum", "equal"}
"""Functions whose arguments may be swapped."""
_NO_MATTER = {"num_warps", "num_stages", "typical"}
"""Arguments that concern speed, or what is shown."""


@dataclass(frozen=True)
class Mutant:
    """A replacement of the bytes from ``start`` to ``stop`` of a module."""

    start: int
    stop: int
    replacement: str
    kind: str

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.start}-{self.stop}:{self.replacement}"

    def applied(self, source: bytes) -> bytes:
        return source[: self.start] + self.replacement.encode() + source[self.stop :]


class _Finder(ast.NodeVisitor):
    """All mutants of a module."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        self.lines = [0]
        for line in source.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.found: list[Mutant] = []

    def span(self, node: Any) -> tuple[int, int]:
        start = self.lines[node.lineno - 1] + node.col_offset
        return start, self.lines[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: Any) -> str:
        start, stop = self.span(node)
        return self.source[start:stop].decode()

    def replace(self, node: Any, replacement: str, kind: str) -> None:
        self.found.append(Mutant(*self.span(node), replacement, kind))

    def replace_between(self, left: Any, right: Any, old: str, new: str, kind: str) -> None:
        """``old`` is an operator between two operands, where only brackets and comments are beside it."""
        start, stop = self.span(left)[1], self.span(right)[0]
        position = self.source.find(old.encode(), start, stop)
        if position >= 0:
            self.found.append(Mutant(position, position + len(old), new, kind))

    # Not mutated: annotations, what errors say, names that are exported.
    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        for decorator in node.decorator_list:
            if "fake" not in self.text(decorator):
                self.visit(decorator)
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        self.replace(node, "pass", "statement dropped")

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg not in _NO_MATTER:
            self.visit(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_Assign(self, node: ast.Assign) -> None:
        if any(isinstance(t, ast.Name) and t.id.startswith("__") for t in node.targets):
            return
        if any(isinstance(t, ast.Attribute | ast.Subscript) for t in node.targets):
            self.replace(node, "pass", "statement dropped")
        for target in node.targets:
            self.visit(target)
        self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.replace(node, "pass", "statement dropped")
        old, news = _OPERATORS[type(node.op)]
        for new in news:
            self.replace_between(node.target, node.value, old, new, "operator")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):  # A docstring.
            return
        self.replace(node, "pass", "statement dropped")
        self.generic_visit(node)

    def visit_Break(self, node: ast.Break) -> None:
        self.replace(node, "pass", "statement dropped")

    def visit_Continue(self, node: ast.Continue) -> None:
        self.replace(node, "pass", "statement dropped")

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, op, right in zip(operands, node.ops, operands[1:], strict=False):
            old, news = _COMPARISONS[type(op)]
            for new in news:
                self.replace_between(left, right, old, new, "comparison")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        old, news = _OPERATORS[type(node.op)]
        for new in news:
            self.replace_between(node.left, node.right, old, new, "operator")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in itertools.pairwise(node.values):
            self.replace_between(left, right, old, new, "and or")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.USub | ast.Invert):
            self.replace(node, f"({self.text(node.operand)})", "sign or not dropped")
        self.generic_visit(node)

    def negated(self, node: Any) -> None:
        self.replace(node.test, f"(not ({self.text(node.test)}))", "condition negated")
        self.generic_visit(node)

    visit_If = visit_While = visit_IfExp = negated  # noqa: N815

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.replace(node, str(not node.value), "constant")
        elif isinstance(node.value, int):
            self.replace(node, str(node.value + 1), "constant")
            if node.value > 0:
                self.replace(node, str(node.value - 1), "constant")
        elif isinstance(node.value, float):
            self.replace(node, repr(node.value * 2 if node.value else 1.0), "constant")

    def visit_Call(self, node: ast.Call) -> None:
        plain = [a for a in node.args if not isinstance(a, ast.Starred)]
        name = self.text(node.func).split(".")[-1]
        for left, right in itertools.pairwise([] if name in _SYMMETRIC else plain):
            start, stop = self.span(left)[0], self.span(right)[1]
            between = self.source[self.span(left)[1] : self.span(right)[0]].decode()
            if between.strip() == ",":
                swapped = self.text(right) + between + self.text(left)
                self.found.append(Mutant(start, stop, swapped, "arguments swapped"))
        self.generic_visit(node)


def mutants(source: bytes) -> dict[str, Mutant]:
    """All candidates of a module by name, in the order of the text; a few may not be valid programs."""
    finder = _Finder(source)
    finder.visit(ast.parse(source))
    found = sorted(finder.found, key=lambda mutant: (mutant.start, mutant.stop, mutant.name))
    return {mutant.name: mutant for mutant in found}


def drawn(module: str, source: bytes, count: int, seed: int) -> list[Mutant]:
    """A sample of a module's mutants, in random order: a longer one begins with a shorter one."""
    every = list(mutants(source).values())
    random.Random(f"{seed} {module}").shuffle(every)
    unchanged = ast.dump(ast.parse(source))
    chosen: list[Mutant] = []
    for mutant in every:
        with contextlib.suppress(SyntaxError):
            if len(chosen) < count and ast.dump(ast.parse(mutant.applied(source))) != unchanged:
                chosen.append(mutant)
    return chosen


def difference(source: bytes, mutant: Mutant) -> str:
    """The lines that differ, without context."""
    before, after = source.decode().splitlines(), mutant.applied(source).decode().splitlines()
    lines = [
        line
        for line in difflib.unified_diff(before, after, n=0, lineterm="")
        if line[:3] not in ("---", "+++")
    ]
    return "\n".join(line for line in lines if not line.startswith("@@"))


class Results:
    """What is known of each module's mutants, on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.modules: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def module(self, name: str) -> dict[str, Any]:
        """What is known of a module as it is now; what was found out about another text of it is dropped."""
        digest = hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
        known = self.modules.get(name)
        if known is None or known["sha256"] != digest:
            known = self.modules[name] = {"sha256": digest, "mutants": {}}
        return known

    def record(self, name: str, source: bytes, mutant: Mutant, outcome: str, seconds: float, by: str) -> None:
        self.module(name)["mutants"][mutant.name] = {
            "line": source[: mutant.start].count(b"\n") + 1,
            "difference": difference(source, mutant),
            "outcome": outcome,
            "seconds": round(seconds, 1),
            "by": by,
        }
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.modules, indent=1))
        part.replace(self.path)


@dataclass
class Job:
    """Tests to run in a copy of the tree, and how it went."""

    tests: list[str]
    timeout: float
    module: str = ""
    mutant: Mutant | None = None
    tree: Path = ROOT
    process: int = 0
    began: float = 0.0
    seconds: float = 0.0
    code: int | None = None
    """pytest's exit code; None if the tests did not come to an end in time."""
    log: str = field(default="", repr=False)

    def start(self, tree: Path, clock: Iterator[int]) -> None:
        self.tree, self.began = tree, time.monotonic()
        if self.mutant is not None:
            source = (ROOT / self.module).read_bytes()
            self.write(self.mutant.applied(source), next(clock))
        self.process = os.fork()
        if self.process == 0:
            _run_tests(tree, self.tests)

    def write(self, source: bytes, second: int) -> None:
        """Each text of a module has a time of its own, by which Python knows that its bytecode is old."""
        path = self.tree / self.module
        path.write_bytes(source)
        os.utime(path, (second, second))

    def ended(self, clock: Iterator[int]) -> bool:
        process, status = os.waitpid(self.process, os.WNOHANG)
        self.seconds = time.monotonic() - self.began
        if process == 0 and self.seconds < self.timeout:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        if process == 0:
            os.waitpid(self.process, 0)
        else:
            self.code = os.waitstatus_to_exitcode(status)
        if self.mutant is not None:
            self.write((ROOT / self.module).read_bytes(), next(clock))
        self.log = (self.tree / "log").read_text(errors="replace")
        shutil.rmtree(self.tree / "tmp", ignore_errors=True)
        return True


def _run_tests(tree: Path, tests: list[str]) -> None:
    """The child: pytest in a copy of the tree, until a test fails. Does not return."""
    os.setsid()
    out = os.open(tree / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    (tree / "tmp").mkdir(exist_ok=True)
    os.environ["TMPDIR"] = str(tree / "tmp")
    tempfile.tempdir = None
    os.chdir(tree)
    os.environ["PYTHONPATH"] = f"{tree / 'src'}:{tree / 'tests'}"
    sys.path[:0] = [str(tree / "src"), str(tree / "tests")]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0"]
    code = 99
    try:
        import pytest

        code = int(pytest.main([*options, "-m", "not gpu and not real", *tests]))
        sys.stdout.flush()
    finally:
        os._exit(code)


def preload() -> None:
    """Import what tests import, but nothing of this tree: a folder of tests has the name of a package."""
    sys.path[:] = [entry for entry in sys.path if not Path(entry or ".").resolve().is_relative_to(ROOT)]
    os.environ.update(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "mutation-inductor"))
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch
    import torch._dynamo
    import transformers.cache_utils
    import transformers.modeling_utils
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    with contextlib.suppress(ImportError):
        import triton  # noqa: F401
    torch.set_num_threads(1)
    if "rrsq" in sys.modules:
        sys.exit("rrsq was imported before it was mutated")


def finished(jobs: list[Job], trees: list[Path], end: float) -> Iterator[Job]:
    """Run jobs, one in each tree at a time; begin none after ``end``."""
    clock = iter(range(1_000_000_000, 2_000_000_000))
    waiting, running, free = list(reversed(jobs)), [], list(trees)
    while running or (waiting and time.monotonic() < end):
        while waiting and free and time.monotonic() < end:
            job = waiting.pop()
            job.start(free.pop(), clock)
            running.append(job)
        for job in [job for job in running if job.ended(clock)]:
            running.remove(job)
            free.append(job.tree)
            yield job
        time.sleep(0.05)


def failed_test(log: str) -> str:
    """The test that noticed, by pytest's summary."""
    lines = [line for line in log.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return lines[0].split(" - ")[0].split(" ", 1)[1] if lines else ""


def fails(test: str, job: Job) -> bool:
    """Whether a test fails with nothing changed, in the tree that a job has left."""
    (again,) = finished([Job([test], job.timeout)], [job.tree], float("inf"))
    return again.code != 0


def baseline(tests: list[str], trees: list[Path]) -> dict[str, float]:
    """Seconds that each entry of TESTS takes with nothing changed; all must pass."""
    seconds = {}
    for job in finished([Job([test], 3600) for test in tests], trees, float("inf")):
        if job.code != 0:
            sys.exit(f"{job.tests[0]} fails with nothing changed:\n{job.log[-3000:]}")
        seconds[job.tests[0]] = job.seconds
    return seconds


def make_jobs(results: Results, arguments: argparse.Namespace) -> list[Job]:
    """Mutants that are to be run, in turn one of each module: whenever it stops, all have had their part."""
    lists = []
    for module in arguments.modules or TESTS:
        if module not in TESTS:
            sys.exit(f"no tests are mapped to {module!r}; TESTS in {__file__} has {', '.join(TESTS)}")
        source, known = (ROOT / module).read_bytes(), results.module(module)["mutants"]
        if arguments.command == "run":
            sample = drawn(module, source, arguments.mutants, arguments.seed)
            chosen = [m for m in sample if known.get(m.name, {"outcome": "unsure"})["outcome"] == "unsure"]
        else:
            every = mutants(source)
            chosen = [every[name] for name, entry in known.items() if entry["outcome"] == "survived"]
        lists.append([Job(TESTS[module], 0.0, module, mutant) for mutant in chosen])
    longest = max(map(len, lists), default=0)
    return [jobs[i] for i in range(longest) for jobs in lists if i < len(jobs)]


def run(results: Results, arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    jobs = make_jobs(results, arguments)
    if not jobs:
        return
    preload()
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        trees = [Path(folder) / str(i) for i in range(arguments.jobs)]
        for tree in trees:
            tree.mkdir()
            for name in COPIED:
                copied = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
                copied(ROOT / name, tree / name)
        if arguments.seconds is None:
            seconds = baseline(sorted({test for job in jobs for test in job.tests}), trees)
            print(f"{len(jobs)} mutants; their tests pass with nothing changed", flush=True)
        for job in jobs:
            job.timeout = arguments.seconds or SLOWER * sum(seconds[test] for test in job.tests) + GRACE
        for number, job in enumerate(finished(jobs, trees, began + 60 * arguments.minutes), 1):
            assert job.mutant is not None
            outcome, by = {None: "timeout", 0: "survived"}.get(job.code, "killed"), failed_test(job.log)
            if arguments.seconds is not None and (outcome == "timeout" or (by and fails(by, job))):
                outcome = "unsure"
            source = (ROOT / job.module).read_bytes()
            results.record(job.module, source, job.mutant, outcome, job.seconds, by)
            print(
                f"{number}/{len(jobs)} {outcome} {job.seconds:.0f} s {job.module} {job.mutant.name!r}",
                flush=True,
            )


def report(results: Results) -> None:
    total: Counter[str] = Counter()
    unsure = 0
    for module, known in results.modules.items():
        entries = [entry for entry in known["mutants"].values() if entry["outcome"] != "unsure"]
        unsure += len(known["mutants"]) - len(entries)
        outcomes = Counter(entry["outcome"] for entry in entries)
        total += outcomes
        noticed = outcomes["killed"] + outcomes["timeout"]
        print(f"{module}: {noticed} of {sum(outcomes.values())} noticed")
        for entry in sorted(entries, key=lambda entry: entry["line"]):
            if entry["outcome"] == "survived":
                print(f"  line {entry['line']}:")
                print("".join(f"    {line}\n" for line in entry["difference"].splitlines()), end="")
    noticed = total["killed"] + total["timeout"]
    print(f"{noticed} of {sum(total.values())} mutants noticed, {total['timeout']} of them by hanging")
    if unsure:
        print(f"{unsure} more are unsure")


def make_parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "survivors", "report"))
    parser.add_argument("results", type=Path)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="such as src/rrsq/kernels/gemv.py")
    parser.add_argument("--mutants", type=int, default=30, help="of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-j", "--jobs", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, help="of a mutant's tests, not run with nothing changed before"
    )
    parser.add_argument("--minutes", type=float, default=600, help="begin no further mutant after so long")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    results = Results(arguments.results)
    if arguments.command == "report":
        report(results)
    else:
        run(results, arguments)


if __name__ == "__main__":
    main()
