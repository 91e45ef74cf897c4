"""A report as plain data, which becomes Markdown and a page alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

__all__ = ["Code", "Document", "Figure", "Items", "Part", "Section", "Table", "Text", "html", "markdown"]


@dataclass(frozen=True)
class Text:
    """A paragraph; what stands in backticks is set as code, here and in tables."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of names with what is said of each."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A header and rows of as many cells; with ``numbers`` all columns but the first stand to the right."""

    rows: Sequence[Sequence[str]]
    numbers: bool = True


@dataclass(frozen=True)
class Code:
    """A command."""

    text: str


@dataclass(frozen=True)
class Figure:
    """A picture as SVG, of the page only."""

    svg: str
    caption: str


Part = Text | Items | Table | Code | Figure


@dataclass(frozen=True)
class Section:
    """Some parts below a heading; the first section of a report may have none."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Document:
    """A report."""

    title: str
    sections: Sequence[Section]


def markdown(document: Document) -> str:
    """The document without its sections of pictures."""
    blocks = [f"# {document.title}"]
    for section in document.sections:
        if any(isinstance(part, Figure) for part in section.parts):
            continue
        blocks += [f"## {section.title}"] if section.title else []
        blocks += map(_markdown_part, section.parts)
    return "\n\n".join(blocks) + "\n"


def _markdown_part(part: Part) -> str:
    if isinstance(part, Text):
        return part.text
    if isinstance(part, Items):
        return "\n".join(f"- **{name}**: {text}" for name, text in part.items)
    if isinstance(part, Code):
        return f"```bash\n{part.text}\n```"
    assert isinstance(part, Table)
    header, *body = [[cell.replace("|", "\\|") for cell in row] for row in part.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *body])


def html(document: Document) -> str:
    """One file with everything in it, for a screen, light or dark, and for paper."""
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    title = escape(document.title)
    sections = []
    for section in document.sections:
        heading = f"<h2>{escape(section.title)}</h2>\n" if section.title else ""
        sections.append(f"<section>{heading}" + "\n".join(map(_html_part, section.parts)) + "</section>")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{style}</style></head>",
            f"<body><main><h1>{title}</h1>",
            *sections,
            "</main></body></html>",
            "",
        ]
    )


def _html_part(part: Part) -> str:
    if isinstance(part, Text):
        return f"<p>{_inline(part.text)}</p>"
    if isinstance(part, Items):
        items = (f"<li><strong>{escape(name)}</strong>: {_inline(text)}</li>" for name, text in part.items)
        return f"<ul>{''.join(items)}</ul>"
    if isinstance(part, Code):
        return f"<pre><code>{escape(part.text)}</code></pre>"
    if isinstance(part, Figure):
        return f"<figure><figcaption>{escape(part.caption)}</figcaption>{part.svg}</figure>"
    header, *body = part.rows
    head = "".join(f'<th scope="col">{_inline(cell)}</th>' for cell in header)
    rows = "\n".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in body)
    kind = ' class="numbers"' if part.numbers else ""
    table = f"<table{kind}><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
