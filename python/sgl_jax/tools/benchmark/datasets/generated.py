"""Prompts of wanted lengths: text cut from a source, drawn token ids, and groups that share a system prompt."""

from __future__ import annotations

import argparse

import numpy as np

from sgl_jax.text.tokenizer import Tokenizer
from sgl_jax.tools.benchmark.datasets.source import Framing, IdSource, TextSource
from sgl_jax.tools.benchmark.records import Prompt

_BETWEEN = "\n\n"  # system prompt and question


def random_texts(args: argparse.Namespace, tokenizer: Tokenizer, rng: np.random.Generator) -> list[Prompt]:
    frame = Framing(tokenizer, args.apply_chat_template, args.prompt_suffix)
    source = TextSource(tokenizer, rng, args.dataset_path)
    overhead = source.count(frame(""))
    lengths = _drawn_lengths(args, rng, shortest=overhead + 1)
    return [Prompt(source.piece(n, frame, overhead), n, out) for n, out in lengths]


def random_ids(
    args: argparse.Namespace, tokenizer: Tokenizer | None, vocab_size: int | None, rng: np.random.Generator
) -> list[Prompt]:
    source = IdSource(vocab_size, tokenizer, rng)
    return [Prompt(source.ids(n), n, out) for n, out in _drawn_lengths(args, rng, shortest=1)]


def _drawn_lengths(args: argparse.Namespace, rng: np.random.Generator, shortest: int) -> list[tuple[int, int]]:
    """(input, output) lengths, each drawn evenly from [ratio x most, most]."""

    def draw(most: int, least: int) -> list[int]:
        low = min(max(int(most * args.random_range_ratio), least), most)
        return rng.integers(low, most + 1, args.num_prompts).tolist()

    return list(zip(draw(args.random_input_len, shortest), draw(args.random_output_len, 1), strict=True))


def shared_prefixes(args: argparse.Namespace, tokenizer: Tokenizer, rng: np.random.Generator) -> list[Prompt]:
    """Groups of prompts in a drawn order; those of a group begin with the same --gsp-system-prompt-len tokens.

    A prompt has exactly --gsp-system-prompt-len plus --gsp-question-len tokens, BOS and frame included.
    """
    frame = Framing(tokenizer, args.apply_chat_template, args.prompt_suffix)
    source = TextSource(tokenizer, rng)
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
