"""``rrsq push``: a finished checkpoint to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rrsq.cli.console import examples, quiet_libraries, stdout

__all__ = ["EXAMPLES", "push"]

EXAMPLES = examples("rrsq push out/ ORG/NAME", "rrsq push out/ ORG/NAME --private")


def push(
    checkpoint: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of an rrsq checkpoint.")],
    repository: Annotated[
        str, typer.Argument(metavar="ORG/NAME", help="Repository, made if it is not there.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Nobody else sees a repository that is made.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of a repository that is there.")
    ] = False,
) -> None:
    """Send a checkpoint with its model card to the Hugging Face Hub.

    The token is that of 'hf auth login', or HF_TOKEN. OUT stays as it is, whatever happens.
    """
    from rrsq.hub import push as push_checkpoint

    quiet_libraries()
    stdout.print(push_checkpoint(checkpoint, repository, private=private, overwrite=overwrite))
