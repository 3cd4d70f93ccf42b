"""Prompts of wanted lengths: text cut from a source, drawn token ids, groups that share a system prompt, and traces.

Mooncake's traces (FAST'25) are JSON lines of timestamp (ms), input_length, output_length and hash_ids, one for each block
of 512 tokens. Their prompts are made up: equal ids stand for equal blocks, so they share what the trace shares.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from sgl_jax.tools.benchmark.datasets.source import Framing, IdSource, TextSource, lines_of
from sgl_jax.tools.benchmark.protocols import Prompt
from sgl_jax.tools.benchmark.terminal import BenchmarkError

_BETWEEN = "\n\n"  # system prompt and question
_BLOCK = 512  # tokens one hash id stands for


def random_texts(args: argparse.Namespace, frame: Framing, rng: np.random.Generator) -> Iterator[Prompt]:
    """Yield prompts of drawn lengths."""
    source = TextSource(frame.tokenizer, rng, args.dataset_path)
    overhead = source.count(frame(""))
    for n, out in _drawn_lengths(args, rng, args.num_prompts or 1000, shortest=overhead + 1):
        yield Prompt(source.piece(n, frame, overhead), n, out)


def random_ids(args: argparse.Namespace, source: IdSource, rng: np.random.Generator, most: int) -> list[Prompt]:
    return [Prompt(source.ids(n), n, out) for n, out in _drawn_lengths(args, rng, most, shortest=1)]


def _drawn_lengths(
    args: argparse.Namespace, rng: np.random.Generator, count: int, shortest: int
) -> list[tuple[int, int]]:
    """Draw (input, output) lengths, each drawn evenly from [ratio x most, most]."""

    def draw(most: int, least: int) -> list[int]:
        low = min(max(int(most * args.random_range_ratio), least), most)
        return rng.integers(low, most + 1, count).tolist()

    return list(zip(draw(args.random_input_len, shortest), draw(args.random_output_len, 1), strict=True))


def shared_prefixes(args: argparse.Namespace, frame: Framing, rng: np.random.Generator) -> list[Prompt]:
    """Make groups of prompts in a drawn order; those of a group begin with the same --gsp-system-prompt-len tokens.

    A prompt has exactly --gsp-system-prompt-len plus --gsp-question-len tokens, BOS and frame included.
    """
    source = TextSource(frame.tokenizer, rng)
    num_tokens = args.gsp_system_prompt_len + args.gsp_question_len
    prompts = []
    for _ in range(args.gsp_num_groups):
        system = source.piece(args.gsp_system_prompt_len) + _BETWEEN

        def with_system(question: str, system: str = system) -> str:
            return frame(system + question)

        overhead = source.count(with_system(""))
        for _ in range(args.gsp_prompts_per_group):
            text = source.piece(num_tokens, with_system, overhead)
            prompts.append(Prompt(text, num_tokens, args.gsp_output_len))
    return [prompts[i] for i in rng.permutation(len(prompts))]


class _Call(msgspec.Struct):
    """A line of a trace, as it is written."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def mooncake(args: argparse.Namespace, source: IdSource, rng: np.random.Generator, most: int) -> list[Prompt]:
    """Make prompts of the first lines of the file in order of arrival; the first arrives at 0."""
    path = Path(args.dataset_path)
    if path.is_dir():
        path /= f"{args.mooncake_workload}_trace.jsonl"
    calls = sorted(itertools.islice(_calls(path), most), key=lambda call: call.timestamp)
    blocks_key = int(rng.integers(2**63))
    prompts = []
    for call in calls:
        blocks = (source.ids(_BLOCK, np.random.default_rng((blocks_key, hash_id))) for hash_id in call.hash_ids)
        ids = list(itertools.islice(itertools.chain.from_iterable(blocks), call.input_length))
        arrival_s = (call.timestamp - calls[0].timestamp) / 1000 * args.trace_slowdown_factor
        prompts.append(Prompt(ids, call.input_length, call.output_length, arrival_s))
    return prompts


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
        if len(call.hash_ids) != -(-n // _BLOCK):
            raise BenchmarkError(f"{place}: {n} tokens in blocks of {_BLOCK}, but {len(call.hash_ids)} hash_ids")
        yield call
