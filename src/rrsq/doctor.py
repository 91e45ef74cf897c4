"""What rrsq finds on this machine: libraries, GPUs, kernels, data and caches, and a hint for each problem."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Finding", "Findings", "examine"]

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "datasets",
    "triton",
    "lm_eval",
)
"""The last two are needed only on a GPU, and only by lm-eval's tasks."""
LEAST_FREE_DISK = 10**10
LEAST_CAPABILITY = (8, 0)

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do about it."""

    subject: str
    found: str
    state: State = "ok"
    """``problem``: something will fail. ``note``: something is missing or set that one should know of."""
    hint: str = ""


@dataclass(frozen=True)
class Findings:
    """All that was looked at, by section."""

    libraries: tuple[Finding, ...]
    hardware: tuple[Finding, ...]
    kernels: tuple[Finding, ...]
    storage: tuple[Finding, ...]

    def all(self) -> tuple[Finding, ...]:
        """Every finding, in order."""
        return (*self.libraries, *self.hardware, *self.kernels, *self.storage)


def examine(data_root: Path | None = None) -> Findings:
    """Look at everything. Nothing is changed, downloaded or compiled.

    Args:
        data_root: as the option of that name; without it, ``RRSQ_DATA_ROOT``.
    """
    has_torch = _version("torch") is not None
    return Findings(
        libraries=tuple(_libraries()),
        hardware=tuple(_hardware()) if has_torch else (),
        kernels=tuple(_kernels()) if has_torch else (),
        storage=(*_data_root(data_root), *_caches()),
    )


def _libraries() -> Iterator[Finding]:
    yield Finding("Python", platform.python_version())
    bounds = _bounds()
    yield Finding("rrsq", _version("rrsq") or "run from its source folder")
    for name in LIBRARIES:
        version = _version(name)
        bound = bounds.get(name, "")
        if version is None:
            yield _missing(name)
        elif bound and not _within(version, bound):
            hint = f"rrsq is tested with {name} {bound}: pip install '{name}{bound}'."
            yield Finding(name, f"{version}, not {bound}", "problem", hint)
        else:
            yield Finding(name, version)


def _missing(name: str) -> Finding:
    if name == "triton":
        return Finding(name, "not installed", *_triton_hint())
    if name == "lm_eval":
        from rrsq.evaluation.harness.names import INSTALL_HINT

        hint = f"Zero-shot tasks (arc_e, mmlu, ...) need it. {INSTALL_HINT}"
        return Finding(name, "not installed", "note", hint)
    if name == "datasets":
        return Finding(name, "not installed", "problem", "Calibration and evaluation read text with it.")
    return Finding(name, "not installed", "problem", f"rrsq needs it: pip install {name}.")


def _triton_hint() -> tuple[State, str]:
    if _version("torch") is None:
        return "ok", ""
    import torch

    if torch.cuda.is_available():
        return "problem", "Without it the GPU runs the slow eager reference: pip install triton."
    return "ok", ""


def _hardware() -> Iterator[Finding]:
    import psutil
    import torch

    memory = psutil.virtual_memory()
    processors = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads for torch"
    yield Finding("CPU", f"{platform.machine()}, {processors}")
    yield Finding("memory", f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB free")
    if not torch.cuda.is_available():
        yield _no_gpu(torch.version.cuda)
        return
    for index in range(torch.cuda.device_count()):
        yield _gpu(index)


def _no_gpu(built_with_cuda: str | None) -> Finding:
    """Why torch sees no GPU: there is none, or torch cannot use it."""
    if not _gpu_is_plugged_in():
        return Finding("GPU", "none", "note", "Everything runs on the CPU, slowly.")
    if built_with_cuda is None:
        hint = "Install a build of torch with CUDA (pytorch.org says which one)."
        return Finding("GPU", "there is one, but torch was built without CUDA", "problem", hint)
    hint = (
        f"torch was built for CUDA {built_with_cuda}; does 'nvidia-smi' work, and is its driver new enough?"
    )
    return Finding("GPU", "there is one, but torch cannot use it", "problem", hint)


def _gpu_is_plugged_in() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _gpu(index: int) -> Finding:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = torch.cuda.get_device_capability(index)
    text = (
        f"{properties.name}, compute capability {capability[0]}.{capability[1]}, {total / 1e9:.1f} GB, "
        f"{free / 1e9:.1f} GB free"
    )
    if capability < LEAST_CAPABILITY:
        hint = "rrsq's kernels need compute capability 8.0 (Ampere); this GPU runs the slow eager reference."
        return Finding(f"GPU {index}", text, "note", hint)
    return Finding(f"GPU {index}", text)


def _kernels() -> Iterator[Finding]:
    """For each operation the kernel that a bfloat16 model would use here, and why not the others."""
    import torch

    from rrsq import kernels  # noqa: F401  (defines the operations)
    from rrsq.kernels.operation import Target, operations

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    target = Target.of(device)
    chosen: dict[str, str | None] = {}
    rejected: dict[str, list[str]] = {}
    for name, operation in operations().items():
        candidates = operation.explain(target, operation.typical)
        chosen[name] = next((c.kernel.name for c in candidates if not c.reasons), None)
        for candidate in candidates:
            if candidate.reasons:
                rejected.setdefault("; ".join(candidate.reasons), []).append(candidate.kernel.name)
    slow = [name for name in chosen.values() if on_gpu and name is not None and name.startswith("eager.")]
    for name, kernel in chosen.items():
        state: State = "problem" if kernel is None else "note" if kernel in slow else "ok"
        yield Finding(name, kernel or "no kernel", state)
    for reasons, names in rejected.items():
        backends = {name.partition(".")[0] for name in names}
        whole = len(names) == len(chosen) and len(backends) == 1
        yield Finding("not used", f"{f'all of {backends.pop()}' if whole else ', '.join(names)}: {reasons}")
    if None in chosen.values():
        hint = "A model cannot run here as things are set; 'not used' says why of each kernel."
        yield Finding("kernels", "missing", "problem", hint)
    elif slow:
        hint = "The slow reference computes some operations on this GPU; 'not used' says why."
        yield Finding("kernels", "slow", "note", hint)
    if on_gpu:
        yield _tuned_table(device)
    for variable, meaning in (
        ("RRSQ_KERNELS", "restricts the kernels to one backend"),
        ("TRITON_INTERPRET", "runs Triton's kernels in its interpreter, very slowly"),
    ):
        if os.environ.get(variable):
            hint = f"It {meaning}; unset it for everyday use."
            yield Finding(variable, os.environ[variable], "note", hint)


def _tuned_table(device: object) -> Finding:
    import torch

    from rrsq.kernels.plans import cache_path, shipped_table

    assert isinstance(device, torch.device)
    path = cache_path(device)
    if path.is_file():
        return Finding("tile sizes", f"tuned on this machine: {path}")
    if shipped_table(device) is not None:
        return Finding("tile sizes", "tuned for this GPU, shipped with rrsq")
    hint = "'rrsq bench --model ... --tune' finds the best for this GPU, in minutes."
    return Finding("tile sizes", "defaults", "note", hint)


def _data_root(data_root: Path | None) -> Iterator[Finding]:
    from rrsq.errors import DataError
    from rrsq.quantizer.calibration.text import DATA_ROOT_VARIABLE, resolve_data_root

    try:
        root = resolve_data_root(data_root)
    except DataError as error:
        yield Finding(
            "data root", str(data_root or os.environ.get(DATA_ROOT_VARIABLE)), "problem", str(error)
        )
        return
    if root is None:
        hint = f"Without a connection to the Hub, set {DATA_ROOT_VARIABLE} to a folder laid out like it."
        yield Finding("data root", "none is set", "note" if _offline() else "ok", hint if _offline() else "")
        return
    found = sorted(str(path.relative_to(root)) for path in root.glob("*/*") if path.is_dir())
    shown = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
    if not found:
        hint = "Data sets and models are looked for in ROOT/<org>/<name>, as on the Hub."
        yield Finding("data root", f"{root}: empty", "note", hint)
        return
    yield Finding("data root", f"{root}: {shown}")


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _caches() -> Iterator[Finding]:
    if _offline():
        yield Finding("HF_HUB_OFFLINE", "set", "note", "Nothing is fetched from the Hub.")
    from huggingface_hub.constants import HF_HUB_CACHE

    from rrsq.kernels.plans import cache_folder

    yield _cache("Hub cache", Path(HF_HUB_CACHE))
    yield _cache("rrsq cache", cache_folder())


def _cache(subject: str, folder: Path) -> Finding:
    """A folder that is made when it is needed: can it be, and is there room?"""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        return Finding(subject, str(folder), "problem", f"{existing} cannot be written to.")
    free = shutil.disk_usage(existing).free
    text = f"{folder}, {free / 1e9:.0f} GB free on its disk"
    if free < LEAST_FREE_DISK:
        return Finding(subject, text, "note", "That may not be enough for a model.")
    return Finding(subject, text)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _bounds() -> dict[str, str]:
    """By library, the versions that rrsq was made for: what its installation says of itself."""
    from packaging.requirements import Requirement

    try:
        listed = importlib.metadata.requires("rrsq") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    requirements = [Requirement(line) for line in listed]
    return {one.name.replace("-", "_"): str(one.specifier) for one in requirements if one.specifier}


def _within(version: str, bound: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(bound).contains(version, prereleases=True)
