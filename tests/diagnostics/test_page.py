"""The report page, read as a browser reads it: whole in one file, and its numbers those of the layers."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from rrsq.diagnostics import outliers
from rrsq.diagnostics.detail_figure import detail_figure
from rrsq.diagnostics.figure_style import stage_titles
from rrsq.diagnostics.outliers import OutlierReport, read_report
from rrsq.diagnostics.page import html_page
from rrsq.diagnostics.write import write_report
from rrsq.quantizer.calibration.stored import StoredCalibration
from rrsq.runtime.format.loading import load_tokenizer
from tiny_calibration import calibrate_tiny, tiny_windows


class Page(HTMLParser):
    """Tables by their section, images, and everything that could load something from elsewhere."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.section = ""
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.cell: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = attributes["id"] or ""
        elif tag == "table":
            self.tables.setdefault(self.section, []).append([])
        elif tag == "tr":
            self.tables[self.section][-1].append([])
        elif tag in ("td", "th"):
            self.cell = ""
        elif tag == "img":
            self.images.append(attributes)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.tables[self.section][-1][-1].append(self.cell or "")
            self.cell = None

    def handle_data(self, data: str) -> None:
        if self.cell is not None:
            self.cell += data


Written = tuple[Path, StoredCalibration, OutlierReport]
WORST_DRAWN, SPIKY_DRAWN = 2, 1
NO_PICTURE = b"not looked at"


@pytest.fixture(scope="module")
def written(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    """A report with few pictures, since drawing them takes a second each."""
    folder = tmp_path_factory.mktemp("page") / "calib"
    stored = calibrate_tiny(tiny_llama_dir, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outliers, "WORST_DRAWN", WORST_DRAWN)
        patch.setattr(outliers, "SPIKY_DRAWN", SPIKY_DRAWN)
        report = read_report(stored, tiny_windows(), load_tokenizer(str(tiny_llama_dir)))
        write_report(report, folder)
        yield folder, stored, report


@pytest.fixture(scope="module")
def page(written: Written) -> Page:
    return Page((written[0] / "report.html").read_text(encoding="utf-8"))


def page_without_pictures(report: OutlierReport) -> str:
    return html_page(report, defaultdict(lambda: NO_PICTURE))


def test_everything_is_in_the_file(page: Page, written: Written) -> None:
    assert page.open == []
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    text = (written[0] / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import|<script|<link", re.sub(r'src="data:[^"]*"', "", text))
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_the_pictures_are_the_files(page: Page, written: Written) -> None:
    files = {path.read_bytes() for path in (written[0] / "figures").glob("*.png")}
    assert len(files) == 4 + WORST_DRAWN + SPIKY_DRAWN
    shown = {base64.b64decode((image["src"] or "").split(",")[1]) for image in page.images}
    assert shown == files
    for data in shown:
        pixels = matplotlib.image.imread(io.BytesIO(data))
        assert pixels.shape[0] > 400
        assert pixels.shape[1] == 1400
        assert len(np.unique(pixels[:, :, 0])) > 50
    assert all(image["alt"] for image in page.images)


def percent(cell: str) -> float:
    return float(cell.rstrip("%")) / 100


def check_row(cells: list[str], numbers: dict, layer: int, name: str) -> None:  # type: ignore[type-arg]
    assert cells[:2] == [str(layer), name]
    assert [float(cell) for cell in cells[2:5]] == pytest.approx(
        [numbers["ratio"][stage] for stage in ("original", "rotated", "smoothed")], abs=0.051
    )
    fields = ("output_error", "activation_error", "weight_error", "token_error")
    assert [percent(cell) for cell in cells[5:9]] == pytest.approx(
        [numbers[field] for field in fields], abs=0.00051
    )


def test_the_table_of_all_inputs_has_the_numbers_of_the_layers(page: Page, written: Written) -> None:
    _, stored, _ = written
    [table] = page.tables["all"]
    rows = iter(table[1:])
    for layer in range(3):
        for name, numbers in stored.numbers(layer).items():
            cells = next(rows)
            check_row(cells, numbers, layer, name)
            strength = numbers["spikes"][0][2] / numbers["median_magnitude"]
            assert float(cells[9].replace(",", "")) == pytest.approx(strength, abs=0.051)
    assert next(rows, None) is None


def test_the_worst_ten_come_first(page: Page, written: Written) -> None:
    _, stored, report = written
    everything = [
        (numbers["output_error"], layer, name)
        for layer in range(3)
        for name, numbers in stored.numbers(layer).items()
    ]
    [table] = page.tables["errors"]
    expected = sorted(everything, reverse=True)[:10]
    assert len(table) == 11
    for cells, (_, layer, name) in zip(table[1:], expected, strict=True):
        check_row(cells, stored.numbers(layer)[name], layer, name)
    details = [image["alt"] for image in page.images if (image["alt"] or "")[0].isdigit()]
    assert [(alt or "").split(":")[0] for alt in details] == [
        f"{rank}. Layer {layer}, {name} input"
        for rank, (_, layer, name) in enumerate(expected[:WORST_DRAWN], 1)
    ]
    assert [(row.layer, row.input) for row in report.worst] == [entry[1:] for entry in expected]


def test_spikes_are_named_by_their_token(page: Page, written: Written, tiny_llama_dir: Path) -> None:
    tokenizer, windows = load_tokenizer(str(tiny_llama_dir)), tiny_windows()
    [table] = page.tables["tokens"]
    strengths = []
    for layer, name, text, window, position, largest, median, ratio in table[1:]:
        assert text == repr(tokenizer.decode([int(windows[int(window), int(position)])]))
        numbers = written[1].numbers(int(layer))[name]
        assert numbers["spikes"][0][:2] == [int(window), int(position)]
        assert float(largest) == pytest.approx(numbers["spikes"][0][2], abs=0.051)
        assert float(median) == pytest.approx(numbers["median_magnitude"], abs=0.0051)
        strengths.append(float(ratio))
    assert strengths == sorted(strengths, reverse=True)


def test_the_json_has_all_numbers(written: Written) -> None:
    folder, stored, _ = written
    data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert len(data["inputs"]) == 12
    for entry in data["inputs"]:
        numbers = stored.numbers(entry["layer"])[entry["input"]]
        for field in ("ratio", "output_error", "activation_error", "weight_error", "token_error"):
            assert entry[field] == numbers[field]


def test_ten_are_drawn_in_detail_and_two_spiky_ones(written: Written) -> None:
    _, stored, report = written
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outliers, "WORST_DRAWN", 10)
        patch.setattr(outliers, "SPIKY_DRAWN", 2)
        detailed = OutlierReport(stored.manifest, report.rows, stored).detailed
    assert [rank for _, rank in detailed] == [*range(1, 11), None, None]
    assert len({(row.layer, row.input) for row, _ in detailed}) == 12


def test_text_from_outside_is_escaped(written: Written) -> None:
    _, stored, report = written
    hostile = "<script>alert('&')</script>"
    manifest = stored.manifest.model_copy(update={"source_model": hostile})
    rows = tuple(
        replace(row, spikes=tuple(replace(spike, text=hostile) for spike in row.spikes))
        for row in report.rows
    )
    text = page_without_pictures(OutlierReport(manifest, rows, stored))
    assert "<script" not in text
    page = Page(text)
    assert hostile in page.tables[""][0][0]
    assert all(cells[2] == hostile for cells in page.tables["tokens"][0][1:])


@pytest.mark.parametrize("recipe", ["rtn-w4a4", "w16a16kv4"])
def test_stages_that_a_recipe_leaves_out_say_so(tiny_qwen2_dir: Path, tmp_path: Path, recipe: str) -> None:
    stored = calibrate_tiny(tiny_qwen2_dir, tmp_path / "calib", recipe, hessians=False)
    report = read_report(stored, tiny_windows(), load_tokenizer(str(tiny_qwen2_dir)))
    titles = ("rotation: none in this recipe", "smoothing: none of this input")
    assert stage_titles(report, "qkv")[1:] == titles
    figure = detail_figure(report, report.worst[0])
    assert titles == tuple(axes.get_title(loc="left") for axes in figure.axes[1:3])
    assert "no Hessians" in page_without_pictures(report)
