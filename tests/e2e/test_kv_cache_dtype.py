"""Tests of --kv-cache-dtype: KV in eight bits takes a quarter of float32's bytes and moves logprobs a little."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from exact import GREEDY, Build
from safetensors.numpy import load_file, save_file

from messages import says
from sgl_jax.engine.core import Core
from sgl_jax.runtime import platform
from sgl_jax.runtime.buckets import Bucket
from simulated import Answer, Client

ONE_STEP = Bucket(16, 2)
PROMPT = [1, 403, 407, 261, 378]
EIGHT_BITS = ["int8", "fp8_e4m3", "fp8_e5m2"]


def answer(core: Core, prompt: list[int], **params: int) -> Answer:
    client = Client(core)
    client.submit(0, prompt, **GREEDY, **params)
    client.run()
    assert core.runner.compiles_after_ready == 0
    return client.answers[0]


def prompt_logprobs(core: Core, prompt: list[int]) -> np.ndarray:
    scores = answer(core, prompt, max_tokens=4, prompt_logprobs=0).prompt
    assert scores is not None
    return np.array([scored.logprob for scored in scores.logprobs[1:]])


@dataclasses.dataclass(frozen=True)
class Exact:
    """A text of the model's own, its logprobs, and the bytes of a token's KV."""

    text: list[int]
    logprobs: np.ndarray
    num_bytes: int


def exactly(core: Core) -> Exact:
    text = PROMPT + answer(core, PROMPT, max_tokens=24).tokens
    return Exact(text, prompt_logprobs(core, text), core.info.kv_bytes_per_token)


@pytest.fixture(scope="module")
def exact(stories260k: Path, build: Build) -> Exact:
    return exactly(build(stories260k, ONE_STEP))


@pytest.mark.parametrize("backend", ["cpu", "native"])
@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_kv_of_eight_bits_is_a_quarter_and_nearly_exact(
    stories260k: Path, build: Build, exact: Exact, dtype: str, backend: str
) -> None:
    core = build(stories260k, ONE_STEP, kv_cache_dtype=dtype, attention_backend=backend)
    assert core.info.kv_bytes_per_token * 4 == exact.num_bytes
    difference = np.abs(prompt_logprobs(core, exact.text) - exact.logprobs).mean()
    assert 1e-4 < difference < {"int8": 0.03, "fp8_e4m3": 0.03, "fp8_e5m2": 0.06}[dtype]


def test_both_backends_hold_the_same_numbers(stories260k: Path, build: Build, exact: Exact) -> None:
    found = [
        prompt_logprobs(build(stories260k, ONE_STEP, kv_cache_dtype="int8", attention_backend=backend), exact.text)
        for backend in ("cpu", "native")
    ]
    np.testing.assert_allclose(*found, atol=2e-3)


@pytest.mark.parametrize("folder", ["deepseek_v2-lite", "gpt_oss", "qwen2_moe-mixed"])
def test_other_kinds_of_layers_have_scales_too(checkpoint: Callable[[str], Path], build: Build, folder: str) -> None:
    """A latent pool has one plane, sinks and windows have others beside their scales."""
    wanted = exactly(build(checkpoint(folder), ONE_STEP))
    found = prompt_logprobs(build(checkpoint(folder), ONE_STEP, kv_cache_dtype="int8"), wanted.text)
    assert 1e-6 < np.abs(found - wanted.logprobs).mean() < 0.1


def test_layers_of_a_scan_have_scales_too(
    stories260k: Path, build: Build, exact: Exact, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = prompt_logprobs(
        build(stories260k, ONE_STEP, kv_cache_dtype="int8", attention_backend="native"), exact.text
    )
    scans = dataclasses.replace(platform.PLATFORMS["cpu"], stacks_layers=True)
    monkeypatch.setitem(platform.PLATFORMS, "cpu", scans)
    core = build(stories260k, ONE_STEP, kv_cache_dtype="int8", attention_backend="native")
    np.testing.assert_allclose(prompt_logprobs(core, exact.text), listed, atol=1e-3)


def test_scales_of_the_checkpoint_are_taken(stories260k: Path, tmp_path: Path, build: Build, exact: Exact) -> None:
    """Powers of two round but the smallest numbers otherwise."""
    tensors = load_file(stories260k / "model.safetensors")
    for file in stories260k.iterdir():
        if file.suffix in (".json", ".model"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    for layer in range(5):
        for name in ("k_scale", "v_scale"):
            tensors[f"model.layers.{layer}.self_attn.{name}"] = np.array(2.0**-3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    core = build(tmp_path, ONE_STEP, kv_cache_dtype="fp8_e4m3")
    scales = [np.asarray(jax.device_get(w.kv_scales)) for w in core.runner._values["weights"].layers]
    np.testing.assert_array_equal(scales, np.full((5, 2), 2.0**-3))
    found = prompt_logprobs(core, exact.text)
    plain = build(stories260k, ONE_STEP, kv_cache_dtype="fp8_e4m3")
    assert 1e-4 < np.abs(found - prompt_logprobs(plain, exact.text)).mean() < 0.03


def test_the_log_says_where_scales_are_from(stories260k: Path, build: Build, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    build(stories260k, ONE_STEP, kv_cache_dtype="int8")
    assert says(caplog.text, "KV cache … int8 … measured on 256 random tokens")
    build(stories260k, ONE_STEP, kv_cache_dtype="fp8")
    assert says(caplog.text, "KV cache … float8_e4m3fn … the checkpoint's scales, or 1")


def test_bfloat16_beside_float32_is_served_or_refused_by_name(stories260k: Path, build: Build) -> None:
    core = build(stories260k, ONE_STEP, kv_cache_dtype="bfloat16", attention_backend="native")
    assert core.info.kv_bytes_per_token * 2 == build(stories260k, ONE_STEP).info.kv_bytes_per_token
    with pytest.raises(ValueError, match=r"--attention-backend cpu.* bfloat16 .*float32.*use native"):
        build(stories260k, ONE_STEP, kv_cache_dtype="bfloat16", attention_backend="cpu")
