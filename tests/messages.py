"""Messages a user can meet, read from the source of the package, and what tests pin of one.

`make messages` writes them to data/messages.txt, one in a line: module, kind, text, with an f-string's fields as
{expression}. The kind is the exception raised, the level logged at, or else the call, table or function the text is in.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "python" / "sgl_jax"
SNAPSHOT = Path(__file__).parent / "data" / "messages.txt"

UNSEEN = {"debug", "cast", "einsum", "split", "TypeVar", "NewType", "compile"}  # calls whose texts no user sees
LEVELS = {"info", "warning", "error", "exception"}
ARRAYS = {"Array", "Bool", "Float", "Float32", "Int", "Int32", "Num", "Shaped", "UInt8", "UInt32"}  # jaxtyping


def says(text: str, pinned: str) -> bool:
    """Tell whether the pieces of `pinned`, which `…` separates, stand in `text` in their order.

    A test pins what matters of a message so: the parameter, its value, and the limit or the alternative. The sentence
    around them may change. A piece is not found within a longer word, flag or number.
    """
    pieces = re.split(" ?… ?", pinned)
    return re.search(".*?".join(map(_whole, pieces)), text, re.DOTALL) is not None


def _whole(piece: str) -> str:
    """A pattern for `piece` where no word, flag or number goes on before or behind it."""
    begins = r"(?<![\w-])(?<!\d\.)" if re.match(r"[\w-]", piece) else ""
    ends = r"(?![\w-]|\.\d)" if re.search(r"\w$", piece) else ""
    return begins + re.escape(piece) + ends


def text_of(node: ast.AST) -> str | None:
    """The text an expression makes, other values as {expression}; None if no part of it is a text."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(text_of(part) or "" for part in parts)
        case ast.FormattedValue(value, conversion, spec):
            ending = f"!{chr(conversion)}" if conversion > 0 else ""
            return "{" + ast.unparse(value) + ending + (f":{text_of(spec)}" if spec else "") + "}"
        case ast.BinOp(left, ast.Add(), right):
            parts = [text_of(left), text_of(right)]
            if parts == [None, None]:
                return None
            sides = zip((left, right), parts, strict=True)
            return "".join("{" + ast.unparse(side) + "}" if part is None else part for side, part in sides)
    return None


def name_of(node: ast.AST) -> str:
    """The last word of a dotted name."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def has_words(text: str) -> bool:
    return len(re.findall(r"[^\W\d_]{2,}", text)) > 1 and " " in text


def texts(node: ast.AST, kind: str) -> Iterator[tuple[str, str]]:
    """Each text in a node with its kind; docstrings, annotations of arrays and single words are left out."""
    text = text_of(node)
    if text is not None:
        yield kind, text
        return
    match node:
        case ast.Expr(value=ast.Constant()):  # a docstring, or another text that stands for itself
            return
        case ast.Subscript(value=value) if name_of(value) in ARRAYS:
            return
        case ast.Raise(exc=ast.Call(func=error)):
            kind = "raise " + name_of(error)
        case ast.Call(func=called):
            name = name_of(called)
            if name in UNSEEN:
                return
            if not kind.startswith("raise") and (name in LEVELS or name[:1].isupper()):
                kind = name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            kind = name
        case ast.Assign(targets=[target]) | ast.AnnAssign(target=target):
            kind = name_of(target) or kind
    for child in ast.iter_child_nodes(node):
        yield from texts(child, kind)


def messages() -> list[str]:
    """Every message of the package, sorted."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        module = str(file.relative_to(PACKAGE))
        for kind, text in texts(ast.parse(file.read_text(encoding="utf-8")), "module"):
            if has_words(text):
                found.add(f"{module}: {kind.removeprefix('raise ')}: {text.encode('unicode_escape').decode()}")
    return sorted(found)


if __name__ == "__main__":
    SNAPSHOT.write_text("".join(f"{message}\n" for message in messages()), encoding="utf-8")
