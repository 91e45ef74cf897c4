"""Put vLLM into a virtual environment for these tests: what of its wheel is Python, and what that imports.

    python environment.py VENV/bin/python

The wheel is for CUDA; its compiled extensions (fake_vllm.py does without them) and most of its requirements
are left out. What rrsq itself requires must be there.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VLLM = "vllm==0.26.0"
REQUIREMENTS = (
    "cachetools==8.0.2",
    "cbor2==6.3.0",
    "compressed-tensors==0.17.0",
    "einops==0.8.2",
    "loguru==0.7.3",
    "msgspec==0.22.0",
    "openai==3.57.0",
    "openai-harmony==0.0.8",
    "prometheus_client==0.26.0",
    "py-cpuinfo==9.0.0",
    "pybase64==1.5.1",
    "pyzmq==27.3.0",
    "sentencepiece==0.2.3",
    "sniffio==1.3.1",
    "uvloop==0.23.0",
)
LEFT_OUT = (".so", ".cu", ".cuh", ".h", ".hpp")


def main() -> None:
    """Fill the environment of the interpreter that the argument names."""
    python = sys.argv[1]

    def run(*words: str) -> str:
        return subprocess.run([python, *words], check=True, capture_output=True, text=True).stdout.strip()

    target = run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *REQUIREMENTS)
    with tempfile.TemporaryDirectory() as folder:
        options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:")
        run("-m", "pip", "download", *options, "--dest", folder, VLLM)
        with zipfile.ZipFile(next(Path(folder).glob("vllm-*.whl"))) as wheel:
            wheel.extractall(
                target,
                [
                    item
                    for item in wheel.namelist()
                    if item.startswith(("vllm/", "vllm-")) and not item.endswith(LEFT_OUT)
                ],
            )


if __name__ == "__main__":
    main()
