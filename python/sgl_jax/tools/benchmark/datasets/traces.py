"""Arrival times and lengths of real traffic; its prompts are token ids, made up so that they share what the trace shares.

Mooncake's traces (FAST'25): JSON lines of timestamp (ms), input_length, output_length and hash_ids, one for each block of
512 tokens; equal ids stand for equal blocks.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from sgl_jax.text.tokenizer import Tokenizer
from sgl_jax.tools.benchmark.datasets.source import IdSource, lines_of
from sgl_jax.tools.benchmark.records import Prompt
from sgl_jax.tools.benchmark.terminal import BenchmarkError

BLOCK = 512  # tokens one hash id stands for


class _Call(msgspec.Struct):
    """A line of a trace, as it is written."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def mooncake(
    args: argparse.Namespace, tokenizer: Tokenizer | None, vocab_size: int | None, rng: np.random.Generator
) -> list[Prompt]:
    """The first --num-prompts of the file in order of arrival; the first arrives at 0."""
    path = Path(args.dataset_path)
    if path.is_dir():
        path /= f"{args.mooncake_workload}_trace.jsonl"
    calls = sorted(itertools.islice(_calls(path), args.num_prompts), key=lambda call: call.timestamp)
    source = IdSource(vocab_size, tokenizer, rng)
    blocks_key = int(rng.integers(2**63))

    def ids(call: _Call) -> list[int]:
        blocks = (source.ids(BLOCK, np.random.default_rng((blocks_key, hash_id))) for hash_id in call.hash_ids)
        return list(itertools.islice(itertools.chain.from_iterable(blocks), call.input_length))

    def arrival_s(call: _Call) -> float:
        return (call.timestamp - calls[0].timestamp) / 1000 * args.trace_slowdown_factor

    return [Prompt(ids(call), call.input_length, call.output_length, arrival_s(call)) for call in calls]


def _calls(path: Path) -> Iterator[_Call]:
    for place, line in lines_of(path):
        try:
            call = msgspec.json.decode(line, type=_Call, strict=False)
        except msgspec.DecodeError as error:
            fields = ", ".join(_Call.__struct_fields__)
            raise BenchmarkError(f"{place} is not a line of a Mooncake trace ({fields}): {error}") from error
        n, out = call.input_length, call.output_length
        if n < 1 or out < 1:
            raise BenchmarkError(f"{place}: {n} tokens in and {out} out; each must be at least 1")
        if len(call.hash_ids) != -(-n // BLOCK):
            raise BenchmarkError(f"{place}: {n} tokens in blocks of {BLOCK}, but {len(call.hash_ids)} hash_ids")
        yield call
