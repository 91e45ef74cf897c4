"""``rrsq doctor``: is everything here that rrsq needs, and which kernels will it use?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from rrsq.cli.console import examples, stdout
from rrsq.cli.options import DataRoot

if TYPE_CHECKING:
    from rrsq.doctor import Finding

__all__ = ["EXAMPLES", "doctor"]

EXAMPLES = examples("rrsq doctor", "rrsq doctor --data-root ~/data", "RRSQ_KERNELS=eager rrsq doctor")
MARKS = {"ok": Text("✓", "green"), "note": Text("!", "yellow"), "problem": Text("✗", "bold red")}


def doctor(data_root: DataRoot = None) -> None:
    """Report libraries, GPUs, the kernels that will be used and why others will not, data and caches.

    Says what to do about each problem, and exits with 1 if there is one that makes something fail.
    """
    from rrsq.doctor import examine

    findings = examine(data_root)
    for title, section in (
        ("libraries", findings.libraries),
        ("hardware", findings.hardware),
        ("kernels for a bfloat16 model here", findings.kernels),
        ("data and caches", findings.storage),
    ):
        stdout.print(_table(title, section))
    for finding in findings.all():
        if finding.hint:
            line = Text.assemble(MARKS[finding.state], f" {finding.subject}: {finding.hint}")
            stdout.print(line, soft_wrap=True)
    if any(finding.state == "problem" for finding in findings.all()):
        raise typer.Exit(1)


def _table(title: str, section: tuple[Finding, ...]) -> Table:
    table = Table(
        title=title, box=SIMPLE_HEAD, show_header=False, show_edge=False, title_justify="left", pad_edge=False
    )
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in section:
        table.add_row(MARKS[finding.state], Text(finding.subject), Text(finding.found))
    return table
