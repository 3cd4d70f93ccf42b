"""Tests of weights, activations and KV with different dtypes, which every launch makes equal today."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact import GREEDY, Build

from sgl_jax.engine import launch_plan, startup
from sgl_jax.engine.core import Core
from sgl_jax.engine.launch_plan import LaunchPlan, plan_launch
from sgl_jax.engine.messages import EngineInfo
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.pool import pools_of
from simulated import Answer, Client

ONE_STEP = Bucket(16, 2)
PROMPT = [1, 403, 407, 261, 378]


def answer(core: Core) -> Answer:
    client = Client(core)
    client.submit(0, PROMPT, **GREEDY, max_tokens=20, logprobs=0)
    client.run()
    assert core.runner.compiles_after_ready == 0
    return client.answers[0]


def logprobs(core: Core) -> np.ndarray:
    return np.array([scored.logprob for scored in answer(core).logprobs])


@pytest.fixture(scope="module")
def all_float32(stories260k: Path, build: Build) -> tuple[EngineInfo, np.ndarray]:
    core = build(stories260k, ONE_STEP)
    return core.info, logprobs(core)


def test_a_pool_of_another_dtype(
    stories260k: Path, build: Build, all_float32: tuple[EngineInfo, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """KV of a smaller dtype takes half the bytes, and its rounding changes logprobs a little."""
    monkeypatch.setattr(launch_plan, "pools_of", lambda shard, attention, dtype: pools_of(shard, attention, "bfloat16"))
    halved = build(stories260k, ONE_STEP, attention_backend="native")  # the library for CPUs refuses it
    info, wanted = all_float32
    assert halved.info.dtype == info.dtype == "float32"
    assert halved.info.kv_bytes_per_token * 2 == info.kv_bytes_per_token
    difference = np.abs(logprobs(halved) - wanted)
    assert 0 < difference.max() < 0.1


@pytest.mark.parametrize(("held", "computed"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_weights_of_another_dtype_than_activations(
    stories260k: Path,
    build: Build,
    all_float32: tuple[EngineInfo, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    held: str,
    computed: str,
) -> None:
    def apart(*args: Any, **options: Any) -> LaunchPlan:
        plan = plan_launch(*args, **options)
        return dataclasses.replace(plan, runner_config=dataclasses.replace(plan.runner_config, weight_dtype=held))

    monkeypatch.setattr(startup, "plan_launch", apart)
    core = build(stories260k, ONE_STEP, dtype=computed)
    assert core.info.dtype == computed
    np.testing.assert_allclose(logprobs(core), all_float32[1], atol=0.1)
