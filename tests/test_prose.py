"""Docstrings begin with a verb or with the noun they define, so that their first words say what a thing is."""

from __future__ import annotations

import ast

import pytest

from test_imports import PACKAGE, modules

RIDDLES = {"What", "That", "Of", "Those"}  # first words that make a reader wait for the noun


def openings(tree: ast.Module) -> list[str]:
    """The first word of each docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return [text.split()[0].rstrip(",.:;") for text in docstrings if text]


def test_no_docstring_begins_with_a_relative_clause() -> None:
    found = {name: sorted(RIDDLES.intersection(openings(tree))) for name, tree in modules(PACKAGE)}
    assert {name: words for name, words in found.items() if words} == {}


@pytest.mark.parametrize(
    "source", ['"""What it is."""', 'def f():\n    """Of a row."""', 'class A:\n    """Those: x."""']
)
def test_the_check_itself_sees_them(source: str) -> None:
    assert RIDDLES.intersection(openings(ast.parse(source)))
