"""Sending a finished checkpoint to the Hugging Face Hub, with its model card."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .arguments import check_path
from .errors import HubError, UsageError
from .runtime.format.loading import first_line, read_info

__all__ = ["check_push", "push"]

# What a repository has that nothing was pushed to, or that a push failed to fill.
_EMPTY = {".gitattributes"}
# Of an earlier checkpoint of more shards; read in place of what is pushed, or for nothing.
_STALE = ["*.safetensors", "*.safetensors.index.json"]


def check_push(repository: str, *, overwrite: bool = False) -> bool:
    """See that a checkpoint could be pushed, before anything is done.

    Args:
        repository: ``ORG/NAME``.
        overwrite: it may have files already.

    Returns:
        Whether the repository is there.

    Raises:
        UsageError: the name is none, there is no token, or the repository has files.
        HubError: the Hub cannot be reached, or refuses the token.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        named = repository.count("/") == 1
    except HFValidationError:
        named = False
    if not named:
        raise UsageError(f"'{repository}' is no repository of the Hub. Give ORG/NAME.")
    if get_token() is None:
        raise UsageError("There is no token for the Hub. Run 'hf auth login', or set HF_TOKEN.")
    with _explained(repository):
        api = HfApi()
        api.whoami()
        try:
            files = set(api.list_repo_files(repository))
        except RepositoryNotFoundError:
            return False
    if files - _EMPTY and not overwrite:
        raise UsageError(
            f"'{repository}' is on the Hub already. Give another name, or replace its files with"
            f" 'rrsq push OUT {repository} --overwrite'."
        )
    return True


def push(folder: Path, repository: str, *, private: bool = False, overwrite: bool = False) -> str:
    """Send a checkpoint to the Hub; the folder stays as it is, whatever happens.

    Args:
        folder: of a checkpoint of rrsq's.
        repository: ``ORG/NAME``, made if it is not there.
        private: nobody else sees a repository that is made here.
        overwrite: replace the files of one that is there.

    Returns:
        The address of the repository.

    Raises:
        ModelLoadError, CheckpointError: the folder is no checkpoint.
        UsageError, HubError: as :func:`check_push`; the Hub broke off.
    """
    from huggingface_hub import HfApi

    check_path("the checkpoint", folder)
    read_info(folder)
    there = check_push(repository, overwrite=overwrite)
    with _explained(repository):
        api = HfApi()
        if not there:
            api.create_repo(repository, private=private or None)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Checkpoint of rrsq",
            delete_patterns=_STALE if overwrite else None,
        )
    return f"{api.endpoint}/{repository}"


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn what the client raises into one sentence."""
    from huggingface_hub import errors
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # Of httpx, or of whatever the client's version builds on.
    transport: type[Exception] = getattr(errors, "HTTPError", OSError)

    try:
        yield
    except HfHubHTTPError as error:
        said = error.server_message or first_line(error)
        raise HubError(f"The Hub refuses '{repository}': {said.rstrip('.')}.") from error
    except (OfflineModeIsEnabled, transport, OSError) as error:
        raise HubError(f"The Hub cannot be reached for '{repository}': {first_line(error)}.") from error
