"""Links and files that the documentation names exist, and its Python parses."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

from messages import SNAPSHOT

REPOSITORY = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^)\s]+)\)")
TEST_FILE = re.compile(r"`(tests/[\w/]+\.py)`")
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def pages() -> list[Path]:
    places = (
        REPOSITORY.glob("*.md"),
        *(REPOSITORY.joinpath(name).rglob("*.md") for name in ("docs", "examples", "tests")),
    )
    return sorted(page for place in places for page in place)


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    found = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_relative_links_resolve(page: Path) -> None:
    assert broken_links(page) == []


def test_the_check_itself_sees_broken_links(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Two words\n[a](page.md) [b](#two-words) [c](https://x.y) [d](none.md) [e](page.md#three)")
    assert broken_links(page) == ["none.md", "page.md#three"]


def feature_rows() -> list[tuple[str, str]]:
    text = (REPOSITORY / "docs" / "feature_table.md").read_text(encoding="utf-8")
    table = text.partition("| feature | tested by |\n|---|---|\n")[2].partition("\n\n")[0]
    return [
        (feature.strip(), tested.strip()) for feature, tested in re.findall(r"^\|(.*)\|(.*)\|$", table, re.MULTILINE)
    ]


def test_every_feature_names_its_test_or_says_not_yet() -> None:
    rows = feature_rows()
    assert len(rows) > 10
    for feature, tested in rows:
        files = TEST_FILE.findall(tested)
        assert files or tested == "not yet", feature
        assert [file for file in files if not (REPOSITORY / file).is_file()] == [], feature


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_python_snippets_parse(page: Path) -> None:
    for snippet in PYTHON.findall(page.read_text(encoding="utf-8")):
        ast.parse(snippet)


def test_the_messages_of_the_troubleshooting_page_are_the_programs() -> None:
    text = (REPOSITORY / "docs" / "features" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
    messages = [span for cell in cells for span in re.findall(r"`([^`]* [^`]*)`", cell)]
    assert len(messages) > 20
    said = SNAPSHOT.read_text(encoding="utf-8")
    pieces = {piece.strip(" ;"): message for message in messages for piece in message.split("…")}
    assert {piece: message for piece, message in pieces.items() if piece not in said} == {}


def test_every_decision_is_in_their_list() -> None:
    folder = REPOSITORY / "docs" / "decisions"
    linked = LINK.findall((folder / "README.md").read_text(encoding="utf-8"))
    assert linked == sorted(page.name for page in folder.glob("0*.md"))
    assert len(linked) > 30


def test_modules_that_the_architecture_names_exist() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = REPOSITORY / "python" / "sgl_jax"
    named = set(re.findall(r"`([\w/]+/\w+\.py)`", text))
    assert len(named) > 60
    assert [
        name for name in sorted(named) if not (package / name).is_file() and not (REPOSITORY / name).is_file()
    ] == []


def test_every_metric_is_described() -> None:
    from sgl_jax.engine.messages import Stats
    from sgl_jax.observability.metrics import ApiState, RequestMetrics, exposition

    text = (REPOSITORY / "docs" / "features" / "metrics.md").read_text(encoding="utf-8")
    lines = (
        exposition(RequestMetrics(), Stats(accepted_per_position=[0]), {"version": "1"}, ApiState())[0]
        .decode()
        .splitlines()
    )
    names = {line.split()[2].removeprefix("sgl_jax_") for line in lines if line.startswith("# TYPE")}
    assert names
    assert [name for name in sorted(names) if f"`{name}`" not in text and f"`{name}{{" not in text] == []


@pytest.mark.parametrize("example", sorted((REPOSITORY / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_say_how_to_run_them(example: Path) -> None:
    docstring = ast.get_docstring(ast.parse(example.read_text(encoding="utf-8")))
    assert docstring is not None
    assert f"python examples/{example.name}" in docstring


def test_the_support_matrix_is_up_to_date() -> None:
    """Fails after a mark `supports` changes until `python docs/generate.py` has run."""
    matrix = runpy.run_path(str(REPOSITORY / "docs" / "generate.py"))["support_matrix"]()
    assert matrix == (REPOSITORY / "docs" / "support_matrix.md").read_text(encoding="utf-8")
    assert "| `LlamaForCausalLM` | ✓ |" in matrix


def test_the_page_for_users_of_other_servers_is_up_to_date() -> None:
    """Fails after settings/foreign_flags.py or settings/not_built.py changes until `python docs/generate.py` has run."""
    page = runpy.run_path(str(REPOSITORY / "docs" / "generate.py"))["coming_from"]()
    assert page == (REPOSITORY / "docs" / "features" / "coming_from.md").read_text(encoding="utf-8")
    assert "| `--max-num-seqs` | `--max-running-requests` |" in page


def test_the_table_of_sampling_parameters_is_up_to_date() -> None:
    """Fails after SamplingParams changes until `python docs/generate.py` has run."""
    page = runpy.run_path(str(REPOSITORY / "docs" / "generate.py"))["sampling"]()
    assert page == (REPOSITORY / "docs" / "features" / "sampling.md").read_text(encoding="utf-8")
    assert "| `min_p` | same | same | 0.0 |" in page


def test_the_model_family_that_is_shown_is_the_one_that_is_served() -> None:
    family = (REPOSITORY / "python" / "sgl_jax" / "models" / "qwen3.py").read_text(encoding="utf-8")
    page = (REPOSITORY / "docs" / "features" / "add_a_model.md").read_text(encoding="utf-8")
    assert family[family.index("ARCHITECTURES") :] in page
