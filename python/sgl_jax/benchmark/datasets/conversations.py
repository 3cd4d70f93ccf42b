"""Prompts of files: conversations in ShareGPT's format, and JSON lines of one's own."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sgl_jax.benchmark.datasets.framing import Framing, Messages
from sgl_jax.benchmark.errors import BenchmarkError
from sgl_jax.benchmark.records import Prompt
from sgl_jax.text.tokenizer import Tokenizer, TokenizerError

# What published results with ShareGPT leave out, in tokens.
_SHORTEST = 4
_LONGEST_PROMPT, _LONGEST_TOTAL = 1024, 2048

_USERS = ("human", "user")
_LENGTHS = ("output_len", "output_tokens", "max_tokens", "max_completion_tokens", "max_new_tokens")
_FORMS = '"prompt", "messages" or "conversations"'


def sharegpt(args: argparse.Namespace, tokenizer: Tokenizer, rng: np.random.Generator) -> list[Prompt]:
    """The first question of each conversation, in a drawn order; the answer says how much to generate.

    Left out: under 4 tokens of either, and over 1024 of the prompt or 2048 together, or over --sharegpt-context-len
    together where that is given.
    """
    frame = Framing(tokenizer, args.apply_chat_template, args.prompt_suffix)
    conversations = _sharegpt_entries(Path(args.dataset_path))
    found: list[Prompt] = []
    for i in rng.permutation(len(conversations)):
        question, answer = conversations[i]
        text = frame(question)
        prompt_len = len(tokenizer.encode(text))
        output_len = args.sharegpt_output_len or len(tokenizer.encode(answer, add_special_tokens=False))
        if prompt_len < _SHORTEST or output_len < _SHORTEST:
            continue
        if _fits(args, prompt_len, output_len, _LONGEST_PROMPT, _LONGEST_TOTAL):
            found.append(Prompt(text, prompt_len, output_len))
        if len(found) == args.num_prompts:
            break
    return found


def _fits(args: argparse.Namespace, prompt_len: int, output_len: int, prompt: float, total: float) -> bool:
    if args.sharegpt_context_len is not None:
        return prompt_len + output_len <= args.sharegpt_context_len
    return prompt_len <= prompt and prompt_len + output_len <= total


def _sharegpt_entries(path: Path) -> list[tuple[str, str]]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise BenchmarkError(f"{path} is not JSON: {error}; JSON lines are --dataset-name custom") from error
    if not isinstance(content, list):
        raise BenchmarkError(f"{path} holds no list of conversations")
    found = []
    for i, entry in enumerate(content):
        try:
            exchange = _first_exchange(entry.get("conversations", entry.get("conversation")))
        except (TypeError, KeyError, AttributeError, ValueError):
            raise BenchmarkError(
                f'{path}: entry {i} is not {{"conversations": [{{"from": …, "value": …}}, …]}}'
            ) from None
        if exchange is not None:
            found.append(exchange)
    return found


def _first_exchange(turns: Any) -> tuple[str, str] | None:
    """The first question and its answer; None for a conversation without."""
    said = [(turn.get("from", turn.get("role", "")), turn.get("value", turn.get("content"))) for turn in turns]
    if any(not isinstance(text, str) for _, text in said):
        raise ValueError
    for (who, question), (other, answer) in itertools.pairwise(said):
        if who in _USERS and other not in _USERS:
            return question, answer
    return None


@dataclass
class _Line:
    """A line of a custom file, as it was written."""

    prompt: str | list[int] = ""
    messages: Messages | None = None  # in place of the prompt
    answer: str | None = None
    output_len: int | None = None


def custom(args: argparse.Namespace, tokenizer: Tokenizer) -> list[Prompt]:
    """The file's lines in their order. How much is generated: --sharegpt-output-len, else the line's own
    number, else its answer's length. Left out: what is over --sharegpt-context-len."""
    frame = Framing(tokenizer, args.apply_chat_template, args.prompt_suffix)
    found: list[Prompt] = []
    for place, line in _custom_lines(Path(args.dataset_path)):
        try:
            prompt, prompt_len = _framed(line, tokenizer, frame)
            output_len = args.sharegpt_output_len or line.output_len
            if output_len is None and line.answer is not None:
                output_len = len(tokenizer.encode(line.answer, add_special_tokens=False))
        except (BenchmarkError, TokenizerError) as error:
            raise BenchmarkError(f"{place}: {error}") from error
        if not output_len:
            raise BenchmarkError(
                f'{place}: neither an "output_len" nor an answer says how much to generate; give --sharegpt-output-len'
            )
        if _fits(args, prompt_len, output_len, float("inf"), float("inf")):
            found.append(Prompt(prompt, prompt_len, output_len))
        if len(found) == args.num_prompts:
            break
    return found


def _framed(line: _Line, tokenizer: Tokenizer, frame: Framing) -> tuple[str | list[int] | Messages, int]:
    """The prompt to send, and its tokens: those of messages as the model's template writes them."""
    if line.messages is None:
        prompt = frame(line.prompt) if isinstance(line.prompt, str) else line.prompt
        return prompt, len(tokenizer.encode(prompt)) if isinstance(prompt, str) else len(prompt)
    sent = frame.conversation(line.messages)
    return sent, len(tokenizer.encode(sent if isinstance(sent, str) else frame.render(sent)))


def _custom_lines(path: Path) -> Iterator[tuple[str, _Line]]:
    """Each line that is not empty, with its place for messages."""
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            place = f"{path} line {number}"
            try:
                entry = json.loads(text)
            except ValueError as error:
                raise BenchmarkError(f"{place} is not JSON: {error}") from error
            try:
                yield place, _read_line(entry)
            except (TypeError, KeyError, AttributeError, ValueError) as error:
                said = str(error) if type(error) is ValueError else f"it needs {_FORMS}"
                raise BenchmarkError(f"{place}: {said}") from error


def _read_line(entry: dict[str, Any]) -> _Line:
    """Raises ValueError with what is wrong."""
    entry = entry.get("body", entry)  # a line of OpenAI's batch format
    output_len = next((entry[name] for name in _LENGTHS if entry.get(name) is not None), None)
    if output_len is not None and (type(output_len) is not int or output_len < 1):
        raise ValueError(f"the output length is {output_len}; it must be a whole number above 0")
    if "messages" in entry:
        messages = [{"role": str(each["role"]), "content": _content(each["content"])} for each in entry["messages"]]
        answer = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else None
        if not messages:
            raise ValueError('"messages" has no message to answer')
        return _Line(messages=messages, answer=answer, output_len=output_len)
    if "conversations" in entry:
        exchange = _first_exchange(entry["conversations"])
        if exchange is None:
            raise ValueError('"conversations" has no question with an answer')
        return _Line(exchange[0], answer=exchange[1], output_len=output_len)
    prompt = entry["prompt"]
    if isinstance(prompt, list):
        if not prompt or any(type(token) is not int for token in prompt):
            raise ValueError('"prompt" must be a text or a list of token ids')
    elif not isinstance(prompt, str) or not prompt:
        raise ValueError('"prompt" must be a text or a list of token ids')
    return _Line(prompt, output_len=output_len)


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    if any(part["type"] != "text" for part in content):
        raise ValueError("a message has content that is not text")
    return "".join(part["text"] for part in content)
