"""Results as a markdown table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Column(NamedTuple):
    title: str
    field: str  # of the record
    form: str = "{}"  # as str.format takes it
    scale: float = 1  # of the unit in the title to the field's


def markdown_table(columns: Sequence[Column], records: Sequence[Mapping[str, Any]]) -> str:
    """A row per record. A field that is missing or None is a dash; a column of dashes is left out."""
    columns = [column for column in columns if any(record.get(column.field) is not None for record in records)]
    lines = [_row(column.title for column in columns), "|" + "---:|" * len(columns)]
    lines += [_row(_cell(record.get(column.field), column) for column in columns) for record in records]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any, column: Column) -> str:
    if value is None:
        return "–"
    return column.form.format(value if column.scale == 1 else value * column.scale)
