"""Arrival times and lengths of real traffic; its prompts are token ids, made up so that they share what the trace shares.

Mooncake's traces (FAST'25): JSON lines of timestamp (ms), input_length, output_length and hash_ids, one for each block of
512 tokens; equal ids stand for equal blocks.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sgl_jax.benchmark.datasets.source import IdSource
from sgl_jax.benchmark.errors import BenchmarkError
from sgl_jax.benchmark.records import Prompt
from sgl_jax.text.tokenizer import Tokenizer

BLOCK = 512  # tokens one hash id stands for
WORKLOADS = {
    "mooncake": "mooncake_trace.jsonl",
    "conversation": "conversation_trace.jsonl",
    "toolagent": "toolagent_trace.jsonl",
    "synthetic": "synthetic_trace.jsonl",
}


@dataclass(frozen=True)
class _Call:
    seconds: float
    input_len: int
    output_len: int
    hash_ids: list[int]


def mooncake(
    args: argparse.Namespace, tokenizer: Tokenizer | None, vocab_size: int | None, rng: np.random.Generator
) -> list[Prompt]:
    path = Path(args.dataset_path)
    if path.is_dir():
        path /= WORKLOADS[args.mooncake_workload]
    with path.open(encoding="utf-8", newline="") as file:
        return _prompts(_mooncake_calls(path, file), args, IdSource(vocab_size, tokenizer, rng), rng)


def _prompts(
    calls: Iterable[_Call], args: argparse.Namespace, source: IdSource, rng: np.random.Generator
) -> list[Prompt]:
    """The first --num-prompts of them in order of arrival; the first arrives at 0."""
    chosen = sorted(itertools.islice(calls, args.num_prompts), key=lambda call: call.seconds)
    blocks_key = int(rng.integers(2**63))

    def ids(call: _Call) -> list[int]:
        blocks = (source.ids(BLOCK, np.random.default_rng((blocks_key, hash_id))) for hash_id in call.hash_ids)
        return list(itertools.islice(itertools.chain.from_iterable(blocks), call.input_len))

    first = chosen[0].seconds if chosen else 0.0
    return [
        Prompt(ids(call), call.input_len, call.output_len, (call.seconds - first) * args.trace_slowdown_factor)
        for call in chosen
    ]


def _mooncake_calls(path: Path, lines: Iterable[str]) -> Iterator[_Call]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            call = _Call(
                float(entry["timestamp"]) / 1000,
                int(entry["input_length"]),
                int(entry["output_length"]),
                [int(hash_id) for hash_id in entry["hash_ids"]],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(
                f"{path} line {number} is not a line of a Mooncake trace (timestamp, input_length, output_length, hash_ids)"
            ) from error
        if call.input_len < 1 or call.output_len < 1:
            raise BenchmarkError(
                f"{path} line {number}: {call.input_len} tokens in and {call.output_len} out; each must be at least 1"
            )
        if len(call.hash_ids) != -(-call.input_len // BLOCK):
            raise BenchmarkError(
                f"{path} line {number}: {call.input_len} tokens in blocks of {BLOCK}, but {len(call.hash_ids)} hash_ids"
            )
        yield call
