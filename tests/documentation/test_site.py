"""The site of the documentation builds without a warning, loads nothing from elsewhere, and is searched without a server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from shell_lines import REPOSITORY

SECTIONS = ["Start", "Recipes", "Features", "Server arguments", "Troubleshooting", "Deployment"]
SECTIONS += ["Architecture", "Decisions", "Benchmarks"]
LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//|<link\b[^>]*\bhref=[\"']?(?:https?:)?//"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environ = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_in_the_site(site: Path) -> None:
    pages = {page.relative_to(REPOSITORY / "docs").with_suffix("") for page in (REPOSITORY / "docs").rglob("*.md")}
    places = {str(page.parent if page.name == "README" else page) for page in pages}
    built = {str(page.parent.relative_to(site)) for page in site.rglob("index.html")}
    assert built == places | {"start", "contributing", "changelog"}


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    files = [file for file in site.rglob("*") if file.suffix in (".html", ".css")]
    assert [file.name for file in files if LOADED.search(text := file.read_text()) or "@import" in text] == []
    assert [file.name for file in files if re.search(r"url\([\"']?(https?:)?//", file.read_text())] == []


def test_links_lead_to_files_of_the_site(site: Path) -> None:
    broken = []
    for file in site.rglob("index.html"):
        for link in re.findall(r"<a\b[^>]*\bhref=\"([^\"#?]+)", file.read_text()):
            target = file.parent / link
            if ":" not in link and not (target.is_file() or (target / "index.html").is_file()):
                broken.append((str(file.relative_to(site)), link))
    assert broken == []


def test_the_search_finds_recipes_flags_and_symptoms(site: Path) -> None:
    found = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    for words, place in (
        ("Qwen/Qwen3-32B", "recipes/qwen3-32b/"),
        ("--page-size", "server_arguments/"),
        ("no room for KV", "features/troubleshooting/"),
    ):
        assert any(words in each["text"] and each["location"].startswith(place) for each in found), words


def test_the_first_page_leads_to_every_section(site: Path) -> None:
    page = (site / "index.html").read_text()
    tabs = re.findall(r'class="md-tabs__link">\s*([^<]*?)\s*</a>', page)
    assert tabs == SECTIONS


def test_the_ten_questions_are_answered_within_two_clicks() -> None:
    page = (REPOSITORY / "docs" / "questions.md").read_text(encoding="utf-8")
    answers = re.findall(r"^## (.*\?)\n\n((?:.+\n)+)", page, re.MULTILINE)
    assert len(answers) == 10
    for question, answer in answers:
        assert len(re.findall(r"\]\([\w./-]+\.md(?:#[\w-]+)?\)", answer)) == 1, question  # test_docs.py follows them
        assert len(answer.split()) < 60, question
    for front in ("README.md", "docs/README.md"):
        assert "questions.md)" in (REPOSITORY / front).read_text(encoding="utf-8")
