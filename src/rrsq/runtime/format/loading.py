"""Loading models and tokenizers: checkpoints, Hugging Face folders, Hub ids and GGUF files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...arguments import DTYPES, check_choice, check_path
from ...devices import find_device
from ...errors import CheckpointError, DataError, ModelLoadError, RRSQError, StorageError, UsageError
from .json_files import read_config, read_json_object
from .shards import read_shards

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .format import CheckpointInfo

__all__ = [
    "check_token_ids",
    "check_token_range",
    "first_line",
    "is_checkpoint",
    "load_config",
    "load_model",
    "load_tokenizer",
    "locate_model",
    "read_info",
]


_LEAST_VOCABULARY = 16
# Arguments of from_pretrained by which it takes other files than model.safetensors and the index.
_OTHER_FILES = {"variant", "subfolder"}


def locate_model(path: str, data_root: Path | str | None = None) -> tuple[str, dict[str, Any]]:
    """What to give to ``from_pretrained``: a folder or Hub id, and ``gguf_file`` for a GGUF file.

    A Hub id is looked for under ``data_root`` (else ``RRSQ_DATA_ROOT``) first, as ``<root>/<org>/<name>``.

    Raises:
        ModelLoadError: a local path that does not exist or holds no model.
    """
    try:
        local = Path(path).expanduser()
        local.exists()
    except (OSError, ValueError, RuntimeError) as error:  # Too long, or the home of nobody.
        raise ModelLoadError(f"'{path:.100}' is no path of a model: {first_line(error):.100}.") from error
    if local.suffix.lower() == ".gguf":
        if not local.is_file():
            raise ModelLoadError(f"There is no GGUF file '{path}'.")
        return str(local.parent), {"gguf_file": local.name}
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ModelLoadError(
                f"The folder '{path}' holds no config.json. Give the folder of a Hugging Face model or of an"
                " rrsq checkpoint."
            )
        return str(local), {}
    if local.exists():
        raise ModelLoadError(f"'{path}' is a file. Give a folder, a Hub id or a .gguf file.")
    root = data_root or os.environ.get("RRSQ_DATA_ROOT")
    if root and (Path(root) / path / "config.json").is_file():
        return str(Path(root) / path), {}
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or not path.strip():
        raise ModelLoadError(f"There is no model folder '{path}'.")
    return path, {}


def is_checkpoint(path: str) -> bool:
    """Whether a local folder is an rrsq checkpoint."""
    try:
        return _says_rrsq(read_json_object(Path(path) / "config.json"))
    except CheckpointError:
        return False


def read_info(folder: Path) -> CheckpointInfo:
    """What a checkpoint says of itself.

    Raises:
        ModelLoadError: there is no config.json in the folder.
        CheckpointError: it is a model that rrsq did not quantize, or what it says is not valid.
    """
    from .format import parse_info

    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"'{folder}' is no checkpoint: there is no config.json in it.")
    config = read_config(folder)
    if not _says_rrsq(config):
        raise CheckpointError(f"'{folder}' is a model, but none that rrsq quantized.")
    return parse_info(config["quantization_config"])


def _says_rrsq(config: dict[str, Any]) -> bool:
    section = config.get("quantization_config")
    return isinstance(section, dict) and section.get("quant_method") == "rrsq"


def load_config(path: str, data_root: Path | str | None = None) -> Any:
    """The transformers configuration of a model; cheap, so that an unsupported one is refused early.

    Raises:
        ModelLoadError: it cannot be found, reached or read.
        CheckpointError: it is no valid JSON, or asks for absurd sizes or for code from elsewhere.
    """
    from transformers import AutoConfig

    name, options = locate_model(path, data_root)
    _check_files(name, options)
    with _explained(path, "configuration"):
        return AutoConfig.from_pretrained(name, trust_remote_code=False, **options)


def load_model(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    data_root: Path | str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a causal language model, quantized or not, for inference.

    Args:
        path: checkpoint, Hugging Face folder, Hub id or ``.gguf`` file.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; not together with ``device_map``.
        dtype: of what is not quantized: ``auto`` (the configuration's), ``bfloat16``, ``float16`` or
            ``float32``, or torch's dtype of such a name.
        data_root: see :func:`locate_model`.
        kwargs: passed on to ``from_pretrained``, ``device_map`` with ``offload_buffers=True``. Only here can
            code of the model be asked for (``trust_remote_code=True``), or pickled weights
            (``use_safetensors=False``).

    Raises:
        UsageError: an argument is not what it must be, or ``device`` and ``device_map`` are both given.
        ModelLoadError: the model cannot be found, reached or read.
        CheckpointError: a quantized checkpoint is damaged or of an unknown format.
    """
    from transformers import AutoModelForCausalLM

    from ..kv_cache.attention import cap_attention

    check_path("path", path)
    path = str(path)
    if data_root is not None:
        check_path("data_root", data_root)
    check_choice("dtype", str(dtype).removeprefix("torch."), DTYPES)
    name, options = locate_model(path, data_root)
    if "gguf_file" in options and dtype == "auto":
        dtype = "bfloat16"
    mapped = kwargs.get("device_map") is not None
    if mapped and device != "auto":
        raise UsageError(f"device='{device}' and device_map both say where the model goes. Give one of them.")
    device = find_device(device)
    if mapped:
        # Packed weights are buffers, and shall leave the device as parameters do.
        kwargs.setdefault("offload_buffers", True)
    _check_files(name, options, "generation_config.json")
    options |= {"trust_remote_code": False, "use_safetensors": True, **kwargs, "output_loading_info": True}
    if options["use_safetensors"] and not kwargs.keys() & _OTHER_FILES:
        _check_shards(name, options)
    with _explained(path, "model"):
        model, report = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    if report["missing_keys"]:
        raise ModelLoadError(
            f"The model in '{path}' lacks the tensor '{min(report['missing_keys'])}'. A file of it may not"
            " have been copied, or its config.json belongs to another model."
        )
    if "gguf_file" in options:
        _forget_gguf(model)
    cap_attention(model)
    return (model if mapped else model.to(device)).eval()


def load_tokenizer(path: str, data_root: Path | str | None = None) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises:
        ModelLoadError: there is none, or it cannot be reached or read.
    """
    from transformers import AutoTokenizer

    name, options = locate_model(path, data_root)
    _check_files(name, options, "tokenizer_config.json")
    with _explained(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
        tokenizer("A probe, since damage may show only in use.")
    # Without any tokenizer file transformers makes one that knows only a few special tokens.
    if len(tokenizer) < _LEAST_VOCABULARY:
        raise _no_tokenizer(path, f"it knows only {len(tokenizer)} tokens")
    return tokenizer


def check_token_ids(model: Any, token_ids: Tensor) -> None:
    """Refuse tokens that a model has no embedding for: a lookup would crash, on a GPU for the whole process.

    Raises:
        DataError: there is one, so that the tokenizer is not the model's.
    """
    check_token_range(token_ids, model.get_input_embeddings().num_embeddings)


def check_token_range(token_ids: Tensor, rows: int) -> None:
    """The same for a model that knows so many tokens."""
    if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < rows:
        raise DataError(
            f"The tokenizer gives token numbers up to {int(token_ids.max())}, and the model knows {rows}"
            " tokens. The tokenizer files in the model's folder are not those of this model."
        )


def _check_files(name: str, options: dict[str, Any], *others: str) -> None:
    """Look at the JSON files of a local folder before transformers builds anything by them."""
    folder = Path(name)
    if "gguf_file" in options or not folder.is_dir():
        return
    read_config(folder)
    for other in others:
        if os.path.lexists(folder / other):
            read_json_object(folder / other)


def _check_shards(name: str, options: dict[str, Any]) -> None:
    """Look at the headers of a local folder's shards: transformers says less of what is wrong with them."""
    folder = Path(name)
    if "gguf_file" not in options and folder.is_dir() and "transformers_weights" not in read_config(folder):
        read_shards(folder)


@contextmanager
def _explained(path: str, what: str) -> Iterator[None]:
    """Make one clear error of whatever is raised inside."""
    try:
        yield
    except (RRSQError, MemoryError):
        raise
    except Exception as error:
        raise _explain(error, path, what) from error
    except BaseException as error:
        # A panic of a library written in Rust is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise _explain(RuntimeError(str(error)), path, what) from error


def _forget_gguf(model: Any) -> None:
    """A GGUF file is dequantized as it is loaded; without its mark the model can be saved like any other."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _explain(error: Exception, path: str, what: str) -> RRSQError:
    """One clear error from whatever transformers, safetensors or the Hub client raised."""
    if isinstance(error, OSError) and error.errno is not None and not Path(path).exists():
        return StorageError(f"The {what} of '{path}' cannot be read: {error.strerror}.")
    reason = first_line(error)
    if Path(path).is_dir():
        if what == "tokenizer":
            return _no_tokenizer(path, reason)
        if is_checkpoint(path):
            return CheckpointError(f"The checkpoint '{path}' cannot be loaded: {reason}.")
        return ModelLoadError(f"The {what} in '{path}' cannot be loaded: {reason}.")
    if Path(path).exists():
        return ModelLoadError(f"The {what} of '{path}' cannot be loaded: {reason}.")
    if _missing_on_hub(error):
        return ModelLoadError(
            f"There is no model '{path}', neither as a local folder nor on the Hugging Face Hub (or it is"
            " private: log in with 'hf auth login')."
        )
    return ModelLoadError(
        f"The {what} of '{path}' is not on this machine and the Hugging Face Hub cannot be reached"
        f" ({reason}). Give a local folder, or name with --data-root or RRSQ_DATA_ROOT a folder laid out like"
        f" the Hub that holds '{path}/config.json'."
    )


def _no_tokenizer(path: str, reason: str) -> ModelLoadError:
    return ModelLoadError(
        f"'{path}' has no usable tokenizer ({reason}). Copy tokenizer.json and tokenizer_config.json of the"
        " original model into its folder."
    )


def _missing_on_hub(error: BaseException | None) -> bool:
    while error is not None:
        if type(error).__name__ in ("RepositoryNotFoundError", "GatedRepoError", "HFValidationError"):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """What an exception of another library says, in one line without the full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return text[:300].rstrip(".")
