"""``rrsq generate``: let a model continue a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from rrsq.arguments import MOST
from rrsq.cli.console import examples, print_warning, quiet_libraries
from rrsq.cli.options import (
    DataRoot,
    Device,
    DeviceName,
    Engine,
    EngineName,
    EngineOptions,
    TensorParallelSize,
    refuse_for_engine,
    resolve_device,
)

__all__ = ["EXAMPLES", "generate"]

SAMPLING = "Sampling"
EXAMPLES = examples(
    'rrsq generate out/ "The capital of France is"',
    'rrsq generate out/ "Write a haiku." --chat',
    'rrsq generate out/ "The capital of France is" --engine vllm',
)


def generate(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint, a Hugging Face folder, or a Hub id.")
    ],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=2**24, help="Tokens to generate at most.", rich_help_panel=SAMPLING)
    ] = 64,
    temperature: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=100.0,
            help="0 takes the likeliest token each time; higher is more varied.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0.0,
    seed: Annotated[
        int, typer.Option(min=0, max=MOST, help="Of the sampling.", rich_help_panel=SAMPLING)
    ] = 0,
    data_root: DataRoot = None,
    engine: Engine = EngineName.TRANSFORMERS,
    tensor_parallel_size: TensorParallelSize = 1,
    engine_options: EngineOptions = "{}",
    device: Device = DeviceName.AUTO,
) -> None:
    """Continue a prompt.

    The text appears as it is generated; with --engine vllm when it is complete.
    """
    from rrsq.errors import UsageError
    from rrsq.runtime.format.loading import load_tokenizer
    from rrsq.vllm.engine import check_engine, parse_engine_options, served_folder

    refuse_for_engine(context, engine)
    further = parse_engine_options(engine_options)
    if engine is EngineName.VLLM:
        warning = check_engine(served_folder(model, data_root), tensor_parallel_size)
        if warning is not None:
            print_warning(warning)
    device_name = None if engine is EngineName.VLLM else resolve_device(device)
    quiet_libraries()
    tokenizer: Any = load_tokenizer(model, data_root)
    if chat and not tokenizer.chat_template:
        raise UsageError(
            f"The tokenizer of '{model}' has no chat template, as base models have none. Leave out --chat."
        )
    inputs = _inputs(tokenizer, prompt, model, chat=chat)
    if not inputs["input_ids"].numel():
        raise UsageError("The prompt has no tokens" + (" in the model's chat template." if chat else "."))
    sampling = _Sampling(max_new_tokens, temperature, seed)
    if device_name is None:
        options = {"tensor_parallel_size": tensor_parallel_size, **further}
        prompt_ids: list[int] = inputs["input_ids"][0].tolist()
        new = _in_vllm(model, data_root, prompt_ids, sampling, options)
        shown = new if chat else [*prompt_ids, *new]
        typer.echo(tokenizer.decode(shown, skip_special_tokens=True))
    else:
        _in_transformers(model, data_root, device_name, tokenizer, inputs, sampling, skip_prompt=chat)


@dataclass(frozen=True)
class _Sampling:
    max_new_tokens: int
    temperature: float
    seed: int


def _in_vllm(
    model: str, data_root: Path | None, prompt: list[int], sampling: _Sampling, options: dict[str, Any]
) -> list[int]:
    """The new tokens."""
    import torch

    from rrsq.errors import UsageError
    from rrsq.runtime.format.loading import check_token_range, load_config, locate_model
    from rrsq.vllm.engine import Engine as VLLMEngine

    longest = len(prompt) + sampling.max_new_tokens
    context = getattr(load_config(model, data_root).get_text_config(), "max_position_embeddings", None)
    if context is not None and longest > context:
        raise UsageError(
            f"A prompt of {len(prompt)} tokens and {sampling.max_new_tokens} new ones exceed the model's"
            f" context of {context}: give a shorter prompt, or a smaller --max-new-tokens."
        )
    folder, _ = locate_model(model, data_root)
    engine = VLLMEngine(folder, {"max_model_len": longest, "max_num_seqs": 1, **options})
    try:
        check_token_range(torch.tensor(prompt), engine.vocabulary)
        return engine.complete(
            [prompt], sampling.max_new_tokens, temperature=sampling.temperature, seed=sampling.seed
        )[0]
    finally:
        engine.close()


def _in_transformers(
    model: str,
    data_root: Path | None,
    device: str,
    tokenizer: Any,
    inputs: Any,
    asked: _Sampling,
    *,
    skip_prompt: bool,
) -> None:
    """Prints the text as it comes."""
    import torch
    from transformers import TextStreamer

    from rrsq.errors import CheckpointError
    from rrsq.runtime.format.loading import check_token_ids, first_line, load_model

    loaded: Any = load_model(model, device=device, data_root=data_root)
    check_token_ids(loaded, inputs["input_ids"])
    temperature = asked.temperature
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(asked.seed)
    try:
        loaded.generate(
            **{key: value.to(loaded.device) for key, value in inputs.items() if key != "token_type_ids"},
            max_new_tokens=asked.max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True),
            **sampling,
        )
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"'{model}' cannot generate: {first_line(error)}. Its generation_config.json may be at fault."
        ) from error


def _inputs(tokenizer: Any, prompt: str, model: str, *, chat: bool) -> Any:
    """The prompt's tokens, in the model's chat template if asked for."""
    from rrsq.errors import CheckpointError
    from rrsq.runtime.format.loading import first_line

    if not chat:
        return tokenizer(prompt, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}]
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:  # Whatever a template raises: it is a program of the checkpoint's author.
        raise CheckpointError(
            f"The chat template of '{model}' fails: {first_line(error)}. Leave out --chat."
        ) from error
