"""What the command line does, as functions: ``rrsq.quantize``, ``rrsq.evaluate`` and ``rrsq.export``.

``import rrsq`` does not import this module; it is looked up when one of its functions is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .arguments import DTYPES, check_choice, check_integer, check_path, check_target, integers, texts
from .errors import UsageError

if TYPE_CHECKING:
    from .evaluation.run import StepCallback as EvaluationStep
    from .evaluation.scores import EvaluationReport
    from .exporting.produce import ExportReport, ExportStep
    from .quantizer.budget.plan import Budget
    from .quantizer.calibration.windows import BosChoice
    from .quantizer.outcome import QuantizationReport
    from .quantizer.production.produce import StepCallback as QuantizationStep
    from .quantizer.production.source import NoteCallback
    from .recipe import Recipe

__all__ = ["check_sensitivities", "choose_recipe", "evaluate", "export", "quantize"]

_BOS = ("auto", "always", "never")


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | Recipe = "rrs-w4a4kv4",
    overrides: str | Iterable[str] = (),
    ignore: str | Iterable[str] = (),
    target_bits: float | None = None,
    target_activation_bits: float | None = None,
    sensitivities: str | Path | None = None,
    calibration_data: str | Path = "wikitext2",
    num_samples: int = 128,
    sequence_length: int = 2048,
    bos: BosChoice = "auto",
    seed: int = 0,
    calibration: str | Path | None = None,
    device: str = "auto",
    data_root: str | Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    max_shard_size: str = "5GB",
    offload_dir: str | Path | None = None,
    on_step: QuantizationStep = lambda done, total, per_layer, text: None,
    on_note: NoteCallback = lambda text: None,
) -> QuantizationReport:
    """Quantize a model and write its checkpoint, as ``rrsq quantize`` does.

    The checkpoint appears whole or not at all; the same call goes on from the last finished layer after a
    stop. Started by ``torchrun``, the processes share the calibration text, and the first one writes.

    Args:
        model: Hub id, Hugging Face folder or ``.gguf`` file, in 16 or 32 bits.
        output: folder to write.
        recipe: a name of :func:`rrsq.recipe.recipe_names`, the path of a YAML file, or a recipe.
        overrides: assignments such as ``weights.group_size=64``, as ``--set`` takes them; one, or several.
        ignore: patterns of linears to keep in 16 bits, such as ``*.o_proj`` or ``model.layers.0.*``, one or
            several, besides the recipe's ``modules_to_not_convert``.
        target_bits: stored bits a weight that the layers' linears and the output head may have on the mean.
            What each bit is worth is measured on the calibration text, and the recipe gets the overrides of
            least expected loss.
        target_activation_bits: the same of the linears' activations, weighted by the weights they meet.
        sensitivities: file to keep what was measured in, or to take it from if it is there.
        calibration_data: ``wikitext2``, a Hub data set (``org/name`` or ``org/name:config``), or a ``.txt``,
            ``.jsonl`` or ``.parquet`` file.
        num_samples: windows of calibration text.
        sequence_length: tokens in a window.
        bos: whether each window begins with the BOS token: ``auto`` (as the model's family needs it),
            ``always`` or ``never``.
        seed: of the rotations' random signs and the windows' places.
        calibration: folder of ``rrsq calibrate`` to use in place of text, whose options then do nothing.
        device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        data_root: folder laid out like the Hub, looked in before it; else what ``RRSQ_DATA_ROOT`` names.
        overwrite: replace ``output`` if it exists.
        restart: throw away what an unfinished run of the same output left.
        max_shard_size: of one safetensors file, such as ``5GB``.
        offload_dir: folder on a fast disk for the activations of calibration, which else are in memory.
        on_step: told of progress; see :data:`rrsq.quantizer.production.produce.StepCallback`.
        on_note: told what a user may want to know; by the first process only.

    Returns:
        Sizes in bytes, seconds, peak memory in bytes, and the error of each layer in dB.

    Raises:
        UsageError: an argument, the recipe, the model, the text or the output folder is not what it must be.
        NonFiniteError: a weight or an activation is NaN or Inf.
        StorageError: the disk is full, or the folder cannot be written.
    """
    import torch

    from .devices import find_device
    from .quantizer.budget.measure import allocate_bits, check_possible, kept_losses
    from .quantizer.budget.plan import Budget
    from .quantizer.calibration.workers import joined_workers
    from .quantizer.needs import needs_calibration
    from .quantizer.options import QuantizationOptions
    from .quantizer.production.output_shards import parse_size
    from .quantizer.production.produce import (
        CalibrationText,
        OutputOptions,
        SourceModel,
        check_source,
        load_calibration,
        open_calibration,
        produce_checkpoint,
    )
    from .runtime.format.loading import load_tokenizer
    from .storage import check_output
    from .work_folder import was_published

    check_path("model", model)
    check_path("output", output)
    check_path("calibration_data", calibration_data)
    for name, path in (("data_root", data_root), ("calibration", calibration), ("offload_dir", offload_dir)):
        if path is not None:
            check_path(name, path)
    model, root = str(model), _path(data_root)
    check_integer("num_samples", num_samples, 1)
    check_integer("sequence_length", sequence_length, 8)
    check_integer("seed", seed, 0)
    check_choice("bos", bos, _BOS)
    budget = Budget(
        check_target("target_bits", target_bits),
        check_target("target_activation_bits", target_activation_bits),
    )
    kept = check_sensitivities(budget, _path(sensitivities), calibrated=calibration is not None)
    parse_size(max_shard_size)  # Wrong, it is refused before a text is fetched.
    chosen = choose_recipe(recipe, overrides, ignore)
    to = OutputOptions(Path(output), overwrite, max_shard_size, restart, _path(offload_dir))
    if restart or not was_published(to.folder):
        check_output(to.folder, overwrite=overwrite)
    where = find_device(device)
    family = check_source(model, root, chosen)
    if budget:
        check_possible(model, chosen, budget, root)
    learned = None if calibration is None else open_calibration(Path(calibration), chosen, seed)
    with joined_workers(torch.device(where)) as workers:
        on_step(0, 0, 0, "tokenizer and calibration text")
        tokenizer = load_tokenizer(model, root)
        if budget and workers.count > 1:
            raise UsageError("Sensitivities are measured by one process. Start one, without torchrun.")
        if learned is None and (budget or needs_calibration(chosen)):
            text = CalibrationText(str(calibration_data), num_samples, sequence_length, seed, bos)
            learned = load_calibration(tokenizer, family, text, root)
        noted = on_note if workers.rank == 0 else lambda note: None
        file = kept or kept_losses(to.folder)
        if budget and learned is not None:
            if restart and kept is None:
                file.unlink(missing_ok=True)
            chosen = allocate_bits(
                model,
                chosen,
                budget,
                learned,
                file,
                named=kept is not None,
                seed=seed,
                device=where,
                data_root=root,
                on_step=on_step,
                on_note=noted,
            ).recipe
            learned = learned if needs_calibration(chosen) else None
        report = produce_checkpoint(
            SourceModel(model, tokenizer, root),
            chosen,
            to,
            learned,
            QuantizationOptions(seed=seed, device=where, workers=workers),
            on_step=on_step,
            on_note=noted,
        ).report
        if budget and kept is None:
            file.unlink(missing_ok=True)
        return report


def evaluate(
    models: str | Path | Sequence[str | Path],
    tasks: str | Sequence[str] = "wikitext2",
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    sequence_length: int = 2048,
    context: int | Iterable[int] = (2048, 8192),
    depths: int | Iterable[int] = (0, 25, 50, 75, 100),
    bos: BosChoice = "auto",
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    data_root: str | Path | None = None,
    engine: Literal["transformers", "vllm"] = "transformers",
    tensor_parallel_size: int = 1,
    engine_options: str = "{}",
    on_step: EvaluationStep = lambda model, doing, done, total, text: None,
    on_warning: NoteCallback = lambda text: None,
) -> EvaluationReport:
    """Measure models, quantized or not, as ``rrsq eval`` does.

    Args:
        models: checkpoints, Hugging Face folders or Hub ids. With several, the first is the reference that
            the others are compared with.
        tasks: names as ``--tasks`` takes them, such as ``["wikitext2", "kl", "arc_e"]``.
        limit: only the first so many windows of a text and questions of a task; None for all. The number of
            texts of each length of ``needle``; None for 10 at each depth.
        num_fewshot: solved examples before each question; None for what lm-eval's task says.
        sequence_length: tokens in a window.
        context: tokens of the texts of ``needle``, a result for each.
        depths: where in them the number to be found stands, in percent.
        bos: see :func:`quantize`.
        batch_size: windows or questions to run at a time; None: found from the memory that is free.
        device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: of what is not quantized: ``auto``, ``bfloat16``, ``float16`` or ``float32``.
        data_root: folder laid out like the Hub, looked in before it; else what ``RRSQ_DATA_ROOT`` names.
        engine: what runs the models; ``vllm`` takes the GPU, and ``device`` and ``batch_size`` do nothing.
        tensor_parallel_size: with vllm, GPUs that share each layer.
        engine_options: with vllm, JSON of further options of its ``LLM``.
        on_step: told of progress; see :data:`rrsq.evaluation.run.StepCallback`.
        on_warning: told what may surprise.

    Returns:
        What each task gave on each model; ``report.models[0].result("wikitext2").headline.value`` is a
        number of it, and ``report.to_dict()`` all of it as plain data.

    Raises:
        UsageError: an argument or a task is not what it must be, data or a model is missing, or tokenizers
            differ.
        CheckpointError: a checkpoint is damaged.
    """
    from .devices import find_device
    from .evaluation.run import check_comparison, evaluate_models, prepare_tasks
    from .evaluation.scores import EvaluationReport
    from .evaluation.served import EngineSettings, check_served, evaluate_served
    from .evaluation.tasks import TaskOptions, parse_tasks
    from .vllm.engine import parse_engine_options

    if data_root is not None:
        check_path("data_root", data_root)
    check_integer("sequence_length", sequence_length, 2)
    check_integer("tensor_parallel_size", tensor_parallel_size, 1)
    for name, number, least in (
        ("limit", limit, 1),
        ("num_fewshot", num_fewshot, 0),
        ("batch_size", batch_size, 1),
    ):
        if number is not None:
            check_integer(name, number, least)
    check_choice("bos", bos, _BOS)
    check_choice("dtype", dtype, DTYPES)
    check_choice("engine", engine, ("transformers", "vllm"))
    llm_options = parse_engine_options(engine_options)
    several = (
        list(models) if isinstance(models, Sequence) and not isinstance(models, str | bytes) else [models]
    )
    if not several:
        raise UsageError("No model was named.")
    for model in several:
        check_path("models", model)
    names = [str(model) for model in several]
    parsed = parse_tasks(",".join(texts("tasks", tasks)))
    options = TaskOptions(
        sequence_length=sequence_length,
        context=integers("context", context, 1),
        depths=integers("depths", depths, 0, 100),
        bos=bos,
        limit=limit,
        batch_size=batch_size,
        num_fewshot=num_fewshot,
        data_root=_path(data_root),
    )
    where = find_device(device)
    settings = None
    if engine == "vllm":
        settings = EngineSettings(tensor_parallel_size, dtype, llm_options)
        warning = check_served(names, parsed, options.data_root, settings)
        if warning is not None:
            on_warning(warning)
    on_step("", "finding tasks and their data", 0, 0, "")
    prepare_tasks(parsed, options)
    check_comparison(names, parsed, options)
    if settings is not None:
        return EvaluationReport.of(evaluate_served(names, parsed, options, settings, on_step))
    return EvaluationReport.of(
        evaluate_models(names, parsed, options, device=where, dtype=dtype, on_step=on_step)
    )


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    format: Literal["compressed-tensors"] = "compressed-tensors",
    dtype: str = "auto",
    drop_cache: bool = False,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    on_step: ExportStep = lambda done, total, text: None,
) -> ExportReport:
    """Write a checkpoint in a format that other engines read without rrsq, as ``rrsq export`` does.

    The export appears whole or not at all.

    Args:
        checkpoint: folder of a checkpoint without rotations at run time and with 16- or 8-bit activations.
        output: folder to write.
        format: ``compressed-tensors``.
        dtype: of the scales and of what is not quantized: ``auto`` (the checkpoint's), ``bfloat16``,
            ``float16`` or ``float32``.
        drop_cache: export a checkpoint with a quantized KV cache without it; else that is refused.
        overwrite: replace ``output`` if it exists.
        max_shard_size: of one safetensors file, such as ``5GB``.
        on_step: told of progress; see :data:`rrsq.exporting.produce.ExportStep`.

    Returns:
        Sizes in bytes, the linears by how they are stored, and the largest relative error of a scale.

    Raises:
        UsageError: an argument is not what it must be, or other engines have no place for what the
            checkpoint holds.
        CheckpointError: the checkpoint is damaged.
        StorageError: the disk is full, or the folder cannot be written.
    """
    from .exporting.produce import export_checkpoint

    check_path("checkpoint", checkpoint)
    check_path("output", output)
    check_choice("format", format, ("compressed-tensors",))
    check_choice("dtype", dtype, DTYPES)
    return export_checkpoint(
        Path(checkpoint),
        Path(output),
        dtype=dtype,
        drop_cache=drop_cache,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        on_step=on_step,
    )


def choose_recipe(
    recipe: str | Path | Recipe, overrides: str | Iterable[str], ignore: str | Iterable[str]
) -> Recipe:
    """The recipe that is meant, with the overrides and the exceptions; see :func:`quantize`."""
    from .recipe import Recipe, load_recipe, override_recipe

    overrides, ignore = texts("overrides", overrides), texts("ignore", ignore)
    if isinstance(recipe, Recipe):
        chosen = override_recipe(recipe, overrides)
    elif isinstance(recipe, str | Path):
        chosen = load_recipe(str(recipe), overrides)
    else:
        raise UsageError(f"recipe is {recipe!r:.100}, and must be a name, a path or a recipe.")
    patterns = dict.fromkeys((*chosen.modules_to_not_convert, *ignore))
    return chosen.model_copy(update={"modules_to_not_convert": tuple(patterns)})


def check_sensitivities(budget: Budget, file: Path | None, *, calibrated: bool) -> Path | None:
    """The file that is to keep sensitivities; refuses one without use, and one that cannot be written.

    Args:
        budget: of bits.
        file: that was named, or None.
        calibrated: stored statistics take the place of text.

    Raises:
        UsageError: there is no budget to use a file for, no text to measure on, or no such folder.
    """
    if budget and calibrated:
        raise UsageError(
            "A budget of bits is spent by sensitivities that are measured on text, which --calibration takes"
            " the place of. Leave out one of them."
        )
    if file is None:
        return None
    if not budget:
        raise UsageError("--sensitivities is of --target-bits and --target-activation-bits.")
    check_path("sensitivities", file)
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise UsageError(f"--sensitivities {file}: name a file in a folder that exists.")
    return file


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)
