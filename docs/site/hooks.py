"""What the site has besides docs/*.md: README.md as its first page, CONTRIBUTING.md and CHANGELOG.md.

Links are written for the repository. Here they are turned to the pages of the site, and one whose text is a
file's name gets the page's title. A link to any other file of the repository becomes its name, since the site
has no copy of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: Mapping[str, Any]) -> Files:
    """Add the pages from outside of docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(REPOSITORY / source)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Mapping[str, Any], files: Files) -> str:
    """Turn the links of a page to those of the site."""
    sources = {target: source for source, target in PAGES.items()}
    source = REPOSITORY / sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def turned(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        file = source.parent.joinpath(target).resolve()
        if "://" in target or not file.is_relative_to(REPOSITORY) or not file.exists():
            return link[0]  # mkdocs says which of them are broken.
        path = file.relative_to(REPOSITORY).as_posix()
        if path not in PAGES and not path.startswith("docs/"):
            return f"`{path}`" if text == file.name else f"{text} (`{path}`)"
        if Path(text).name == file.name:
            text = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        return f"[{text}]({PAGES.get(path) or path.removeprefix('docs/')}{anchor})"

    return _LINK.sub(turned, markdown)
