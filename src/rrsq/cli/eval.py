"""``rrsq eval``: what a model's quantization cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rrsq.cli.completion import complete_model, complete_tasks
from rrsq.cli.console import examples, print_note, print_warning, progress_bar, quiet_libraries, stdout
from rrsq.cli.evaluation_bars import EvaluationBars
from rrsq.cli.options import (
    DATA,
    HARDWARE,
    OUTPUT,
    BatchSize,
    Bos,
    BosName,
    DataRoot,
    Device,
    DeviceName,
    DtypeName,
    Engine,
    EngineName,
    EngineOptions,
    TensorParallelSize,
    check_output_file,
    parse_batch_size,
    parse_integers,
    refuse_for_engine,
)

if TYPE_CHECKING:
    from rrsq.evaluation.scores import EvaluationReport

__all__ = ["EXAMPLES", "evaluate", "evaluate_and_print", "print_report"]

EXAMPLES = examples(
    "rrsq eval HuggingFaceTB/SmolLM2-135M out/ --tasks wikitext2,kl,arc_e,arc_c,boolq,obqa",
    "rrsq eval out/ --tasks hellaswag,mmlu --num-fewshot 5 --limit 100",
    "rrsq eval out/ --engine vllm --tasks wikitext2,arc_e",
    "rrsq eval model/ out/ --tasks wikitext2,kl --update-card out/",
    "rrsq eval model/ out/ --tasks needle --context 2048,8192",
    "rrsq eval model/ w4a8/ w4a4/ --tasks wikitext2,text:notes.txt --data-root ~/data --json result.json",
)


def evaluate(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Quantized checkpoints, local Hugging Face folders, or Hub ids. With several, the first is "
            "the reference that the others are compared with: name the full-precision model first.",
            autocompletion=complete_model,
        ),
    ],
    tasks: Annotated[
        str,
        typer.Option(
            metavar="TASK[,TASK...]",
            help="What to measure. [bold]wikitext2[/bold]: perplexity on the test split of WikiText-2. "
            "[bold]text:FILE[/bold]: perplexity on a .txt, .jsonl or .parquet file, or on a Hub data set "
            "(text:org/name:config). [bold]kl[/bold] or [bold]kl:FILE[/bold]: divergence of the next-token "
            "probabilities from the reference's, on WikiText-2 or a file. [bold]needle[/bold] or "
            "[bold]needle:FILE[/bold]: numbers to be found in long texts (--context). [bold]arc_e arc_c "
            "boolq obqa piqa winogrande hellaswag lambada mmlu[/bold], or any other name that lm-eval knows: "
            "its tasks.",
            rich_help_panel=DATA,
            autocompletion=complete_tasks,
        ),
    ] = "wikitext2",
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The reference, if the first MODEL is not to be it; the same as naming it first.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Only the first so many windows of a text, and the first so many questions of each task (of "
            "each subject of mmlu): quicker, and to be compared only with runs of the same limit. Without "
            "it, all.",
            rich_help_panel=DATA,
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Solved examples before each question. Without it, what lm-eval's task says: mostly none.",
            rich_help_panel=DATA,
        ),
    ] = None,
    sequence_length: Annotated[
        int,
        typer.Option(
            min=2,
            help="Tokens in a window. Published perplexities use 2048; shorter windows give higher ones.",
            rich_help_panel=DATA,
        ),
    ] = 2048,
    context_tokens: Annotated[
        str,
        typer.Option(
            "--context",
            metavar="N[,N...]",
            help="Tokens of the texts of [bold]needle[/bold], a result for each. --limit is the number of "
            "texts of each length; without it there are 10 for each depth.",
            rich_help_panel=DATA,
        ),
    ] = "2048,8192",
    depths: Annotated[
        str,
        typer.Option(
            metavar="N[,N...]",
            help="Where in these texts the number to be found stands, in percent: 0 is the beginning.",
            rich_help_panel=DATA,
        ),
    ] = "0,25,50,75,100",
    bos: Bos = BosName.AUTO,
    data_root: DataRoot = None,
    batch_size: BatchSize = "auto",
    engine: Engine = EngineName.TRANSFORMERS,
    tensor_parallel_size: TensorParallelSize = 1,
    engine_options: EngineOptions = "{}",
    device: Device = DeviceName.AUTO,
    dtype: Annotated[
        DtypeName,
        typer.Option(
            help="Precision of the computation around the quantized layers, and of an unquantized model. "
            "auto keeps what the model's config says.",
            rich_help_panel=HARDWARE,
        ),
    ] = DtypeName.AUTO,
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Also write the result to this file, with its convention, device and library versions.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    update_card: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OUT",
            help="Also write the result into the model card (README.md) of this checkpoint, one of the "
            "MODELs, in the place of earlier results; may be given several times.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
) -> None:
    """Measure models, quantized or not, and what quantization cost.

    Perplexity the standard way: the text is cut into consecutive windows of 2048 tokens, each is run on its
    own, and the perplexity is exp of the mean negative log-likelihood of all tokens but each window's first;
    lower is better. Zero-shot and few-shot tasks are lm-eval's, with its prompts and metrics.

    With several models, the recovery is what is left of the reference's accuracy (100 % is nothing lost), or
    by how much its perplexity grew (×1 is nothing lost).

    With --engine vllm the models run there: perplexity on the same windows, and tasks through lm-eval's own
    vllm model. A divergence is not possible, since vLLM hands out no whole distributions.
    """
    check_output_file("--json", json_path)
    refuse_for_engine(context, engine, "batch_size")
    size = parse_batch_size(batch_size)
    lengths = parse_integers("--context", context_tokens, example="2048,8192")
    places = parse_integers("--depths", depths, least=0, most=100, example="0,50,100")
    named = models if baseline is None else [baseline, *models]
    if update_card:
        from rrsq.evaluation.card import check_cards

        check_cards(update_card, named)

    report = evaluate_and_print(
        named,
        tasks,
        engine=engine.value,
        tensor_parallel_size=tensor_parallel_size,
        engine_options=engine_options,
        bos=bos.value,
        limit=limit,
        num_fewshot=num_fewshot,
        sequence_length=sequence_length,
        context=lengths,
        depths=places,
        batch_size=size,
        device=device.value,
        dtype=dtype.value,
        data_root=data_root,
    )
    if json_path is not None:
        from rrsq.evaluation.scores import write_json

        write_json(json_path, report.to_dict())
        print_note(f"Wrote {json_path}")
    if update_card:
        from rrsq.evaluation.card import update_cards

        for card in update_cards(update_card, report):
            print_note(f"Wrote {card}")


def evaluate_and_print(models: list[str], tasks: str, **options: Any) -> EvaluationReport:
    """Call ``rrsq.evaluate`` with progress bars, and print what it found; ``options`` are its own."""
    import rrsq

    quiet_libraries()
    with progress_bar() as progress:
        bars = EvaluationBars(progress)
        report = rrsq.evaluate(models, tasks, on_step=bars.show, on_warning=print_warning, **options)
        bars.finish()
    print_report(report)
    return report


def print_report(report: EvaluationReport) -> None:
    """Print the table, how each number was computed, and a warning for each that is no number."""
    from rrsq.cli.evaluation_table import evaluation_table, short_names

    stdout.print(evaluation_table(report))
    names = short_names([model.model for model in report.models])
    for path, name in names.items():
        if name != path:
            print_note(f"{name}: {path}")
    conventions = {result.task: result.convention for model in report.models for result in model.results}
    for task, convention in conventions.items():
        print_note(f"{task}: {convention}")
    if report.reference is not None:
        name = names[report.reference.model]
        print_note(
            f"recovery: accuracy over that of {name} (100 % is nothing lost); ×: perplexity over that of "
            f"{name} (×1 is nothing lost, more is worse)."
        )
    for model in report.models:
        for result in model.results:
            for metric in result.metrics:
                if not math.isfinite(metric.value):
                    print_warning(f"{model.model}: {result.task} gave {metric.value}; its logits are broken.")
