"""Prompts of wanted lengths that are read from nowhere."""

from __future__ import annotations

import argparse

import numpy as np

from sgl_jax.benchmark.datasets.source import IdSource, TextSource
from sgl_jax.benchmark.records import Prompt
from sgl_jax.text.tokenizer import Tokenizer

NUM_PROMPTS = 1000


def random_texts(args: argparse.Namespace, tokenizer: Tokenizer, rng: np.random.Generator) -> list[Prompt]:
    source = TextSource(tokenizer, rng)
    lengths = _drawn_lengths(args, rng, shortest=source.count("") + 1)
    return [Prompt(source.piece(n), n, out) for n, out in lengths]


def random_ids(
    args: argparse.Namespace, tokenizer: Tokenizer | None, vocab_size: int | None, rng: np.random.Generator
) -> list[Prompt]:
    source = IdSource(vocab_size, tokenizer, rng)
    return [Prompt(source.ids(n), n, out) for n, out in _drawn_lengths(args, rng, shortest=1)]


def _drawn_lengths(args: argparse.Namespace, rng: np.random.Generator, shortest: int) -> list[tuple[int, int]]:
    """(input, output) lengths, each drawn evenly from [ratio x most, most]."""

    def draw(most: int, least: int) -> list[int]:
        low = min(max(int(most * args.random_range_ratio), least), most)
        return rng.integers(low, most + 1, args.num_prompts or NUM_PROMPTS).tolist()

    return list(zip(draw(args.random_input_len, shortest), draw(args.random_output_len, 1), strict=True))
