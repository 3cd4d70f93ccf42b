"""Prompts that a benchmark sends: drawn, read from a file of conversations, or made after a trace. Nothing is fetched.

Everything is drawn from one generator, so a seed says it all.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from dataclasses import replace

import numpy as np

from sgl_jax.text.tokenizer import Tokenizer
from sgl_jax.tools.benchmark.arguments import NUM_PROMPTS, OF_IDS
from sgl_jax.tools.benchmark.datasets.conversations import custom, sharegpt
from sgl_jax.tools.benchmark.datasets.generated import random_ids, random_texts, shared_prefixes
from sgl_jax.tools.benchmark.datasets.source import Framing
from sgl_jax.tools.benchmark.datasets.traces import mooncake
from sgl_jax.tools.benchmark.records import Prompt
from sgl_jax.tools.benchmark.terminal import BenchmarkError

logger = logging.getLogger(__name__)


def load_prompts(
    args: argparse.Namespace, tokenizer: Tokenizer | None, vocab_size: int | None, seed: int
) -> list[Prompt]:
    """The prompts that the flags ask for, in the order of sending; the same for the same seed.

    `vocab_size` is the model's, where it is known. May be fewer than --num-prompts, which a warning says. Raises
    BenchmarkError, naming the flag, when it cannot be done.
    """
    _check(args)
    limited = argparse.Namespace(**vars(args))
    limited.dataset_path = args.dataset_path or None  # scripts pass an empty one
    if args.num_prompts is None and args.dataset_name not in ("generated-shared-prefix", "custom"):
        limited.num_prompts = NUM_PROMPTS
    try:
        prompts = _read(limited, tokenizer, vocab_size, np.random.default_rng(seed))
    except OSError as error:
        raise BenchmarkError(f"--dataset-path is {args.dataset_path}; it cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"--dataset-path is {args.dataset_path}; it is not text in UTF-8: {error}") from error
    if not prompts:
        raise BenchmarkError(f"--dataset-path is {args.dataset_path}; nothing in it can be sent")
    if args.num_prompts is not None and len(prompts) < args.num_prompts:
        logger.warning("--num-prompts is %d; the data set has %d", args.num_prompts, len(prompts))
    if args.tokenize_prompt and tokenizer is not None:  # without one they are ids already
        ids = Framing(tokenizer).ids
        prompts = [replace(prompt, prompt=ids(prompt.prompt)) for prompt in prompts]
    return prompts


def _check(args: argparse.Namespace) -> None:
    name = args.dataset_name
    if name in ("sharegpt", "custom", "mooncake") and not args.dataset_path:
        raise BenchmarkError(f"--dataset-name {name} needs --dataset-path; nothing is downloaded")
    if name in ("random-ids", "generated-shared-prefix") and args.dataset_path:
        logger.warning("--dataset-path has no effect: %s is drawn, not read", name)
    for flag, given in (("--apply-chat-template", args.apply_chat_template), ("--prompt-suffix", args.prompt_suffix)):
        if name in OF_IDS and given:
            raise BenchmarkError(f"{flag} needs prompts of text; those of --dataset-name {name} are token ids")


def _read(
    args: argparse.Namespace, tokenizer: Tokenizer | None, vocab_size: int | None, rng: np.random.Generator
) -> list[Prompt]:
    name = args.dataset_name
    if name in OF_IDS:
        return {"random-ids": random_ids, "mooncake": mooncake}[name](args, tokenizer, vocab_size, rng)
    if tokenizer is None:
        raise BenchmarkError(
            f"--dataset-name is {name}, whose tokens must be counted; give --tokenizer, or use random-ids"
        )
    of_text = {
        "random": random_texts,
        "generated-shared-prefix": shared_prefixes,
        "sharegpt": sharegpt,
        "custom": custom,
    }
    return list(itertools.islice(of_text[name](args, tokenizer, rng), args.num_prompts))
