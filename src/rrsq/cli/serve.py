"""``rrsq serve``: hand a checkpoint to vLLM."""

from __future__ import annotations

import os
import sys
from enum import Enum
from typing import Annotated

import typer

from rrsq.cli.console import examples, printable, stderr
from rrsq.cli.options import MOST_PROCESSES

__all__ = ["EXAMPLES", "serve"]


class CacheDtype(str, Enum):
    """Choices of ``--kv-cache-dtype``."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    fp8 = "fp8"


EXAMPLES = examples(
    "rrsq serve out/",
    "rrsq serve out/ --tensor-parallel-size 2 -- --max-model-len 8192 --port 8080",
    "rrsq serve out/ --kv-cache-dtype bfloat16",
    "rrsq serve out/ --dry-run",
)


def serve(
    checkpoint: Annotated[str, typer.Argument(metavar="OUT", help="Folder of an rrsq checkpoint.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- OPTION...]",
            help="Options of 'vllm serve', behind two dashes: --port, --max-model-len,"
            " --gpu-memory-utilization and all others ('vllm serve --help').",
            show_default=False,
        ),
    ] = None,
    tensor_parallel_size: Annotated[
        int,
        typer.Option(
            "--tensor-parallel-size",
            "-t",
            min=1,
            max=MOST_PROCESSES,
            help="GPUs that share each layer. A rotation must not cross them: the checkpoint decides which"
            " numbers are possible, and one that is not is refused here.",
        ),
    ] = 1,
    kv_cache_dtype: Annotated[
        CacheDtype,
        typer.Option(
            help="Of the KV cache. auto: as the checkpoint's recipe says, which is 4 bits by default; the"
            " others are vLLM's own caches.",
        ),
    ] = CacheDtype.auto,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, print the command, and do not start it.")
    ] = False,
) -> None:
    """Serve a checkpoint with vLLM, over an API like OpenAI's.

    The checkpoint is checked first, which takes a second; what cannot be served is refused with the reason.
    Then vLLM takes over; 'vllm serve OUT' does the same without the checks. Once it is up, ask it:

    curl localhost:8000/v1/completions -H 'Content-Type: application/json'
    -d '{"model": "OUT", "prompt": "Once"}'

    Needs vLLM (pip install 'rrsq\\[vllm]') and an NVIDIA GPU. docs/serving.md has more.
    """
    from rrsq.vllm.launch import check_checkpoint, check_installation, plan_launch

    check_checkpoint(checkpoint, tensor_parallel_size)
    launch = plan_launch(checkpoint, tensor_parallel_size, options or (), kv_cache_dtype.value)
    if dry_run:
        typer.echo(str(launch))
        return
    warning = check_installation()
    if warning is not None:
        stderr.print(f"[yellow]Warning:[/yellow] {printable(warning)}", soft_wrap=True)
    stderr.print(printable(str(launch)), soft_wrap=True, highlight=False)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.execvpe(launch.command[0], launch.command, {**os.environ, **launch.environment})
