"""Every family of models gives, in float32, the tokens and logprobs of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from exact import GREEDY, TOLERANCE, Build, assert_top5

from sgl_jax.engine.core import Core
from sgl_jax.runtime import platform
from simulated import Client

FAMILIES = [
    "llama",
    "llama-attn-bias",
    "llama-rope3",
    "llama-tied",
    "mistral",
    "qwen2",
    "qwen2-tied",
    "qwen2-yarn",
    "qwen3",
    "qwen3-tied",
    "qwen2_moe",
    "qwen2_moe-mixed",
    "qwen3_moe",
    "mixtral",
    "gemma2",
    "gemma3_text",
    "glm4_moe",
    "glm4_moe-air",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v2-lite",
    "deepseek_v3",
    "deepseek_v3-noqlora",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_transformers_tokens_and_logprobs(build: Build, shared_data: Path, family: str) -> None:
    """All prompts at once, in chunks of four tokens: two step programs."""
    folder = shared_data / "oracle" / family
    core = build(folder, max_running_requests=4, chunked_prefill_size=4, max_total_tokens=1024)
    assert_oracle(core, folder)


def test_a_latent_pool_gives_them_in_pages_of_one_in_the_form_accelerators_get(
    build: Build, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers stacked and scanned, decoding rows side by side."""
    form = dataclasses.replace(platform.PLATFORMS["cpu"], stacks_layers=True, vectorises_rows=True)
    monkeypatch.setitem(platform.PLATFORMS, "cpu", form)
    folder, pages = shared_data / "oracle" / "deepseek_v3", {"page_size": 1, "max_total_tokens": 1024}
    assert_oracle(build(folder, max_running_requests=4, chunked_prefill_size=4, **pages), folder)


def assert_oracle(core: Core, folder: Path) -> None:
    """All of the folder's prompts at once."""
    cases = json.loads((folder / "oracle.json").read_text(encoding="utf-8"))["cases"]
    client = Client(core)
    for key, case in enumerate(cases):
        client.submit(key, case["prompt_ids"], max_tokens=24, logprobs=5, prompt_logprobs=0, **GREEDY)
    client.run()
    for key, case in enumerate(cases):
        got = client.answers[key]
        assert got.tokens == case["greedy_ids"], case["name"]
        assert len(got.logprobs) == len(case["top5"]) == 24
        assert_top5(got.logprobs, case["top5"])
        assert got.prompt is not None
        assert got.prompt.logprobs is not None
        assert got.prompt.logprobs[0] is None
        assert case["prompt_logprobs"][0] is None
        ours = [scored.logprob for scored in got.prompt.logprobs[1:] if scored is not None]
        np.testing.assert_allclose(ours, case["prompt_logprobs"][1:], atol=TOLERANCE)


def test_the_default_model_gives_transformers_tokens_and_logprobs(build: Build, golden: Path, smollm2: Path) -> None:
    stored = json.loads((golden / "smollm2-135m-instruct.json").read_text(encoding="utf-8"))
    cases = stored["cases"]
    core = build(smollm2, max_running_requests=4, chunked_prefill_size=4, max_total_tokens=1024, context_length=256)
    client = Client(core)
    for key, case in enumerate(cases):
        client.submit(key, case["prompt_ids"], max_tokens=64, logprobs=5, **GREEDY)
    client.run()
    for key, case in enumerate(cases):
        assert client.tokens[key] == case["output_ids_64_ignore_eos"], case["name"]
        assert_top5(client.answers[key].logprobs, case["top5_logprobs_first8"])
