"""Grok-2 gives, in float32, the tokens and logprobs of a plain reference, from a sharded checkpoint as published."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import reference_grok
from exact import ALL_PROMPTS, TOLERANCE, Build, assert_reference

STEPS = 12


@pytest.mark.supports("float32 on a CPU", ["Grok1ForCausalLM"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_tokens_and_logprobs_are_the_references(build: Build, tmp_path: Path, page_size: int) -> None:
    config = reference_grok.CONFIG
    tensors = reference_grok.random_tensors(config)
    folder = reference_grok.save(tmp_path / "model", config, tensors)
    core = build(folder, bucket=ALL_PROMPTS, max_total_tokens=1024, page_size=page_size)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 128, n).tolist() for n in (1, 7, 33)]
    assert_reference(core, prompts, functools.partial(reference_grok.logprobs, tensors, config), STEPS)


def test_every_number_of_the_config_matters() -> None:
    """The reference's output changes with each cap, so it would notice if one were left out."""
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
