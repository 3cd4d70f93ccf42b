"""Losses of the default model on a text, with its matrices held as int8, or its KV in eight bits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from exact import GREEDY, Build

from sgl_jax.runtime.buckets import Bucket
from simulated import Client

WINDOW = 512  # tokens


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"quantization": "int8-weight-only"}, 0.006),
        ({"quantization": "int8"}, 0.04),
        ({"kv_cache_dtype": "int8"}, 0.015),
        ({"kv_cache_dtype": "fp8_e4m3"}, 0.03),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_rounding_costs_some_hundredths_of_a_nat_at_most(
    options: dict[str, str], most: float, build: Build, golden: Path, smollm2: Path
) -> None:
    """transformers loses .0043 nats a token with the same int8 weights, and its tokens as they are."""
    text = json.loads((golden / "smollm2-135m-text.json").read_text(encoding="utf-8"))
    assert text["mean_nll_int8_weights"] - text["mean_nll"] == pytest.approx(0.0043, abs=1e-4)
    sizes = {"max_total_tokens": 4096, "context_length": WINDOW + 1}
    core = build(smollm2, Bucket(WINDOW, 2), optimised=True, dtype="bfloat16", **sizes, **options)
    client = Client(core)
    for key in range(len(text["ids"]) // WINDOW):
        client.submit(key, text["ids"][key * WINDOW :][:WINDOW], max_tokens=0, prompt_logprobs=0, **GREEDY)
    client.run()
    prompts = [answer.prompt for answer in client.answers.values()]
    logprobs = [each.logprob for prompt in prompts if prompt for each in prompt.logprobs or () if each]
    assert len(logprobs) == len(text["ids"]) - len(prompts)
    loss = -np.mean(logprobs) - text["mean_nll"]
    assert 0 < loss < most
