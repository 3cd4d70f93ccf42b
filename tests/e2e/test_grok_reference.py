"""Grok-2 gives, in float32, the tokens and logprobs of a plain reference, from a checkpoint in shares as published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import reference_grok
from exact import GREEDY, TOLERANCE, Build, assert_top5

from simulated import Client

STEPS = 12


def test_tokens_and_logprobs_are_the_references(build: Build, tmp_path: Path) -> None:
    config = reference_grok.CONFIG
    tensors = reference_grok.random_tensors(config)
    folder = reference_grok.save(tmp_path / "model", config, tensors)
    core = build(folder, max_running_requests=4, chunked_prefill_size=8, max_total_tokens=1024, page_size=4)
    client, rng = Client(core), np.random.default_rng(1)
    prompts = [rng.integers(3, 128, n).tolist() for n in (1, 7, 33)]
    for key, prompt in enumerate(prompts):
        client.submit(key, prompt, max_tokens=STEPS, logprobs=5, prompt_logprobs=0, **GREEDY)
    client.run()
    for key, prompt in enumerate(prompts):
        tokens, logprobs = reference_grok.greedy(tensors, prompt, config, STEPS)
        got = client.answers[key]
        assert got.tokens == tokens
        chosen = logprobs[len(prompt) - 1 :]
        best = [[(int(i), float(row[i])) for i in np.argsort(-row)[:5]] for row in chosen]
        assert_top5(got.logprobs, best)
        assert got.prompt is not None
        assert got.prompt.logprobs is not None
        ours = [scored.logprob for scored in got.prompt.logprobs[1:] if scored is not None]
        theirs = [logprobs[t, token] for t, token in enumerate(prompt[1:])]
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def test_every_number_of_the_config_matters() -> None:
    """A reference that would not notice a cap left out could not judge one."""
    config = reference_grok.CONFIG
    tensors = reference_grok.random_tensors(config)
    prompt = np.random.default_rng(2).integers(3, 128, 20).tolist()
    usual = reference_grok.logits(tensors, prompt, config)[-1]
    for change in (
        {"attn_logit_softcapping": 1e9},
        {"router_logit_softcapping": 1e9},
        {"final_logit_softcapping": 1e9},
        {"attn_temperature_len": 10**9},
        {"embedding_multiplier_scale": 1.0},
        {"output_multiplier_scale": 1.0},
    ):
        other = reference_grok.logits(tensors, prompt, config | change)[-1]
        assert np.abs(other - usual).max() > 10 * TOLERANCE, change
