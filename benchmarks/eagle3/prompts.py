"""Prompts of data sets, and which of them are held out: nothing is trained on these, and measurements take only them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HELD_OUT = 8  # one prompt of so many


def read_prompts(path: Path) -> list[str]:
    """Return the questions of a file in the format of ShareGPT, GSM8K, MT-Bench or BFCL, each once."""
    text = path.read_text()
    records = (
        json.loads(text) if text.startswith("[\n") or text.startswith("[{") else map(json.loads, text.splitlines())
    )
    return list(dict.fromkeys(question for record in records for question in _questions(record)))


def is_held_out(prompt: str) -> bool:
    """Say whether a prompt is kept for measurements. Its text decides, so it is so in every file that has the prompt."""
    return zlib.crc32(prompt.encode()) % HELD_OUT == 0


def _questions(record: dict[str, Any]) -> Iterator[str]:
    if "conversations" in record:
        yield from (turn["value"] for turn in record["conversations"] if turn["from"] == "human")
    elif "turns" in record:
        yield record["turns"][0]
    elif isinstance(record["question"], str):
        yield record["question"]
    else:
        yield from (message["content"] for turn in record["question"] for message in turn if message["role"] == "user")
