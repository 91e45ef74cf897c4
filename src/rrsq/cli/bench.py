"""``rrsq bench``: what quantization buys, in time. Whole models are in :mod:`rrsq.cli.bench_whole`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rrsq.cli.console import examples, print_note, progress_bar, stdout
from rrsq.cli.options import (
    OUTPUT,
    RECIPE,
    Assignments,
    Device,
    DeviceName,
    Engine,
    EngineName,
    EngineOptions,
    TensorParallelSize,
    check_output_file,
    given,
    parse_integers,
    refuse,
    refuse_for_engine,
    resolve_device,
)
from rrsq.errors import UsageError

if TYPE_CHECKING:
    import torch

    from rrsq.benchmarking.shapes import LinearShape
    from rrsq.recipe import Recipe

__all__ = ["EXAMPLES", "bench"]

EXAMPLES = examples(
    "rrsq bench --shape 4096x4096 --shape 4096x14336:rotated --tokens 1,16,2048",
    "rrsq bench --model llama-3-8b --against int8,fp8 --cuda-graph --json bench.json --plot bench.png",
    "rrsq bench --shape 576x576 --tokens 16 --device cpu",
    "rrsq bench --whole --model out/ --batch 1,16 --context 128,4096",
    "rrsq bench --whole --shape llama-3-8b --engine vllm --against bf16,fp8,w4a16 --loads 1x128,64x1024",
)
LINEARS = "Linears"
WHOLE = "Whole models"
_GPU_TOKENS = "1,16,64,256,2048,8192"
_CPU_TOKENS = "1,16"
_RECIPE = "rrs-w4a4kv4"


def bench(
    context: typer.Context,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OUTxIN|NAME",
            help="Output by input channels of a linear; repeatable. OUTxIN:rotated rotates its input online."
            " With --whole, a public model whose shape is filled with random codes: llama-3-8b.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="OUT|NAME|DIR",
            help="All linears of a model: llama-3-8b, llama-3-70b, llama-2-7b, mistral-7b, qwen2.5-0.5b, "
            "qwen2.5-7b, or a folder with a config.json. With --whole, the checkpoint to time.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME...]",
            help="Baselines. Of linears, beside the library's bfloat16: int8 (torch._int_mm), fp8 "
            "(torch._scaled_mm), humming (humming-kernels, where installed). Of whole models in vllm: bf16, "
            "fp8, w4a16, w4afp8; in transformers: bf16, bf16-static (a static cache, compiled).",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="M[,M...]",
            help=f"Numbers of tokens. {_GPU_TOKENS} on a GPU, {_CPU_TOKENS} on a CPU.",
            rich_help_panel=LINEARS,
        ),
    ] = None,
    cuda_graph: Annotated[
        bool,
        typer.Option(
            "--cuda-graph",
            help="Time replays of a CUDA graph, without launch costs.",
            rich_help_panel=LINEARS,
        ),
    ] = False,
    seconds: Annotated[
        float, typer.Option(min=0.0, help="About how long to measure each row.", rich_help_panel=LINEARS)
    ] = 0.2,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="First try the kernels' tile sizes on these shapes and keep the best for this GPU in "
            "~/.cache/rrsq (RRSQ_CACHE). Minutes.",
            rich_help_panel=LINEARS,
        ),
    ] = False,
    plot_path: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Also draw ratios and a roofline to this file.",
            rich_help_panel=LINEARS,
        ),
    ] = None,
    whole: Annotated[
        bool,
        typer.Option(
            "--whole", help="Time whole models: a decode step, a prefill, memory.", rich_help_panel=WHOLE
        ),
    ] = False,
    batch: Annotated[
        str,
        typer.Option(metavar="N[,N...]", help="Requests at once.", rich_help_panel=WHOLE),
    ] = "1,16",
    context_tokens: Annotated[
        str,
        typer.Option("--context", metavar="N[,N...]", help="Tokens of each prompt.", rich_help_panel=WHOLE),
    ] = "128,1024",
    loads: Annotated[
        str | None,
        typer.Option(
            metavar="BxC[,BxC...]",
            help="Instead of each --batch with each --context: 1x4096,64x1024.",
            rich_help_panel=WHOLE,
        ),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens that a step is the mean of.", rich_help_panel=WHOLE)
    ] = 128,
    repeats: Annotated[
        int, typer.Option(min=1, max=1000, help="Runs of each; the best counts.", rich_help_panel=WHOLE)
    ] = 3,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1, max=1000, help="With --shape: fewer layers than the model has.", rich_help_panel=WHOLE
        ),
    ] = None,
    engine: Engine = EngineName.TRANSFORMERS,
    tensor_parallel_size: TensorParallelSize = 1,
    engine_options: EngineOptions = "{}",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe whose group sizes and bits are timed ('rrsq recipes' lists them). Without it that of"
            f" a checkpoint, or {_RECIPE}.",
            rich_help_panel=RECIPE,
            show_default=False,
        ),
    ] = None,
    assignments: Assignments = None,
    device: Device = DeviceName.AUTO,
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Also write all numbers to this file.", rich_help_panel=OUTPUT
        ),
    ] = None,
) -> None:
    """Time quantized linears, or whole models, beside what they replace.

    Linears: every kernel is checked against float64 on random inputs before it is timed, and inputs rotate
    through more memory than the caches hold. Times are medians; ratios are to the library's bfloat16 product
    in the same run. Each stage of a linear is also timed by itself: smoothing and quantization, the rotation,
    the product.

    Whole models (--whole): each runs in a process of its own on the same random prompts, in transformers or
    in vLLM. A decode step is the time of many new tokens less that of one, over the number of steps; ratios
    are to bf16 of random weights of the same shape in the same run. What does not run is a line with its
    reason.
    """
    for option, path in (("--json", json_path), ("--plot", plot_path)):
        check_output_file(option, path)
    refuse(context, _OF_LINEARS if whole else _OF_WHOLE, "is for linears" if whole else "needs --whole")
    refuse_for_engine(context, engine)
    if not whole:
        request = (shape or [], model, tokens, "int8,fp8" if against is None else against)
        _time_linears(
            *request, recipe, assignments or [], device, cuda_graph, seconds, tune, json_path, plot_path
        )
        return
    from rrsq.benchmarking.whole.loads import Load, parse_loads
    from rrsq.cli.bench_whole import WholeRequest, time_whole
    from rrsq.vllm.engine import parse_engine_options

    if loads is not None and (given(context, "batch") or given(context, "context_tokens")):
        raise UsageError("--loads says both: leave out --batch and --context.")
    grid = tuple(
        Load(requests, length)
        for requests in dict.fromkeys(parse_integers("--batch", batch))
        for length in dict.fromkeys(parse_integers("--context", context_tokens))
    )
    time_whole(
        WholeRequest(
            model=model,
            shapes=shape or [],
            recipe=recipe,
            assignments=assignments or [],
            layers=layers,
            engine=engine,
            against=against,
            loads=grid if loads is None else parse_loads(loads),
            new_tokens=new_tokens,
            repeats=repeats,
            tensor_parallel_size=tensor_parallel_size,
            engine_options=parse_engine_options(engine_options),
            device="cuda" if engine is EngineName.VLLM else resolve_device(device),
            json_path=json_path,
        )
    )


# By the option's parameter.
_OF_LINEARS = ("tokens", "cuda_graph", "seconds", "tune", "plot_path")
_OF_WHOLE = ("batch", "context_tokens", "loads", "new_tokens", "repeats", "layers", "engine")


def _time_linears(
    shape: list[str],
    model: str | None,
    tokens: str | None,
    against: str,
    recipe: str | None,
    assignments: list[str],
    device: DeviceName,
    cuda_graph: bool,
    seconds: float,
    tune: bool,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    device_name = resolve_device(device)
    shapes = _shapes(shape, model)
    counts = parse_integers("--tokens", tokens or (_CPU_TOKENS if device_name == "cpu" else _GPU_TOKENS))
    chosen = _recipe(recipe, assignments, model)

    import torch

    from rrsq.benchmarking.ceilings import measure_ceilings
    from rrsq.benchmarking.contenders import CONTENDERS
    from rrsq.benchmarking.linear_scheme import LinearScheme
    from rrsq.benchmarking.measure import Settings, measure
    from rrsq.benchmarking.speeds import BenchmarkReport, plot, tables, to_json
    from rrsq.benchmarking.tune import tune as find_plans

    names = tuple(name for name in against.split(",") if name)
    for name in names:
        if name not in CONTENDERS:
            raise UsageError(f"--against {name}: unknown; there are {', '.join(CONTENDERS)}.")
    scheme = LinearScheme.of(chosen)
    target = (
        torch.device("cuda", torch.cuda.current_device()) if device_name == "cuda" else torch.device("cpu")
    )
    if device_name == "cpu":
        print_note("No GPU is used: these are times of the eager reference on the CPU.")
    with progress_bar() as progress, torch.inference_mode():
        task = progress.add_task("", total=None)

        def show(text: str) -> None:
            progress.update(task, description=text)

        if tune:
            print_note(f"Wrote {find_plans(shapes, target, scheme, show)}")
        show("measuring the machine's ceilings")
        ceilings = measure_ceilings(target)
        settings = Settings(tuple(shapes), counts, names, target, cuda_graph, seconds, scheme)
        rows = tuple(measure(settings, ceilings, show))
    command = " ".join(["rrsq", *sys.argv[1:]])
    report = BenchmarkReport(_describe(target), command, cuda_graph, ceilings, rows, chosen.name, scheme)
    for table in tables(report):
        stdout.print(table)
    print_note(
        f"{report.device}: copies at {ceilings.bytes_per_second / 1e12:.2f} TB/s, bfloat16 products at "
        f"{ceilings.bf16_operations_per_second / 1e12:.1f} TFLOP/s; int8 and fp8 are taken at twice that."
    )
    print_note(f"rrsq: recipe {chosen.name}, {scheme}.")
    if json_path is not None:
        json_path.write_text(to_json(report))
        print_note(f"Wrote {json_path}")
    if plot_path is not None:
        plot(report, plot_path)
        print_note(f"Wrote {plot_path}")


def _shapes(shapes: list[str], model: str | None) -> list[LinearShape]:
    from rrsq.benchmarking.shapes import model_shapes, parse_shape

    if not shapes and model is None:
        raise UsageError(
            "Nothing to time: give --shape OUTxIN (for example --shape 4096x4096) or --model NAME."
        )
    return [parse_shape(text) for text in shapes] + ([] if model is None else model_shapes(model))


def _recipe(name: str | None, assignments: list[str], model: str | None) -> Recipe:
    """The recipe asked for, else that of a checkpoint, else the default."""
    from rrsq.recipe import load_recipe
    from rrsq.runtime.format.format import parse_info
    from rrsq.runtime.format.json_files import read_config
    from rrsq.runtime.format.loading import is_checkpoint

    if name is None and model is not None and is_checkpoint(model):
        if assignments:
            raise UsageError(
                f"--set changes a recipe, and '{model}' is made by its own: name one (--recipe)."
            )
        return parse_info(read_config(Path(model))["quantization_config"]).recipe
    return load_recipe(name or _RECIPE, assignments)


def _describe(device: torch.device) -> str:
    import platform

    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads), torch {torch.__version__}"
