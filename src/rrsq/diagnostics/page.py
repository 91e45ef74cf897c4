"""``report.html``: one file with everything in it, for a screen, light or dark, and for paper."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from .outliers import InputRow, OutlierReport

__all__ = ["Figures", "detail_name", "html_page"]

Figures = dict[str, bytes]

_WHAT_IT_IS = {
    "errors": "Relative error ‖Δy‖ / ‖y‖ of the outputs of each input's linears, over {sample} calibration"
    " tokens: activations quantized as the recipe says, weights rounded to nearest on its grid. GPTQ lowers"
    " the error of the weights; nothing lowers that of the activations. Each linear is measured on exact"
    " inputs, so the errors of earlier layers are not in it. Spike tokens have large outputs and weigh more"
    " here; the column “median token” is the error of a token by itself.",
    "ratios": "The largest magnitude of a token over its root mean square (max / RMS), mean over the same"
    " tokens. A 4-bit grid has 15 levels from minus to plus the maximum: the higher the ratio, the fewer of"
    " them are left for ordinary values. A ratio of 1 would be perfectly flat.",
    "channels": "Some channels are large for nearly all tokens: the bright vertical lines. Rotation mixes all"
    " channels and takes the lines away. A bright horizontal line after rotation is a spike token that was"
    " spread over all channels.",
    "tokens": "In many models some tokens, above all the first of a window, carry enormous values in a few"
    " channels of down_proj's input. Rotation spreads a spike over all channels of its token and cannot"
    " remove it. Where smoothing scales are shared by all tokens, such a token sets everybody's scale.",
    "worst": "The first window, tokens by channels, and the largest magnitude of each channel (over the"
    " {sample} tokens) and of each token (of the first window). A dot marks a top above twice the median.",
    "unit": "RMS is the root mean square of the median token of the same input and stage. Each cell of a map"
    " is the largest of the values it stands for.",
}


def html_page(report: OutlierReport, figures: Figures) -> str:
    """The page.

    Args:
        report: the numbers.
        figures: PNG bytes of ``errors``, ``ratios``, ``channels``, ``tokens``, and of each row of
            ``report.detailed`` under :func:`detail_name`.
    """
    manifest = report.manifest
    sample = f"{report.sample_tokens:,}"
    sections = [
        _section(
            "Which linears will hurt",
            "errors",
            _text("errors", sample=sample),
            _table(_WORST_HEADINGS, (_worst_cells(row) for row in report.worst)),
            _figure(figures["errors"], "Output error of each layer, by linear input"),
        ),
        _section(
            "How far the largest value stands out",
            "ratios",
            _text("ratios"),
            _figure(figures["ratios"], "Ratio max/RMS of each layer, by linear input, at three stages"),
        ),
        _section(
            "Channel-wise outliers",
            "channels",
            _text("channels") + _text("unit"),
            _figure(figures["channels"], "Largest magnitude of each channel of each layer"),
        ),
        _section(
            "Spike tokens",
            "tokens",
            _text("tokens") + _text("unit"),
            _figure(figures["tokens"], "Largest magnitude of each token of the first window, by layer"),
            "<p>The inputs whose largest token, of all calibration tokens, stands out most:</p>",
            _table(_SPIKE_HEADINGS, (_spike_cells(row) for row in report.spiky)),
            *(_detail(row, rank, figures) for row, rank in report.detailed if rank is None),
        ),
        _section(
            "The worst in detail",
            "worst",
            _text("worst", sample=sample) + _text("unit"),
            *(_detail(row, rank, figures) for row, rank in report.detailed if rank is not None),
        ),
        _section("All inputs", "all", _table(_ALL_HEADINGS, (_all_cells(row) for row in report.rows))),
    ]
    title = f"Outliers of {manifest.source_model}"
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{style}</style></head>",
            f"<body><main><h1>{escape(title)}</h1>",
            _facts(report),
            *sections,
            "</main></body></html>",
            "",
        ]
    )


def detail_name(row: InputRow, rank: int | None) -> str:
    """Name of the detail figure of an input, by its rank among the worst from 1, or of a spiky one."""
    kind = "spiky" if rank is None else f"worst-{rank:02d}"
    return f"{kind}-layer-{row.layer}-{row.input}"


_STAGE_HEADINGS = ("max/RMS before", "after rotation", "after smoothing")
_WORST_HEADINGS = (
    "layer", "input", *_STAGE_HEADINGS, "output error", "activations only", "weights only", "median token",
)  # fmt: skip
_ALL_HEADINGS = (*_WORST_HEADINGS, "largest over median token")
_SPIKE_HEADINGS = ("layer", "input", "token", "window", "position", "largest |x|", "median token's", "ratio")


def _worst_cells(row: InputRow) -> list[str]:
    return [
        str(row.layer),
        row.input,
        *(f"{ratio:.1f}" for ratio in row.ratio.values()),
        *(
            f"{error:.1%}"
            for error in (row.output_error, row.activation_error, row.weight_error, row.token_error)
        ),
    ]


def _all_cells(row: InputRow) -> list[str]:
    return [*_worst_cells(row), f"{row.spike_strength:,.1f}"]


def _spike_cells(row: InputRow) -> list[str]:
    spike = row.spikes[0]
    return [
        str(row.layer),
        row.input,
        spike.text,
        str(spike.window),
        str(spike.position),
        f"{spike.magnitude:,.1f}",
        f"{row.median_magnitude:,.2f}",
        f"{row.spike_strength:,.1f}",
    ]


def _facts(report: OutlierReport) -> str:
    manifest = report.manifest
    facts = {
        "model": manifest.source_model,
        "calibration text": f"{manifest.num_samples} windows of {manifest.sequence_length} tokens of"
        f" {manifest.data_source}, seed {manifest.seed}",
        "recipe": f"{manifest.recipe.name}: {manifest.recipe.description}",
        "stored for quantize": "Hessians, magnitudes, means for the cache"
        if manifest.hessians
        else "magnitudes, means for the cache (no Hessians)",
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    rows = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    return f'<table class="facts">{"".join(rows)}</table>'


def _section(title: str, name: str, *parts: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>\n' + "\n".join(parts) + "\n</section>"


def _text(name: str, **values: str) -> str:
    return f"<p>{escape(_WHAT_IT_IS[name].format(**values))}</p>"


def _detail(row: InputRow, rank: int | None, figures: Figures) -> str:
    number = "" if rank is None else f"{rank}. "
    ratios = " → ".join(f"{ratio:.1f}" for ratio in row.ratio.values())
    caption = (
        f"{number}Layer {row.layer}, {row.input} input: output error {row.output_error:.1%}, max/RMS {ratios}"
    )
    return _figure(figures[detail_name(row, rank)], caption, show_caption=True)


def _figure(png: bytes, text: str, *, show_caption: bool = False) -> str:
    data = base64.b64encode(png).decode()
    caption = f"<figcaption>{escape(text)}</figcaption>" if show_caption else ""
    return f'<figure>{caption}<img alt="{escape(text)}" src="data:image/png;base64,{data}"></figure>'


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _cell(text: str) -> str:
    kind = "number" if text[:1].isdigit() else "word"
    return f'<td class="{kind}">{escape(text)}</td>'
