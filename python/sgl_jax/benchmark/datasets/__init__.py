"""What a benchmark sends: prompts drawn, read from a file of conversations, or made after a trace. Nothing is fetched.

Everything is drawn from one generator, so a seed says it all.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from sgl_jax.benchmark.errors import BenchmarkError
from sgl_jax.benchmark.records import Prompt

if TYPE_CHECKING:
    import numpy as np

    from sgl_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

NUM_PROMPTS = 1000
_FROM_FILES = ("sharegpt", "custom", "mooncake")
_OF_IDS = ("random-ids", "mooncake")
_OF_TEXT = ("random", "sharegpt", "custom", "generated-shared-prefix")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag that `load_prompts` reads."""
    group = parser.add_argument_group("Data set")

    def number(names: str, default: int | None, text: str) -> None:
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(*names.split(), type=int, default=default, metavar="N", help=text + shown)

    group.add_argument(
        "--dataset-name",
        choices=(*_OF_TEXT, *_OF_IDS),
        default="random",
        help="what is sent (default: random, text of drawn lengths)",
    )
    group.add_argument(
        "--dataset-path",
        metavar="PATH",
        help="the file of sharegpt, custom and mooncake; for random a text to use instead of the bundled one",
    )
    number(
        "--num-prompts", None, f"prompts at most (default: {NUM_PROMPTS}; of generated-shared-prefix and custom, all)"
    )
    number("--random-input-len --random-input", 1024, "random, random-ids: most tokens of a prompt, BOS included")
    number("--random-output-len --random-output", 1024, "random, random-ids: most tokens to generate")
    group.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="X",
        help="random, random-ids: lengths are drawn evenly between X times the most and the most; 1: always the most "
        "(default: 0)",
    )
    number(
        "--sharegpt-output-len",
        None,
        "sharegpt, custom: tokens to generate (default: as the data say, else the answer's)",
    )
    number(
        "--sharegpt-context-len",
        None,
        "sharegpt, custom: leave out what has more tokens, prompt and output together (default: sharegpt leaves out "
        "prompts over 1024 and totals over 2048)",
    )
    number("--gsp-num-groups", 64, "generated-shared-prefix: groups of prompts that share a system prompt")
    number("--gsp-prompts-per-group", 16, "generated-shared-prefix: prompts of a group")
    number("--gsp-system-prompt-len", 2048, "generated-shared-prefix: tokens the prompts of a group share")
    number("--gsp-question-len", 128, "generated-shared-prefix: tokens of a prompt after the shared ones")
    number("--gsp-output-len", 256, "generated-shared-prefix: tokens to generate")
    group.add_argument(
        "--mooncake-workload",
        choices=("mooncake", "conversation", "toolagent", "synthetic"),
        default="conversation",
        help="which of Mooncake's traces, where --dataset-path is their folder (default: conversation)",
    )
    group.add_argument(
        "--trace-slowdown-factor",
        "--mooncake-slowdown-factor",
        type=float,
        default=1.0,
        metavar="X",
        help="mooncake: arrival times are multiplied by this (default: 1)",
    )
    group.add_argument(
        "--apply-chat-template",
        action="store_true",
        default=False,
        help="put each prompt into the model's chat template, which then counts towards its length",
    )
    group.add_argument(
        "--prompt-suffix", default="", metavar="TEXT", help="text after each prompt, counted as well (default: none)"
    )
    group.add_argument(
        "--tokenize-prompt", action="store_true", default=False, help="send token ids instead of the prompts' text"
    )


def load_prompts(
    args: argparse.Namespace, tokenizer: Tokenizer | None, vocab_size: int | None, seed: int
) -> list[Prompt]:
    """The prompts that the flags ask for, in the order of sending; the same for the same seed.

    `vocab_size` is the model's, where it is known. May be fewer than --num-prompts, which a warning says. Raises
    BenchmarkError, naming the flag, when it cannot be done.
    """
    import numpy as np

    _check(args)
    limited = argparse.Namespace(**vars(args))
    limited.dataset_path = args.dataset_path or None  # scripts pass an empty one
    if limited.num_prompts is None and args.dataset_name not in ("generated-shared-prefix", "custom"):
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
    return [_tokenized(prompt, tokenizer) for prompt in prompts] if args.tokenize_prompt else prompts


def _read(
    args: argparse.Namespace, tokenizer: Tokenizer | None, vocab_size: int | None, rng: np.random.Generator
) -> list[Prompt]:
    from sgl_jax.benchmark.datasets import conversations, generated, traces

    name = args.dataset_name
    match name:
        case "random-ids":
            return generated.random_ids(args, tokenizer, vocab_size, rng)
        case "mooncake":
            return traces.mooncake(args, tokenizer, vocab_size, rng)
    if tokenizer is None:
        raise BenchmarkError(
            f"--dataset-name is {name}, whose tokens must be counted; give --tokenizer, or use random-ids"
        )
    match name:
        case "random":
            return generated.random_texts(args, tokenizer, rng)
        case "generated-shared-prefix":
            return generated.shared_prefixes(args, tokenizer, rng)
        case "sharegpt":
            return conversations.sharegpt(args, tokenizer, rng)
        case "custom":
            return conversations.custom(args, tokenizer)
    raise BenchmarkError(f"--dataset-name is {name}; it must be one of {', '.join((*_OF_TEXT, *_OF_IDS))}")


def _tokenized(prompt: Prompt, tokenizer: Tokenizer | None) -> Prompt:
    from sgl_jax.benchmark.datasets.framing import Framing

    text = prompt.prompt
    if isinstance(text, list) and isinstance(text[0], int):
        return prompt
    assert tokenizer is not None, "ids are made without one, and nothing else"
    if not isinstance(text, str):
        text = Framing(tokenizer).render(text)
    return replace(prompt, prompt=tokenizer.encode(text))


_AT_LEAST_1 = (
    "num_prompts",
    "random_input_len",
    "random_output_len",
    "sharegpt_output_len",
    "sharegpt_context_len",
    "gsp_num_groups",
    "gsp_prompts_per_group",
    "gsp_system_prompt_len",
    "gsp_question_len",
    "gsp_output_len",
)


def _check(args: argparse.Namespace) -> None:
    for name in _AT_LEAST_1:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise BenchmarkError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if not 0 <= args.random_range_ratio <= 1:
        raise BenchmarkError(f"--random-range-ratio is {args.random_range_ratio}; it must be between 0 and 1")
    if not 0 < args.trace_slowdown_factor < float("inf"):
        raise BenchmarkError(f"--trace-slowdown-factor is {args.trace_slowdown_factor}; it must be above 0")
    if args.dataset_name in _FROM_FILES and not args.dataset_path:
        raise BenchmarkError(f"--dataset-name {args.dataset_name} needs --dataset-path; nothing is downloaded")
    if args.dataset_path and args.dataset_name in ("random-ids", "generated-shared-prefix"):
        logger.warning("--dataset-path has no effect: %s is drawn, not read", args.dataset_name)
    if args.dataset_name in _OF_IDS:
        for given, flag in (
            (args.apply_chat_template, "--apply-chat-template"),
            (args.prompt_suffix, "--prompt-suffix"),
        ):
            if given:
                raise BenchmarkError(
                    f"{flag} needs prompts of text; those of --dataset-name {args.dataset_name} are token ids"
                )
