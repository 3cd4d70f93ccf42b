"""Prompts of files: conversations in ShareGPT's format, and JSON lines of one's own."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sgl_jax.text.tokenizer import TokenizerError
from sgl_jax.tools.benchmark.datasets.source import Framing, Messages, lines_of
from sgl_jax.tools.benchmark.protocols import Prompt
from sgl_jax.tools.benchmark.terminal import BenchmarkError

# Limits of published results with ShareGPT, in tokens: conversations beyond them are left out.
_SHORTEST = 4
_LONGEST_PROMPT, _LONGEST_TOTAL = 1024, 2048

_USERS = ("human", "user")
_LENGTHS = ("output_len", "output_tokens", "max_tokens", "max_completion_tokens", "max_new_tokens")
_MISREAD = (TypeError, KeyError, AttributeError, ValueError)  # JSON of another form


def sharegpt(args: argparse.Namespace, frame: Framing, rng: np.random.Generator) -> Iterator[Prompt]:
    """Yield the first question of each conversation, in a drawn order; the answer says how much to generate.

    Left out: under 4 tokens of either, and over 1024 of the prompt or 2048 together, or over --sharegpt-context-len
    together where that is given.
    """
    exchanges = _sharegpt_exchanges(Path(args.dataset_path))
    longest = args.sharegpt_context_len or _LONGEST_TOTAL
    longest_prompt = args.sharegpt_context_len or _LONGEST_PROMPT
    for i in rng.permutation(len(exchanges)):
        question, answer = exchanges[i]
        text = frame(question)
        prompt_len, output_len = len(frame.ids(text)), args.sharegpt_output_len or frame.count_answer(answer)
        fits = prompt_len <= longest_prompt and prompt_len + output_len <= longest
        if fits and min(prompt_len, output_len) >= _SHORTEST:
            yield Prompt(text, prompt_len, output_len)


def _sharegpt_exchanges(path: Path) -> list[tuple[str, str]]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise BenchmarkError(f"{path} is not JSON: {error}; JSON lines are --dataset-name custom") from error
    if not isinstance(content, list):
        raise BenchmarkError(f"{path} holds no list of conversations")
    found = []
    for i, entry in enumerate(content):
        try:
            found.append(_first_exchange(entry.get("conversations", entry.get("conversation"))))
        except _MISREAD:
            form = '{"conversations": [{"from": …, "value": …}, …]}'
            raise BenchmarkError(f"{path}: entry {i} is not {form}") from None
    return [exchange for exchange in found if exchange is not None]


def _first_exchange(turns: Any) -> tuple[str, str] | None:
    """Return the first question and its answer; None for a conversation without."""
    said = [(turn.get("from", turn.get("role", "")), turn.get("value", turn.get("content"))) for turn in turns]
    if any(not isinstance(text, str) for _, text in said):
        raise ValueError
    for (who, question), (other, answer) in itertools.pairwise(said):
        if who in _USERS and other not in _USERS:
            return question, answer
    return None


def custom(args: argparse.Namespace, frame: Framing, rng: np.random.Generator) -> Iterator[Prompt]:
    """Yield the file's lines in their order; nothing is drawn. The output length is --sharegpt-output-len, else the line's own
    number, else its answer's length. Left out: what is over --sharegpt-context-len."""
    for place, line in lines_of(args.dataset_path):
        try:
            prompt, answer, output_len = _read_line(json.loads(line))
            if isinstance(prompt, str):
                prompt = frame(prompt)
            elif isinstance(prompt[0], dict):
                prompt = frame.conversation(prompt)
            prompt_len = len(frame.ids(prompt))
        except json.JSONDecodeError as error:
            raise BenchmarkError(f"{place} is not JSON: {error}") from error
        except (BenchmarkError, TokenizerError) as error:
            raise BenchmarkError(f"{place}: {error}") from error
        except _MISREAD as error:
            said = str(error) if type(error) is ValueError else 'it needs "prompt", "messages" or "conversations"'
            raise BenchmarkError(f"{place}: {said}") from error
        output_len = args.sharegpt_output_len or output_len or frame.count_answer(answer)
        if not output_len:
            raise BenchmarkError(
                f'{place}: neither an "output_len" nor an answer says how much to generate; give --sharegpt-output-len'
            )
        if args.sharegpt_context_len is None or prompt_len + output_len <= args.sharegpt_context_len:
            yield Prompt(prompt, prompt_len, output_len)


def _read_line(entry: dict[str, Any]) -> tuple[str | list[int] | Messages, str, int | None]:
    """Return the prompt, its answer, and the output length that the line gives; the answer is "" where there is none. Raises ValueError."""
    entry = entry.get("body", entry)  # a line of OpenAI's batch format
    output_len = next((entry[name] for name in _LENGTHS if entry.get(name) is not None), None)
    if output_len is not None and (type(output_len) is not int or output_len < 1):
        raise ValueError(f"the output length is {output_len}; it must be a whole number above 0")
    if "messages" in entry:
        messages = [{"role": str(each["role"]), "content": _content(each["content"])} for each in entry["messages"]]
        answer = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else ""
        if not messages:
            raise ValueError('"messages" has no message to answer')
        return messages, answer, output_len
    if "conversations" in entry:
        exchange = _first_exchange(entry["conversations"])
        if exchange is None:
            raise ValueError('"conversations" has no question with an answer')
        return *exchange, output_len
    prompt = entry["prompt"]
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not prompt or not (is_ids or isinstance(prompt, str)):
        raise ValueError('"prompt" must be a text or a list of token ids')
    return prompt, "", output_len


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    if any(part["type"] != "text" for part in content):
        raise ValueError("a message has content that is not text")
    return "".join(part["text"] for part in content)
