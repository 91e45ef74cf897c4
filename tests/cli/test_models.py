"""``rrsq models`` and the page of docs that it makes."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from rrsq.cli.app import app
from rrsq.models import families
from rrsq.runtime.rotation.hadamard import plan_hadamard
from tiny_families import TINY

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def rrsq(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["models", *arguments], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    _, made = page.split("<!-- Made by `rrsq models --markdown`; a test compares. -->\n")
    made, _ = made.split("<!-- End of what is made. -->")
    assert made.strip() == rrsq("--markdown").strip(), "put the output of `rrsq models --markdown` there"


def test_the_tables_name_every_family() -> None:
    output = rrsq()
    for family in families():
        assert family.model_type in output
        assert all(name in output for name in family.public)
    assert "online, at qkv and gate_up" in output


def test_a_row_gives_the_orders_of_the_plan() -> None:
    lines = [line for line in rrsq("--markdown").splitlines() if line.startswith("| ")]
    rows = [line.strip("| ").split(" | ") for line in lines]
    assert ["llama", "SmolLM2-135M", "576 = 36·16", "64", "9: none", "1536 = 12·128"] in rows
    row = next(row for row in rows if row[1] == "Qwen2.5-72B")
    plan = plan_hadamard(29568)
    assert row[-1] == f"29568 = 7 blocks of {plan.base}·{plan.power}"
    assert 7 * plan.base * plan.power == 29568


def test_the_families_that_are_said_to_be_tested_are() -> None:
    assert {name.split()[0] for name in TINY} == {family.model_type for family in families()}
