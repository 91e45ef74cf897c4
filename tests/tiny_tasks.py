"""Tiny data sets of zero-shot tasks, laid out as on the Hub, with questions of common words."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

TEXT = "the of and a to in was is for on as by river city tower bridge king ship storm winter song film"
WORDS = TEXT.split()
SUBJECTS = """
business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing
medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology
"""
MMLU_OTHER = SUBJECTS.split()
LETTERS = ["A", "B", "C", "D"]


def write_dataset(folder: Path, tables: Mapping[tuple[str, str], list[dict[str, Any]]]) -> None:
    """Write parquet files and a card for the rows of each (configuration, split)."""
    configs: dict[str, list[dict[str, str]]] = {}
    for (config, split), rows in tables.items():
        (folder / config).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / config / f"{split}-00000-of-00001.parquet")
        configs.setdefault(config, []).append({"split": split, "path": f"{config}/{split}-*.parquet"})
    card = {"configs": [{"config_name": name, "data_files": files} for name, files in configs.items()]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n", encoding="utf-8")


def write_task_data(root: Path) -> None:
    """Write ARC (train of the easy part only), OpenBookQA (test), BoolQ (validation) and a part of MMLU."""
    generator = random.Random(0)

    def phrase(least: int, most: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(least, most)))

    def choices() -> dict[str, list[str]]:
        return {"text": [phrase(1, 5) for _ in LETTERS], "label": LETTERS}

    def arc(count: int) -> list[dict[str, Any]]:
        return [
            {
                "id": str(index),
                "question": phrase(4, 12) + "?",
                "choices": choices(),
                "answerKey": generator.choice(LETTERS),
            }
            for index in range(count)
        ]

    parts = {("ARC-Easy", "train"): 6, ("ARC-Easy", "validation"): 4, ("ARC-Easy", "test"): 24}
    parts |= {("ARC-Challenge", "validation"): 4, ("ARC-Challenge", "test"): 16}
    write_dataset(root / "allenai" / "ai2_arc", {part: arc(count) for part, count in parts.items()})
    books = [{"question_stem": row.pop("question"), **row} for row in arc(16)]
    write_dataset(root / "allenai" / "openbookqa", {("main", "test"): books})
    boolq = [
        {"question": phrase(3, 8), "passage": phrase(20, 60), "idx": index, "label": generator.randint(0, 1)}
        for index in range(20)
    ]
    write_dataset(root / "aps" / "super_glue", {("boolq", "validation"): boolq})

    def mmlu(count: int) -> list[dict[str, Any]]:
        return [
            {
                "question": phrase(4, 12),
                "subject": "x",
                "choices": [phrase(1, 4) for _ in LETTERS],
                "answer": generator.randrange(4),
            }
            for _ in range(count)
        ]

    subjects = {
        (subject, split): mmlu(count) for subject in MMLU_OTHER for split, count in (("test", 3), ("dev", 2))
    }
    write_dataset(root / "cais" / "mmlu", subjects)
