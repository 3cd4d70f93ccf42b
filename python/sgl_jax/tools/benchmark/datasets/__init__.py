"""Prompts that a benchmark sends: drawn, read from a file of conversations, or made after a trace. Nothing is fetched.

Everything is drawn from one generator, so that a seed decides it all.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from dataclasses import replace

import numpy as np

from sgl_jax.text.tokenizer import Tokenizer
from sgl_jax.tools.benchmark.arguments import OF_IDS
from sgl_jax.tools.benchmark.datasets.conversations import custom, sharegpt
from sgl_jax.tools.benchmark.datasets.generated import mooncake, random_ids, random_texts, shared_prefixes
from sgl_jax.tools.benchmark.datasets.source import Framing, IdSource
from sgl_jax.tools.benchmark.protocols import Prompt
from sgl_jax.tools.benchmark.terminal import BenchmarkError

logger = logging.getLogger(__name__)

_OF_TEXT = {"random": random_texts, "generated-shared-prefix": shared_prefixes, "sharegpt": sharegpt, "custom": custom}
_NUM_PROMPTS = 1000  # at most, where a data set has no end or is too large to be sent whole


def load_prompts(
    args: argparse.Namespace, tokenizer: Tokenizer | None, vocab_size: int | None, seed: int
) -> list[Prompt]:
    """Return the prompts that the flags ask for, in the order of sending; the same for the same seed.

    `vocab_size` is the model's, where it is known. May be fewer than --num-prompts, which a warning says. Raises
    BenchmarkError, naming the flag, when it cannot be done.
    """
    name, path = args.dataset_name, args.dataset_path
    if name in ("sharegpt", "custom", "mooncake") and not path:
        raise BenchmarkError(f"--dataset-name {name} needs --dataset-path; nothing is downloaded")
    if name in ("random-ids", "generated-shared-prefix") and path:
        logger.warning("--dataset-path has no effect: %s is drawn, not read", name)
    for flag, given in (("--apply-chat-template", args.apply_chat_template), ("--prompt-suffix", args.prompt_suffix)):
        if name in OF_IDS and given:
            raise BenchmarkError(f"{flag} needs prompts of text; those of --dataset-name {name} are token ids")
    try:
        prompts = _read(args, tokenizer, vocab_size, np.random.default_rng(seed))
    except OSError as error:
        raise BenchmarkError(f"--dataset-path is {path}; it cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"--dataset-path is {path}; it is not text in UTF-8: {error}") from error
    if not prompts:
        raise BenchmarkError(f"--dataset-path is {path}; nothing in it can be sent")
    if args.num_prompts is not None and len(prompts) < args.num_prompts:
        logger.warning("--num-prompts is %d; the data set has %d", args.num_prompts, len(prompts))
    if args.tokenize_prompt and tokenizer is not None:  # without one they are ids already
        ids = Framing(tokenizer).ids
        prompts = [replace(prompt, prompt=ids(prompt.prompt)) for prompt in prompts]
    return prompts


def _read(
    args: argparse.Namespace, tokenizer: Tokenizer | None, vocab_size: int | None, rng: np.random.Generator
) -> list[Prompt]:
    name = args.dataset_name
    most = _NUM_PROMPTS if args.num_prompts is None else args.num_prompts
    if name in OF_IDS:
        source = IdSource(vocab_size, tokenizer, rng)
        return random_ids(args, source, rng, most) if name == "random-ids" else mooncake(args, source, rng, most)
    if tokenizer is None:
        raise BenchmarkError(
            f"--dataset-name is {name}, whose tokens must be counted; give --tokenizer, or use random-ids"
        )
    frame = Framing(tokenizer, args.apply_chat_template, args.prompt_suffix)
    if name in ("generated-shared-prefix", "custom"):
        most = args.num_prompts
    return list(itertools.islice(_OF_TEXT[name](args, frame, rng), most))
