"""Tests of the plan vector: unpacking returns what was packed, and every plan fits its bucket."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.layout import PlanLayout, param_of
from sgl_jax.step_plan import Param, StepPlan


def random_plan(rng: np.random.Generator, num_new: list[int], num_updates: int) -> StepPlan:
    n = len(num_new)

    def ints(*shape: int) -> np.ndarray:
        return rng.integers(-(2**31), 2**31, shape, dtype=np.int32)

    return StepPlan.of(
        np.array(num_new, np.int32),
        rows=rng.permutation(64)[:n].astype(np.int32),
        start=ints(n),
        samples=rng.random(n) < 0.5,
        from_device=rng.random(n) < 0.5,
        next_token=ints(n),
        tokens=ints(sum(num_new)),
        params=ints(n, len(Param)),
        page_updates=ints(3, num_updates),
    )


@pytest.mark.parametrize(
    ("num_new", "num_updates"),
    [([], 0), ([1], 0), ([1, 1, 5], 2), ([1] * 8, 8), ([16], 4), ([1, 1, 1, 1, 1, 1, 1, 9], 10)],
)
def test_what_is_packed_is_unpacked_and_the_rest_is_padding(num_new: list[int], num_updates: int) -> None:
    layout = PlanLayout(Bucket(16, 8), page_size=4, spare_row=77)
    plan = random_plan(np.random.default_rng(0), num_new, num_updates)
    vector = layout.pack(plan)
    assert (vector.shape, vector.dtype) == ((layout.size,), np.int32)
    inputs = layout.unpack(jnp.asarray(vector))
    n = len(num_new)
    assert inputs.num_short == plan.num_short == sum(n == 1 for n in num_new)
    for name in ("rows", "start", "num_new", "samples", "from_device", "next_token", "params"):
        np.testing.assert_array_equal(getattr(inputs, name)[:n], getattr(plan, name), err_msg=name)
    np.testing.assert_array_equal(inputs.tokens[: plan.num_tokens], plan.tokens)
    np.testing.assert_array_equal(inputs.page_updates[:, :num_updates], plan.page_updates)
    assert (inputs.rows[n:] == 77).all()
    assert (inputs.page_updates[0, num_updates:] == 77).all()
    assert not inputs.num_new[n:].any()
    assert not inputs.samples[n:].any()
    assert not inputs.from_device[n:].any()
    assert not inputs.params[n:].any()


def test_floats_and_unsigned_numbers_keep_their_bits() -> None:
    layout = PlanLayout(Bucket(4, 4), page_size=4, spare_row=9)
    floats = np.array([0.1, -0.0, 1e-40, 3.4e38, np.inf, 1.5], np.float32)
    plan = random_plan(np.random.default_rng(0), [1, 1], 0)
    params = plan.params.copy()
    params[1, Param.TEMPERATURE :] = floats.view(np.int32)
    params[1, Param.SEED] = np.uint32(2**32 - 3).view(np.int32)
    inputs = layout.unpack(jnp.asarray(layout.pack(dataclasses.replace(plan, params=params))))
    columns = list(Param)[Param.TEMPERATURE :]
    got = np.array([np.asarray(param_of(inputs.params, column))[1] for column in columns], np.float32)
    assert got.view(np.int32).tolist() == floats.view(np.int32).tolist()
    assert np.asarray(param_of(inputs.params, Param.SEED)).astype(np.uint32)[1] == 2**32 - 3


def test_each_vector_is_a_new_one() -> None:
    layout = PlanLayout(Bucket(4, 4), page_size=4, spare_row=9)
    plans = [random_plan(np.random.default_rng(i), [1, 2], 1) for i in range(2)]
    first = layout.pack(plans[0])
    before = first.copy()
    layout.pack(plans[1])
    np.testing.assert_array_equal(first, before)


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(
    page_size=st.sampled_from([1, 2, 16, 128]),
    rows=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40), st.booleans()), min_size=1, max_size=8),
    lookahead=st.sampled_from([0, 1, 7]),
)
def test_no_step_needs_more_page_updates_than_its_bucket_holds(
    page_size: int, rows: list[tuple[int, int, bool]], lookahead: int
) -> None:
    """Rows are (start, num_new, is_new). New rows have pages for `start` tokens, others for the lookahead, too. In the worst
    case each row's first token begins a page."""
    num_tokens = sum(n for _, n, _ in rows)
    layout = PlanLayout(Bucket(num_tokens, len(rows)), page_size, spare_row=9, lookahead=lookahead)
    had = [-(-(start + lookahead * (not is_new)) // page_size) for start, _, is_new in rows]
    needed = sum(
        -(-(start + n + lookahead) // page_size) - pages for (start, n, _), pages in zip(rows, had, strict=True)
    )
    layout.pack(random_plan(np.random.default_rng(0), [n for _, n, _ in rows], needed))


def test_the_worst_case_of_page_updates_is_reached() -> None:
    """Eight rows end at a page's end, and one of them computes 9 tokens in pages of 4."""
    layout = PlanLayout(Bucket(16, 8), page_size=4, spare_row=9)
    num_new = [1] * 7 + [9]
    needed = 7 + 3
    assert layout.shapes["page_updates"] == (3, 12)
    layout.pack(random_plan(np.random.default_rng(0), num_new, needed))
    with pytest.raises(ValueError, match="could not broadcast"):
        layout.pack(random_plan(np.random.default_rng(0), num_new, 13))
