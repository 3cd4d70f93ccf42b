"""Tests of the seams between rooms: a name that one room imports from another has no `Any`, and imports form no circle.

A room is a folder of the package, or a file at its top. Inside a room `Any` is for values without a better type: trees of
arrays whose leaves are also specs and axes, JSON as it was read, and values that jax and other libraries leave open.
"""

from __future__ import annotations

import ast
import graphlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from test_imports import PACKAGE, modules

# Upper limits of the uses of `Any` inside each room. Lower them when you can; raise them only with a reason.
INSIDE = {
    "tools": 77,  # JSON of reports, and of servers that are measured
    "ops": 31,  # Pallas refs and traced scalars inside kernels
    "models": 29,  # config.json as it was read
    "text": 27,  # protobuf fields and tokenizer files as they were read
    "server": 28,  # pydantic's and FastAPI's open types
    "engine": 13,
    "settings": 9,
    "planning": 6,
    "runtime": 4,
    "__init__": 1,
    "observability": 1,
    "parallel": 1,
}


def used_elsewhere(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Return the names that other rooms import from each module; "*" if they import the module itself."""
    used: dict[str, set[str]] = defaultdict(set)
    for name, tree in trees.items():
        for source, imported in imported_names(tree, trees):
            if source.split(".")[0] != name.split(".")[0]:
                used[source].add(imported)
    return used


def imported_names(tree: ast.Module, trees: dict[str, ast.Module]) -> Iterator[tuple[str, str]]:
    """Yield (module, name) for each import from the package; the name is "*" for a whole module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sgl_jax":
            module = (node.module or "").removeprefix("sgl_jax").removeprefix(".")
            for alias in node.names:
                whole = f"{module}.{alias.name}".removeprefix(".")
                yield (whole, "*") if whole in trees else (module, alias.name)


def says_any(annotation: ast.expr | None) -> bool:
    return annotation is not None and any(is_any(node) for node in ast.walk(annotation))


def is_any(node: ast.AST) -> bool:
    return (isinstance(node, ast.Name) and node.id == "Any") or (isinstance(node, ast.Attribute) and node.attr == "Any")


def untyped(function: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[str]:
    """Yield the parameters, and the result, whose annotations contain `Any`."""
    a = function.args
    for each in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg):
        if each is not None and says_any(each.annotation):
            yield f"{name}({each.arg})"
    if says_any(function.returns):
        yield f"{name} ->"


def untyped_in_class(node: ast.ClassDef, name: str) -> Iterator[str]:
    for each in node.body:
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
            if not each.name.startswith("_") or each.name in ("__init__", "__call__"):
                yield from untyped(each, f"{name}.{each.name}")
        elif isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and says_any(each.annotation):
            yield f"{name}.{each.target.id}"


def open_seams(package: Path) -> set[str]:
    trees = dict(modules(package))
    found: set[str] = set()
    for module, names in used_elsewhere(trees).items():
        for node in trees[module].body if module in trees else ():
            name = name_of(node)
            if name is None or (name not in names and not ("*" in names and not name.startswith("_"))):
                continue
            where = f"{module}.{name}"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.update(untyped(node, where))
            elif isinstance(node, ast.ClassDef):
                found.update(untyped_in_class(node, where))
            elif (isinstance(node, ast.TypeAlias | ast.Assign) and says_any(node.value)) or (
                isinstance(node, ast.AnnAssign) and says_any(node.annotation)
            ):
                found.add(where)
    return found


def name_of(node: ast.stmt) -> str | None:
    """Return the name that a statement of a module defines; None for kinds of statements that define none."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return node.name
        case ast.TypeAlias(name=ast.Name(id=name)):
            return name
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return name
    return None


def test_no_room_shows_any_to_another() -> None:
    assert open_seams(PACKAGE) == set()


def test_rooms_say_any_inside_no_more_often_than_is_listed() -> None:
    counts: dict[str, int] = defaultdict(int)
    for name, tree in modules(PACKAGE):
        room = name.split(".")[0]
        counts[room] += sum(is_any(node) for node in ast.walk(tree))
    assert {room: n for room, n in counts.items() if n > INSIDE.get(room, 0)} == {}


def test_imports_form_no_circle() -> None:
    trees = dict(modules(PACKAGE))
    graph = {
        name: {source for source, _ in imported_names(tree, trees) if source in trees and source != name}
        for name, tree in trees.items()
    }
    assert [*graphlib.TopologicalSorter(graph).static_order()]  # raises CycleError, which names the circle


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(x: Any): ...", {"b.a.f(x)"}),
        ("def f() -> dict[str, Any]: ...", {"b.a.f ->"}),
        ("class f:\n    x: Any\n    y: int", {"b.a.f.x"}),
        ("class f:\n    def g(self, *x: Any): ...\n    def _h(self, x: Any): ...", {"b.a.f.g(x)"}),
        ("type f = list[Any]", {"b.a.f"}),
        ("f = dict[str, Any]", {"b.a.f"}),
        ("f: Any = 3", {"b.a.f"}),
        ("def f(x: typing.Any): ...", {"b.a.f(x)"}),
        ("def g(x: Any): ...", set()),
    ],
)
def test_the_check_itself_sees_each_kind(tmp_path: Path, source: str, found: set[str]) -> None:
    for name, text in (("b/a.py", source), ("b/c.py", ""), ("d.py", "from sgl_jax.b.a import f")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert open_seams(tmp_path) == found
