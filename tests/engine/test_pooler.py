"""Vectors of the engine core over a fake device: the same however prompts are cut, preempted, cached and divided."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fakes.fake_runner import kv_chain, state_of
from sgl_jax.engine.core import Core
from sgl_jax.engine.messages import Abort, PoolingInfo
from sgl_jax.engine.pooler import Head, Pooler
from sgl_jax.request import FinishReason
from simulated import Answer, Client, make_core

LAST, MEAN = PoolingInfo("embed", 2), PoolingInfo("embed", 2, method="mean")
WAYS = list(itertools.product((LAST, MEAN), (True, False), (1, 2)))


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    """Return prompts of which some begin alike."""
    rng = np.random.default_rng(0)
    common = rng.integers(1, 500, 9).tolist()
    found = [rng.integers(1, 500, rng.integers(1, longest)).tolist() for _ in range(count)]
    return [common + each if i % 3 == 0 else each for i, each in enumerate(found)]


def right(answer: Answer, pooling: PoolingInfo) -> list[float]:
    states = np.array([*map(state_of, kv_chain(answer.request.prompt.tolist()))])
    return (states[-1] if pooling.method == "last" else states.mean(0)).astype(np.float32).tolist()


def assert_right(client: Client, pooling: PoolingInfo) -> None:
    for answer in client.answers.values():
        assert answer.vector == right(answer, pooling)
        assert (answer.tokens, answer.reason) == ([], FinishReason("length"))
        assert answer.prompt is not None


def preempt_now_and_then(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pages be short at random. They never are by themselves: a prompt is computed after the one before it, and has room."""
    scheduler, rng = core.scheduler, np.random.default_rng(1)

    def short_rank(rows: np.ndarray, need: np.ndarray) -> int | None:
        return int(rng.choice(scheduler.table.rank[rows])) if len(rows) and rng.random() < 0.3 else None

    monkeypatch.setattr(scheduler._pages, "short_rank", short_rank)


@pytest.mark.parametrize(("pooling", "overlap", "ranks"), WAYS)
def test_vectors_are_right_in_chunks_and_batches_and_after_preemptions(
    monkeypatch: pytest.MonkeyPatch, pooling: PoolingInfo, overlap: bool, ranks: int
) -> None:
    core = make_core(
        pooling=pooling, overlap=overlap, ranks=ranks, num_usable_pages=16, rows=4, step_tokens=7, context_length=64
    )
    preempt_now_and_then(core, monkeypatch)
    client = Client(core)
    for key, prompt in enumerate(prompts(60), 1):
        client.submit(key, prompt, max_tokens=0)
        if key % 4 == 0:
            client.step()
    client.run(5000)
    assert_right(client, pooling)
    assert client.stats[-1].preemptions > 0
    cached = [answer.prompt.num_cached_tokens for answer in client.answers.values() if answer.prompt]
    assert any(cached) == (pooling is LAST)


@pytest.mark.parametrize(("pooling", "overlap"), [(LAST, True), (MEAN, True), (MEAN, False)])
def test_a_prompt_that_fills_context_and_pool_is_computed_once(pooling: PoolingInfo, overlap: bool) -> None:
    core = make_core(pooling=pooling, overlap=overlap, num_usable_pages=16, rows=2, step_tokens=64, context_length=64)
    client = Client(core)
    client.submit(1, list(range(1, 65)), max_tokens=0)
    client.run(4)
    assert_right(client, pooling)
    assert sum(plan.num_tokens for plan in core.runner.plans) == 64


def test_prompts_of_the_same_tokens_need_not_wait_for_one_another_where_all_are_computed() -> None:
    core = make_core(pooling=MEAN, rows=4, step_tokens=64)
    client = Client(core)
    for key in range(1, 5):
        client.submit(key, [7, 8, 9, 10, 11, 12], max_tokens=0)
    client.step()
    assert core.runner.plans[0].num_tokens == 24
    client.run()
    assert_right(client, MEAN)
    client.submit(5, [7, 8, 9, 10, 11, 12], max_tokens=0)  # its pages are cached, and are not computed by others
    client.run()
    assert_right(client, MEAN)


@pytest.mark.parametrize("overlap", [True, False])
def test_an_aborted_request_leaves_nothing_behind(overlap: bool) -> None:
    core = make_core(pooling=MEAN, overlap=overlap, rows=4, step_tokens=4)
    client = Client(core)
    client.submit(1, list(range(1, 30)), max_tokens=0)
    client.submit(2, list(range(1, 8)), max_tokens=0)
    for _ in range(3):
        client.step()
    core.handle(Abort([1]))
    client.run()
    assert client.answers[1].reason == FinishReason("abort")
    assert client.answers[1].vector is None
    del client.answers[1]
    assert_right(client, MEAN)
    assert isinstance(core.pooler, Pooler)
    assert core.pooler._sums == {}


def test_a_head_scales_and_caps_as_the_model_s_own() -> None:
    hidden, rows = np.array([1, 2], np.float32), np.array([[1, 1], [0, -3]], np.float32)
    np.testing.assert_allclose(Head(rows)(hidden), [3, -6])
    np.testing.assert_allclose(Head(rows, 0.5, 2.0)(hidden), 2 * np.tanh([0.75, -1.5]), rtol=1e-6)
