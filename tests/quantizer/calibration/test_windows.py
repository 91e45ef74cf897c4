"""Token windows against slices of the token ids that the tokenizer itself gives."""

from __future__ import annotations

import copy
import hashlib
import itertools
import struct
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rrsq.errors import DataError, UsageError
from rrsq.quantizer.calibration import windows as windows_module
from rrsq.quantizer.calibration.windows import (
    calibration_windows,
    data_fingerprint,
    evaluation_windows,
    start_token,
)


@pytest.fixture(scope="module")
def documents(tiny_text_file: Path) -> list[str]:
    return tiny_text_file.read_text(encoding="utf-8").split("\n")


@pytest.fixture(scope="module")
def token_ids(tiny_tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[int]:
    return tiny_tokenizer.backend_tokenizer.encode("\n\n".join(documents)).ids


def offset_of(window: list[int], token_ids: list[int]) -> int:
    length = len(window)
    return next(i for i in range(len(token_ids) - length + 1) if token_ids[i : i + length] == window)


def test_evaluation_windows_are_consecutive(
    tiny_tokenizer: PreTrainedTokenizerFast, documents: list[str], token_ids: list[int]
) -> None:
    result = evaluation_windows(tiny_tokenizer, documents, 100)
    count = len(token_ids) // 100
    assert result.dtype == torch.int64
    assert result.tolist() == [token_ids[i * 100 : (i + 1) * 100] for i in range(count)]
    assert torch.equal(evaluation_windows(tiny_tokenizer, documents, 100, limit=3), result[:3])
    assert len(evaluation_windows(tiny_tokenizer, documents, 100, limit=10**6)) == count


@pytest.mark.parametrize("adds_bos", [False, True])
def test_windows_behind_a_start_token(
    tiny_tokenizer: PreTrainedTokenizerFast, documents: list[str], token_ids: list[int], adds_bos: bool
) -> None:
    bos = 1
    tokenizer = copy.deepcopy(tiny_tokenizer)
    if adds_bos:
        name = tokenizer.convert_ids_to_tokens(bos)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{name} $A", special_tokens=[(name, bos)]
        )
        assert tokenizer("the river")["input_ids"][0] == bos
    result = evaluation_windows(tokenizer, documents, 100, 3, start=bos)
    assert result.tolist() == [[bos, *token_ids[i * 99 : (i + 1) * 99]] for i in range(3)]

    result = calibration_windows(tokenizer, documents, 20, 64, seed=0, start=bos)
    assert result.shape == (20, 64)
    assert (result[:, 0] == bos).all()
    offsets = [offset_of(window, token_ids) for window in result[:, 1:].tolist()]
    assert all(later - earlier >= 63 for earlier, later in itertools.pairwise(offsets))


def test_who_gets_a_start_token(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(1)
    assert start_token(tokenizer, "auto", needed=True) == 1
    assert start_token(tokenizer, "auto", needed=False) is None
    assert start_token(tokenizer, "always", needed=False) == 1
    assert start_token(tokenizer, "never", needed=True) is None
    tokenizer.bos_token = None
    assert start_token(tokenizer, "auto", needed=True) is None
    with pytest.raises(UsageError, match="no BOS token"):
        start_token(tokenizer, "always", needed=True)


@pytest.mark.parametrize("seed", range(5))
def test_calibration_windows_lie_in_the_text_without_overlap(
    tiny_tokenizer: PreTrainedTokenizerFast, documents: list[str], token_ids: list[int], seed: int
) -> None:
    result = calibration_windows(tiny_tokenizer, documents, 50, 64, seed)
    assert result.shape == (50, 64)
    assert result.dtype == torch.int64
    offsets = [offset_of(window, token_ids) for window in result.tolist()]
    assert all(later - earlier >= 64 for earlier, later in itertools.pairwise(offsets))
    assert len({offset % 64 for offset in offsets}) > 10


def test_seed_decides(tiny_tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> None:
    first, again, other = (calibration_windows(tiny_tokenizer, documents, 8, 64, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_short_text_gives_what_it_holds_with_a_warning(
    tiny_tokenizer: PreTrainedTokenizerFast, documents: list[str], token_ids: list[int]
) -> None:
    length = len(token_ids) // 3 - 5
    with pytest.warns(UserWarning, match=f"{len(token_ids)} tokens: 3 windows of {length}, not 10"):
        result = calibration_windows(tiny_tokenizer, documents, 10, length, seed=0)
    assert result.shape == (3, length)


def test_text_of_exactly_the_windows(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    token_ids = tiny_tokenizer("the river and the city")["input_ids"]
    result = calibration_windows(tiny_tokenizer, ["the river and the city"], 1, len(token_ids), seed=0)
    assert result.tolist() == [token_ids]


@pytest.mark.parametrize("cut", [evaluation_windows, lambda *a: calibration_windows(*a[:2], 4, a[2], 0)])
def test_less_than_one_window_is_an_error(tiny_tokenizer: PreTrainedTokenizerFast, cut) -> None:
    count = len(tiny_tokenizer("the river")["input_ids"])
    with pytest.raises(DataError, match=f"has {count} tokens, too few for one window of 2048"):
        cut(tiny_tokenizer, ["the river"], 2048)


def test_long_text_is_no_reason_to_warn(
    tiny_llama_dir: Path, documents: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_llama_dir)
    assert tokenizer.model_max_length == 2048
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(evaluation_windows(tokenizer, documents, 1000)) > 10
    assert not caplog.records


def test_huge_text_is_thinned_out_by_whole_documents(
    tiny_tokenizer: PreTrainedTokenizerFast, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows_module, "MAX_CALIBRATION_CHARACTERS", 5000)
    kept = windows_module._thin_out(documents, torch.Generator().manual_seed(0))
    assert 5000 <= sum(map(len, kept)) < 5000 + max(map(len, documents))
    positions = [documents.index(document) for document in kept]
    assert positions == sorted(positions)
    assert positions[-1] - positions[0] > len(documents) // 2
    assert calibration_windows(tiny_tokenizer, documents, 4, 64, seed=0).shape == (4, 64)


def test_fingerprint_is_the_hash_of_the_ids() -> None:
    ids = torch.tensor([[1, 2], [3, 151935]])
    expected = hashlib.sha256(struct.pack("<4q", 1, 2, 3, 151935)).hexdigest()
    assert data_fingerprint(ids) == expected
    assert data_fingerprint(ids.T.contiguous().T) == expected
    assert data_fingerprint(ids.T) != expected
