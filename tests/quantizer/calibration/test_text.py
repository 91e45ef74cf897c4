"""Text sources: local files, a data root laid out like the Hub, and what is said when there is neither."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rrsq.errors import DataError
from rrsq.quantizer.calibration.text import DatasetId, load_documents, resolve_data_root


@pytest.fixture(autouse=True)
def _no_data_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RRSQ_DATA_ROOT", raising=False)


def write_parquet(path: Path, **columns: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def test_txt_is_one_document_as_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "a [draft].txt"
    file.write_text("one\n\n\ntwo – é\n", encoding="utf-8")
    assert load_documents(str(file), split="test") == ["one\n\n\ntwo – é\n"]


def test_edited_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    for text in ("first", "other"):
        file.write_text(text)
        assert load_documents(str(file), split="test") == [text]


def test_jsonl_takes_the_text_column(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"title": "t", "text": "one"}, {"title": "u", "text": ""}, {"title": "v", "text": None}]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert load_documents(str(file), split="test") == ["one", ""]


def test_parquet_takes_the_only_string_column(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", id=[1, 2], content=["one", "two"])
    assert load_documents(str(file), split="test") == ["one", "two"]


@pytest.mark.parametrize("columns", [{"question": ["a"], "answer": ["b"]}, {"id": [1]}])
def test_ambiguous_columns_are_named(tmp_path: Path, columns: dict[str, list[object]]) -> None:
    file = write_parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(DataError) as caught:
        load_documents(str(file), split="test")
    assert all(name in str(caught.value) for name in columns)


@pytest.mark.parametrize("content", ["", " \n\n "])
def test_empty_file_is_an_error(tmp_path: Path, content: str) -> None:
    file = tmp_path / "a.txt"
    file.write_text(content)
    with pytest.raises(DataError, match=r"empty|no text"):
        load_documents(str(file), split="test")


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text file"):
        load_documents(str(tmp_path / "a.txt"), split="test")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "unfinished'),
        ("a.parquet", b"no parquet"),
        ("a.txt", b"\xff not UTF-8"),
    ],
)
def test_damaged_file_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}.*cannot be read"):
        load_documents(str(tmp_path / name), split="test")


@pytest.mark.parametrize("source", ["wikitext2", "Salesforce/wikitext:wikitext-2-raw-v1"])
def test_data_root_is_looked_in(tiny_hub: Path, source: str) -> None:
    file = tiny_hub / "Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet"
    documents = load_documents(source, split="test", data_root=tiny_hub)
    assert documents == pq.read_table(file)["text"].to_pylist()
    assert documents[0] == ""
    assert documents != load_documents(source, split="train", data_root=tiny_hub)


def test_data_root_from_the_environment(tiny_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RRSQ_DATA_ROOT", str(tiny_hub))
    assert load_documents("wikitext2", split="test")
    assert resolve_data_root() == tiny_hub


def test_data_root_without_a_card(tmp_path: Path) -> None:
    write_parquet(tmp_path / "someone" / "prose" / "data" / "train-00000-of-00001.parquet", text=["one"])
    assert load_documents("someone/prose", split="train", data_root=tmp_path) == ["one"]


def test_several_configs_need_a_choice(tmp_path: Path) -> None:
    card = "---\nconfigs:\n"
    for name in ("easy", "hard"):
        write_parquet(tmp_path / "someone" / "prose" / name / "train-0.parquet", text=[name])
        card += f"- config_name: {name}\n  data_files: {name}/train-*.parquet\n"
    (tmp_path / "someone" / "prose" / "README.md").write_text(card + "---\n")
    assert load_documents("someone/prose:hard", split="train", data_root=tmp_path) == ["hard"]
    with pytest.raises(DataError, match=r"easy.*hard"):
        load_documents("someone/prose", split="train", data_root=tmp_path)
    with pytest.raises(DataError, match="'medium' not found"):
        load_documents("someone/prose:medium", split="train", data_root=tmp_path)


def test_unknown_split_names_those_there_are(tiny_hub: Path) -> None:
    with pytest.raises(DataError, match=r"'dev'.*test.*train"):
        load_documents("wikitext2", split="dev", data_root=tiny_hub)


def test_data_root_must_be_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"nowhere.*is not a folder"):
        load_documents("wikitext2", split="test", data_root=tmp_path / "nowhere")
    monkeypatch.setenv("RRSQ_DATA_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"nowhere.*is not a folder"):
        load_documents("wikitext2", split="test")


def test_unreachable_hub_says_how_to_use_local_data(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_documents("someone/no-such-prose", split="test", data_root=tmp_path)
    message = str(caught.value)
    assert "--data-root" in message
    assert "RRSQ_DATA_ROOT" in message
    assert str(tmp_path / "someone" / "no-such-prose") in message


def test_near_miss_of_a_named_data_set_is_suggested() -> None:
    with pytest.raises(DataError, match="Did you mean 'wikitext2'"):
        load_documents("wikitxt2", split="test")


@pytest.mark.parametrize("source", ["", "a b", "../secret/x", "a/b/c", "a/b:", "notes.csv/x/y"])
def test_neither_id_nor_file(source: str) -> None:
    with pytest.raises(DataError, match="neither"):
        DatasetId.parse(source)
