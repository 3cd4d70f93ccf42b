"""Losses of the default model on a text, with its matrices held as int8."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from exact import GREEDY, Build

from sgl_jax.engine import startup
from sgl_jax.models.families import decoder_config
from sgl_jax.models.scaled import Scaled
from sgl_jax.ops.quantized_matmul.api import Rounding
from sgl_jax.runtime.buckets import Bucket
from simulated import Client

WINDOW = 512  # tokens


@pytest.mark.parametrize(("rounding", "most"), [(None, 0.006), ("int8", 0.04)])
def test_int8_costs_few_thousandths_of_a_nat_and_rounded_tokens_some_hundredths(
    rounding: Rounding | None,
    most: float,
    build: Build,
    golden: Path,
    smollm2: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers loses .0043 nats a token with the same weights rounded, and its tokens as they are."""
    text = json.loads((golden / "smollm2-135m-text.json").read_text(encoding="utf-8"))
    assert text["mean_nll_int8_weights"] - text["mean_nll"] == pytest.approx(0.0043, abs=1e-4)
    scheme = Scaled("int8", rounding=rounding)
    monkeypatch.setattr(
        startup, "decoder_config", lambda *args: dataclasses.replace(decoder_config(*args), weight_scheme=scheme)
    )
    core = build(smollm2, Bucket(WINDOW, 2), dtype="bfloat16", max_total_tokens=4096, context_length=WINDOW + 1)
    client = Client(core)
    for key in range(len(text["ids"]) // WINDOW):
        client.submit(key, text["ids"][key * WINDOW :][:WINDOW], max_tokens=0, prompt_logprobs=0, **GREEDY)
    client.run()
    prompts = [answer.prompt for answer in client.answers.values()]
    logprobs = [each.logprob for prompt in prompts if prompt for each in prompt.logprobs or () if each]
    assert len(logprobs) == len(text["ids"]) - len(prompts)
    loss = -np.mean(logprobs) - text["mean_nll"]
    assert 0 < loss < most
