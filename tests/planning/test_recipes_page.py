"""The tables of models and chips in the documentation, and its recipes, are those that the planner computes."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sgl_jax.planning.fit import Misfit, make_plan
from sgl_jax.planning.model import find_model
from sgl_jax.planning.target import find_target
from sgl_jax.settings.server_args import ServerArgs

REPOSITORY = Path(__file__).resolve().parents[2]


def table(page: str) -> dict[str, dict[str, str]]:
    """Cells by model and chips."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    header, _, *rows = re.search(r"^\| model \| v.*?\n\n", text, re.MULTILINE | re.DOTALL)[0].strip().splitlines()
    names, *cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in (header, *rows))
    return {row[0]: dict(zip(names[1:], row[1:], strict=True)) for row in cells}


RECIPES, README = table("docs/recipes.md"), table("README.md")


def kv_tokens(model: str, chips: str) -> str:
    try:
        args = ServerArgs(model_path=f"config:{model}")
        plan = make_plan(args, find_model(args), find_target(chips), 1024)
    except Misfit:
        return "–"
    return f"{plan.launch.kv_tokens:,}"


@pytest.mark.parametrize("model", RECIPES)
def test_the_smallest_chips_that_hold_a_model_and_the_next_smaller_ones(model: str) -> None:
    """The tables have a hundred cells; the edge between a dash and a number is where a change shows first."""
    cells = list(RECIPES[model].items())
    first = next(i for i, (_, cell) in enumerate(cells) if cell != "–")
    for chips, cell in cells[max(0, first - 1) : first + 1]:
        assert kv_tokens(model, chips) == cell, chips


def test_what_cannot_be_divided_is_said() -> None:
    with pytest.raises(ValueError, match="40 attention heads"):
        kv_tokens("Qwen3-14B", "v7x-8")
    assert RECIPES["Qwen3-14B"]["v7x-8"] == "40 heads"


def test_the_table_on_the_front_page_is_a_part_of_it() -> None:
    assert {model: {chips: RECIPES[model][chips] for chips in cells} for model, cells in README.items()} == README


@pytest.fixture(scope="module")
def recipe_pages() -> ModuleType:
    """The module that writes the pages of recipes."""
    sys.path.append(str(REPOSITORY / "docs"))
    try:
        return importlib.import_module("recipe_pages")
    finally:
        sys.path.remove(str(REPOSITORY / "docs"))


@pytest.mark.parametrize("model", ["Qwen3-8B", "Qwen3-30B-A3B"])
def test_pages_of_recipes_are_what_the_planner_says(model: str, recipe_pages: ModuleType) -> None:
    """Fails after the planner or the recipes change until `python docs/generate.py` has run."""
    page = recipe_pages.FOLDER / recipe_pages.file_name(model)
    assert page.read_text(encoding="utf-8") == recipe_pages.recipe_page(model)


def test_every_recipe_has_a_page_which_agrees_with_the_table(recipe_pages: ModuleType) -> None:
    pages = {page.name: page.read_text(encoding="utf-8") for page in recipe_pages.FOLDER.glob("*.md")}
    assert pages.keys() == {recipe_pages.file_name(model) for model in recipe_pages.RECIPES}
    for model, (_, launches) in recipe_pages.RECIPES.items():
        page = pages[recipe_pages.file_name(model)]
        assert "**All figures on this page are predicted.**" in page
        for launch, section in zip(launches, page.split("\n## ")[1:], strict=True):
            assert section.startswith(f"{launch.chips}\n")
            # The table has one data rank.
            assert "--dp-size" in launch.flags or f": {RECIPES[model][launch.chips]} tokens in all" in section, model
