"""The documentation as a site: it builds, needs no network, and has what it promises."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import rrsq
from doc_pages import REPOSITORY

REPORTS = sorted((REPOSITORY / "docs" / "gallery").glob("*.html"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as ``make docs`` builds it."""
    if importlib.util.find_spec("material") is None:
        assert not os.environ.get("CI"), "make install brings mkdocs-material: without it nothing is tested"
        pytest.skip("needs the packages of pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    pages = {page.stem for page in (REPOSITORY / "docs").glob("*.md")}
    assert {page.stem for page in site.glob("*.html")} == {
        *pages,
        "index",
        "changelog",
        "contributing",
        "404",
    }


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loads = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"?(?:https?:)?//[^>]*>")
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert [tag for tag in loads.findall(text) if 'rel="canonical"' not in tag] == [], page.name


def test_the_reference_has_what_is_public(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    for name in set(rrsq.__all__) - {"__version__"}:
        assert re.search(rf"<h3[^>]*>(?:(?!</h3>).)*rrsq\.{name}\b", text, re.DOTALL), name
    assert "sequence_length" in text
    # Sphinx's roles and double backticks are turned.
    assert re.search(r":(?:class|func|mod|data):|``", text) is None


def test_the_gallery_shows_its_reports(site: Path) -> None:
    text = (site / "gallery.html").read_text(encoding="utf-8")
    assert REPORTS
    for report in REPORTS:
        assert (site / "gallery" / report.name).read_bytes() == report.read_bytes()
        assert f'href="gallery/{report.name}"' in text
        assert report.stat().st_size < 600_000


def test_a_broken_link_fails(site: Path, tmp_path: Path) -> None:
    """By the site's configuration, with a page of this test's."""
    config = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    for key in ("hooks", "plugins", "nav"):
        del config[key]
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A\n\n[b](#nowhere)\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "nowhere" in done.stderr
