"""What a benchmark sends: prompts drawn, read from a file of conversations, or made after a trace. Nothing is fetched.

Everything is drawn from one generator, so a seed says it all.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sgl_jax.benchmark.errors import BenchmarkError
from sgl_jax.benchmark.records import Prompt

if TYPE_CHECKING:
    from sgl_jax.text.tokenizer import Tokenizer

DATASETS = ("random", "random-ids", "sharegpt", "custom", "generated-shared-prefix", "mooncake", "azure")
NUM_PROMPTS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag that `load_prompts` reads."""
    group = parser.add_argument_group("Data set")
    add = group.add_argument
    add("--dataset-name", choices=DATASETS, default="random", help="what is sent (default: random)")
    add("--dataset-path", metavar="PATH", help="the file of sharegpt, custom, mooncake and azure")
    add(
        "--num-prompts",
        type=int,
        metavar="N",
        help=f"prompts at most (default: {NUM_PROMPTS}; generated-shared-prefix: all of its groups)",
    )
    add(
        "--random-input-len",
        "--random-input",
        type=int,
        default=1024,
        metavar="N",
        help="random, random-ids: most tokens of a prompt, BOS included (default: 1024)",
    )
    add(
        "--random-output-len",
        "--random-output",
        type=int,
        default=1024,
        metavar="N",
        help="random, random-ids: most tokens to generate (default: 1024)",
    )
    add(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="X",
        help="random, random-ids: lengths are drawn evenly from X times the most to the most; 1 is always the most "
        "(default: 0)",
    )
    add(
        "--apply-chat-template",
        action="store_true",
        default=False,
        help="put each prompt into the model's chat template, which then counts towards its length",
    )
    add("--prompt-suffix", default="", metavar="TEXT", help="text after each prompt, counted as well (default: none)")
    add(
        "--tokenize-prompt",
        action="store_true",
        default=False,
        help="send the prompts' token ids instead of their text",
    )


def load_prompts(
    args: argparse.Namespace, tokenizer: Tokenizer | None, vocab_size: int | None, seed: int
) -> list[Prompt]:
    """The prompts that the flags ask for, in the order of sending; the same for the same seed.

    `vocab_size` is the model's, where it is known. Raises BenchmarkError, naming the flag, when it cannot be done.
    """
    import numpy as np

    from sgl_jax.benchmark.datasets import generated

    _check(args)
    rng = np.random.default_rng(seed)
    match args.dataset_name:
        case "random":
            prompts = generated.random_texts(args, _needed(tokenizer, args), rng)
        case "random-ids":
            prompts = generated.random_ids(args, tokenizer, vocab_size, rng)
        case name:
            raise BenchmarkError(f"--dataset-name is {name}; it is not known")
    return prompts


def _needed(tokenizer: Tokenizer | None, args: argparse.Namespace) -> Tokenizer:
    if tokenizer is None:
        raise BenchmarkError(
            f"--dataset-name is {args.dataset_name}, which counts the tokens of text; give --tokenizer, or use random-ids"
        )
    return tokenizer


def _check(args: argparse.Namespace) -> None:
    for name in ("num_prompts", "random_input_len", "random_output_len"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise BenchmarkError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if not 0 <= args.random_range_ratio <= 1:
        raise BenchmarkError(f"--random-range-ratio is {args.random_range_ratio}; it must be between 0 and 1")
