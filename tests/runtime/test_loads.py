"""Tests of row loads: a row gets the state it needs and no other, in one dispatch for each kind and step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgl_jax.parallel.grid import ONE_DEVICE
from sgl_jax.request import Request, SamplingParams
from sgl_jax.runtime.device_state import BIAS_WIDTH, IN_PROMPT, DeviceState, StateSizes, initial_state
from sgl_jax.runtime.loads import LOADS, LoadLayout, pack_loads
from sgl_jax.step_plan import RowLoad

NUM_ROWS, PAGES, VOCAB_SIZE = 200, 300, 50
SIZES = StateSizes(NUM_ROWS, PAGES, VOCAB_SIZE, num_tokens=20, takes_grammars=True)
LAYOUTS = {kind.name: LoadLayout(kind, NUM_ROWS, kind.size(SIZES)) for kind in LOADS}
WITHOUT_TOKENS = [layout for name, layout in LAYOUTS.items() if name != "tokens"]  # a launch without n-grams


def asked(prompt: list[int], output: list[int] | None = None, stops: list[int] | None = None, **params) -> Request:
    request = Request(
        key=0,
        prompt=np.array(prompt, np.int32),
        params=SamplingParams(**params),
        namespace="",
        seed=0,
        max_total_tokens=100,
        stop_token_ids=np.array(stops or [], np.int32),
        arrival=0,
    )
    request.tokens = np.array([*prompt, *(output or [])], np.int32)
    return request


def loaded(loads: list[RowLoad], layouts: Sequence[LoadLayout] = WITHOUT_TOKENS) -> tuple[list[str], DeviceState]:
    """Run the loads on a state without zeros. Return the names of the programs and the new state."""
    state = jax.tree.map(lambda x: (x + 7).astype(x.dtype), initial_state(SIZES))
    names = []
    for program, vector in pack_loads(layouts, loads):
        names.append(program)
        layout = LAYOUTS[program.removeprefix("load ")]
        assert (vector.shape, vector.dtype) == ((layout.size,), np.int32)
        state = layout.run(state, jnp.asarray(vector), axis=ONE_DEVICE)
    return names, state


def test_ngrams_are_looked_up_in_all_tokens_that_the_host_knows() -> None:
    request = asked([4, 5, 6], output=[7, 8])
    names, state = loaded([RowLoad(3, None, request), RowLoad(4, None, None)], [LAYOUTS["tokens"]])
    assert names == ["load tokens"]
    assert np.asarray(state.tokens)[3].tolist() == [4, 5, 6, 7, 8, *[0] * 15]
    assert (np.asarray(state.tokens)[[2, 4]] == 7).all()


def test_a_hundred_prefix_hits_are_one_dispatch() -> None:
    pages = [np.arange(1, 2 + row % 40, dtype=np.int32) for row in range(100)]
    names, state = loaded([RowLoad(row, of_row, None) for row, of_row in enumerate(pages)])
    assert names == ["load pages"]
    for row, of_row in enumerate(pages):
        assert np.asarray(state.page_table)[row].tolist() == [*of_row.tolist(), *[0] * (300 - len(of_row))]
    assert (np.asarray(state.page_table)[100:] == 7).all()


def test_more_rows_than_a_vector_holds_take_as_few_dispatches_as_hold_them() -> None:
    capacity = LAYOUTS["bias"].capacity
    assert 1 < capacity < 20
    loads = [RowLoad(row, None, asked([1], logit_bias={row: 2.0})) for row in range(2 * capacity + 1)]
    names, state = loaded(loads)
    assert names == ["load bias"] * 3
    assert np.asarray(state.bias_ids)[: len(loads), 0].tolist() == [*range(len(loads))]


def test_exactly_a_vector_of_rows_is_one_dispatch() -> None:
    capacity = LAYOUTS["bias"].capacity
    names, _ = loaded([RowLoad(row, None, asked([1], min_tokens=1)) for row in range(capacity)])
    assert names == ["load bias"]


def test_a_mask_is_loaded_as_far_as_the_model_has_tokens() -> None:
    masks = [np.array([1, -2], np.int32), np.array([3, 4, 5], np.int32)]  # the tokenizer may have more
    names, state = loaded([RowLoad(row, None, None, mask) for row, mask in enumerate(masks, 6)])
    assert names == ["load mask"]
    allowed = [np.flatnonzero(row).tolist() for row in np.asarray(state.grammar_mask)[5:9]]
    assert allowed == [[*range(50)], [0, *range(33, 50)], [0, 1, 34], [*range(50)]]


def test_a_row_is_loaded_with_what_it_needs_and_nothing_else() -> None:
    loads = [
        RowLoad(1, np.array([5], np.int32), None),
        RowLoad(3, None, asked([1, 2, 2], [4, 4, 1], frequency_penalty=0.5)),
        RowLoad(4, None, asked([9], stops=[6, 8], logit_bias={3: -1.5}, min_tokens=2)),
        RowLoad(5, None, asked([9])),
    ]
    names, state = loaded(loads)
    assert names == ["load pages", "load counts", "load bias"]
    counts = np.zeros(50, np.int32)
    counts[[1, 2, 4]] = [1 | IN_PROMPT, IN_PROMPT, 2]
    assert np.asarray(state.token_counts)[3].tolist() == counts.tolist()
    ids, values, until = (np.asarray(x)[4] for x in (state.bias_ids, state.bias_values, state.bias_until))
    assert ids[:4].tolist() == [3, 6, 8, 0]
    assert values[:4].tolist() == [-1.5, -np.inf, -np.inf, 0.0]
    assert until[:4].tolist() == [2**31 - 1, 3, 3, 0]
    assert (len(ids), not ids[3:].any()) == (BIAS_WIDTH, True)
    untouched = {"page_table": [1], "token_counts": [3], "bias_ids": [4]}
    for name, rows in untouched.items():
        others = np.delete(np.asarray(getattr(state, name)), rows, axis=0)
        assert (others == 7).all()


@pytest.mark.parametrize("kind", LOADS, ids=lambda kind: kind.name)
def test_an_empty_vector_changes_nothing(kind) -> None:
    layout = LAYOUTS[kind.name]
    state = initial_state(SIZES)
    after = layout.run(state, jnp.asarray(layout.empty()), axis=ONE_DEVICE)
    for field in dataclasses.fields(state):
        np.testing.assert_array_equal(getattr(state, field.name), getattr(after, field.name))
