"""Fits the pages to the site that `make docs` builds from mkdocs.yml, so that they read the same on GitHub.

Three pages lie outside of docs/ and become pages of the site. Links between pages lead to the site's, and links to other files
of the repository to `repo_url`, if mkdocs.yml has one; without it their text stays. A folder in `nav` stands for its pages.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[1]
OUTSIDE = {"README.md": "start.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
INSIDE = {place: file for file, place in OUTSIDE.items()}
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav = [*_expanded(config.nav)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for file, place in OUTSIDE.items():
        files.append(File.generated(config, place, content=(REPOSITORY / file).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    place = page.file.src_uri
    at = posixpath.dirname(INSIDE.get(place, f"docs/{place}"))

    def rewritten(link: re.Match[str]) -> str:
        text, target = link.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match("[a-z]+:", path):
            return link[0]
        path = posixpath.normpath(posixpath.join(at, path))
        if not (REPOSITORY / path).exists():
            return link[0]  # mkdocs says that it leads nowhere
        found = _page(path)
        if found is None:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})" if config.repo_url else text
        away = os.path.relpath(found, posixpath.dirname(place) or ".")
        return f"[{text}]({away}{'#' * bool(anchor)}{anchor})"

    # Every second piece is a block of code.
    pieces = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(piece if index % 2 else LINK.sub(rewritten, piece) for index, piece in enumerate(pieces))


def _page(path: str) -> str | None:
    """Place in the site of a file or folder of the repository; None: it is no part of the site."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    if path.startswith("docs/") and (REPOSITORY / path).is_dir():
        path = f"{path}/README.md"
    is_page = path.startswith("docs/") and path.endswith(".md") and (REPOSITORY / path).is_file()
    return path.removeprefix("docs/") if is_page else None


def _expanded(nav: Any) -> Iterator[Any]:
    """Put the pages of a folder, its README first, in the place of the folder's name."""
    for entry in nav:
        (title, value) = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if isinstance(value, list):
            yield {title: [*_expanded(value)]}
        elif value.endswith("/"):
            folder = REPOSITORY / "docs" / value
            pages = sorted(folder.glob("*.md"), key=lambda page: (page.name != "README.md", page.name))
            yield from (f"{value}{page.name}" for page in pages)
        else:
            yield entry
