"""Helpers of the tests of exact tokens."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sgl_jax.cache.prefix_cache import PrefixCache
from sgl_jax.engine.core import Core
from sgl_jax.engine.messages import TokenLogprobs
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.scheduler.scheduler import Scheduler
from sgl_jax.scheduler.scheduler_config import SchedulerConfig
from simulated import Answer, Client

TOLERANCE = 2e-3  # difference of logprobs
CHUNK = 7  # tokens; divides neither a page nor a prompt
ALL_PROMPTS = Bucket(112, 4)  # holds the prompts of 1, 7, 33 and 70 tokens in one step

Build = Callable[..., Core]

GREEDY = {"temperature": 0.0, "ignore_eos": True}


def with_empty_cache(
    core: Core, config: SchedulerConfig | None = None, *, overlap: bool = True, num_pages: int | None = None
) -> Core:
    """Return a core over the same runner, with a scheduler of its own. `num_pages`: fewer usable pages than the core's."""
    caches = [PrefixCache((num_pages or each.num_usable_pages) + 1, each.page_size) for each in core.scheduler.caches]
    adapters, grammars = core.adapters, core.grammars
    found = {"adapters": adapters.slots if adapters else None, "find_grammar": grammars.find if grammars else None}
    scheduler, parts = Scheduler(config or core.scheduler.config, caches, **found), (adapters, grammars)
    more = {"adapters": parts[0], "grammars": parts[1], "pooler": core.pooler}
    return Core(scheduler, core.runner, core.info, overlap=overlap, random_seed=0, **more)


def answers_in_every_way(
    core: Core, prompts: Sequence[list[int]], adapter: int = 0, **params: Any
) -> Iterator[tuple[str, list[Answer]]]:
    """Yield the core's answers to the prompts, whole and in chunks, together and alone, each from an empty cache."""
    whole = core.scheduler.config
    chunked = dataclasses.replace(whole, max_step_tokens=CHUNK, max_prefill_tokens=CHUNK)
    for config, together in itertools.product((whole, chunked), (True, False)):
        client = Client(with_empty_cache(core, config))
        for key, prompt in enumerate(prompts, 1):
            client.submit(key, prompt, adapter=adapter, **GREEDY, **params)
            if not together:
                client.run()
        client.run()
        way = f"{'whole' if config is whole else 'in chunks'}, {'together' if together else 'alone'}"
        yield way, [client.answers[key] for key in range(1, len(prompts) + 1)]


def assert_oracle(core: Core, folder: Path, adapter: int = 0) -> None:
    """Check that the answers equal the folder's oracle.json, however the prompts come."""
    cases = json.loads((folder / "oracle.json").read_text(encoding="utf-8"))["cases"]
    prompts = [case["prompt_ids"] for case in cases]
    for way, answers in answers_in_every_way(core, prompts, adapter, max_tokens=24, logprobs=5, prompt_logprobs=0):
        for case, got in zip(cases, answers, strict=True):
            assert got.tokens == case["greedy_ids"], (case["name"], way)
            assert len(got.logprobs) == len(case["top5"]) == 24
            assert_top5(got.logprobs, case["top5"])
            assert case["prompt_logprobs"][0] is None
            assert_prompt(got, case["prompt_logprobs"][1:])


def assert_reference(
    core: Core, prompts: Sequence[list[int]], logprobs: Callable[[list[int]], np.ndarray], steps: int
) -> None:
    """Check that the answers equal a second implementation's, however the prompts come. `logprobs`: ids -> [len(ids), V]."""
    expected: dict[tuple[int, ...], np.ndarray] = {}
    for way, answers in answers_in_every_way(core, prompts, max_tokens=steps, logprobs=5, prompt_logprobs=0):
        for prompt, got in zip(prompts, answers, strict=True):
            ids = [*prompt, *got.tokens]
            if tuple(ids) not in expected:
                expected[tuple(ids)] = logprobs(ids)
            rows = expected[tuple(ids)]
            generated = rows[len(prompt) - 1 : -1]
            assert got.tokens == generated.argmax(-1).tolist(), way
            best = [[(int(i), float(row[i])) for i in np.argsort(-row)[:5]] for row in generated]
            assert len(got.logprobs) == steps
            assert_top5(got.logprobs, best)
            assert_prompt(got, [rows[i, token] for i, token in enumerate(prompt[1:])])


def assert_top5(scored: list[TokenLogprobs], top5: Sequence[Sequence[Sequence[float]]]) -> None:
    """Check the five best tokens of each position that has a golden value."""
    for ours, theirs in zip(scored, top5, strict=False):
        assert ours.top_ids[:5] == [token for token, _ in theirs]
        np.testing.assert_allclose(ours.top_logprobs[:5], [logprob for _, logprob in theirs], atol=TOLERANCE)


def assert_prompt(got: Answer, logprobs: Sequence[float]) -> None:
    """Return the logprobs of the prompt's tokens after the first."""
    assert got.prompt is not None
    assert got.prompt.logprobs is not None
    assert got.prompt.logprobs[0] is None
    ours = [scored.logprob for scored in got.prompt.logprobs[1:] if scored is not None]
    np.testing.assert_allclose(ours, logprobs, atol=TOLERANCE)
