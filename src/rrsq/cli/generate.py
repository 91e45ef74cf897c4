"""``rrsq generate``: let a model continue a prompt."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rrsq.cli.console import examples, quiet_libraries
from rrsq.cli.options import DataRoot, Device, DeviceName, resolve_device

__all__ = ["EXAMPLES", "generate"]

SAMPLING = "Sampling"
EXAMPLES = examples(
    'rrsq generate out/ "The capital of France is"', 'rrsq generate out/ "Write a haiku." --chat'
)


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint, a Hugging Face folder, or a Hub id.")
    ],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to generate at most.", rich_help_panel=SAMPLING)
    ] = 64,
    temperature: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="0 takes the likeliest token each time; higher is more varied.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.", rich_help_panel=SAMPLING)] = 0,
    data_root: DataRoot = None,
    device: Device = DeviceName.AUTO,
) -> None:
    """Continue a prompt; the text appears as it is generated."""
    import torch
    from transformers import TextStreamer

    from rrsq.errors import CheckpointError, UsageError
    from rrsq.runtime.format.loading import check_token_ids, first_line, load_model, load_tokenizer

    device_name = resolve_device(device)
    quiet_libraries()
    tokenizer: Any = load_tokenizer(model, data_root)
    if chat and not tokenizer.chat_template:
        raise UsageError(
            f"The tokenizer of '{model}' has no chat template, as base models have none. Leave out --chat."
        )
    inputs = _inputs(tokenizer, prompt, model, chat=chat)
    if not inputs["input_ids"].numel():
        raise UsageError("The prompt has no tokens" + (" in the model's chat template." if chat else "."))
    loaded: Any = load_model(model, device=device_name, data_root=data_root)
    check_token_ids(loaded, inputs["input_ids"])
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    try:
        loaded.generate(
            **{key: value.to(loaded.device) for key, value in inputs.items() if key != "token_type_ids"},
            max_new_tokens=max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True),
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
