"""Prompts that a benchmark sends: drawn, read from a file of conversations, or made after a trace. Nothing is fetched.

Everything is drawn from one generator, so that a seed decides it all.
"""

import argparse
import itertools
import logging
import sys

import numpy as np

from sgl_jax.text.tokenizer import Tokenizer
from sgl_jax.tools.benchmark.datasets import kinds
from sgl_jax.tools.benchmark.datasets.source import IdSource
from sgl_jax.tools.benchmark.protocols import Prompt
from sgl_jax.tools.benchmark.terminal import BenchmarkError

logger = logging.getLogger(__name__)

_OF_IDS = {"random-ids": kinds.random_ids, "mooncake": kinds.mooncake}
_OF_TEXT = {
    "random": kinds.random_texts,
    "sharegpt": kinds.sharegpt,
    "custom": kinds.custom,
    "generated-shared-prefix": kinds.shared_prefixes,
}
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
    rng = np.random.default_rng(seed)
    most = args.num_prompts or (sys.maxsize if name in ("custom", "generated-shared-prefix") else _NUM_PROMPTS)
    try:
        if name in _OF_IDS:
            found = _OF_IDS[name](args, IdSource(vocab_size, tokenizer, rng), rng, most)
        elif tokenizer is None:
            raise BenchmarkError(
                f"--dataset-name is {name}, whose tokens must be counted; give --tokenizer, or use random-ids"
            )
        else:
            found = _OF_TEXT[name](args, tokenizer, rng, most)
        prompts = list(itertools.islice(found, most))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", error)
        raise BenchmarkError(f"--dataset-path is {path}; it cannot be read: {reason}") from error
    if not prompts:
        raise BenchmarkError(f"--dataset-path is {path}; nothing in it can be sent")
    if args.num_prompts is not None and len(prompts) < args.num_prompts:
        logger.warning("--num-prompts is %d; the data set has %d", args.num_prompts, len(prompts))
    return prompts
