"""Parts of a batch, computed one after the other, against the whole."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from sgl_jax.ops.attention.api import AttentionLayer, AttentionSpec, batch_part, make_ragged_batch
from sgl_jax.ops.attention.reference import paged_attention

TOKENS, PAGE, PAGES = 64, 4, 120
# New tokens of each row and tokens before them; the first rows are short.
BATCHES = {
    "a row across all parts": ([1, 60], [5, 9], 1),
    "rows that end where a part ends": ([1, 1, 14, 16, 32], [3, 0, 2, 0, 1], 2),
    "short rows alone": ([1, 1, 1], [3, 7, 20], 3),
    "rows and padding": ([1, 9, 21, 11, 0, 0], [8, 0, 5, 30, 0, 0], 1),
    "nothing": ([0, 0], [0, 0], 0),
}


@pytest.mark.parametrize("num_parts", [2, 4])
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_parts_one_after_the_other_give_the_whole(rows: tuple[list[int], list[int], int], num_parts: int) -> None:
    random = np.random.default_rng(0)
    num_new, start = (jnp.array(column, jnp.int32) for column in rows[:2])
    table = jnp.array(1 + np.arange(len(num_new) * 24).reshape(len(num_new), 24) % (PAGES - 1), jnp.int32)
    batch = make_ragged_batch(table, start, num_new, jnp.int32(rows[2]), TOKENS, PAGE)
    layer = AttentionLayer(AttentionSpec(scale=0.3), 0)
    q, k, v = (jnp.array(random.normal(size=(TOKENS, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    kv = jnp.array(random.normal(size=(PAGES, 2, 2, PAGE, 8)), jnp.float32)
    wanted, pool = paged_attention(q, k, v, kv, batch, layer)
    outs, size = [], TOKENS // num_parts
    for number in range(num_parts):
        part = batch_part(batch, number, num_parts)
        (own,) = np.nonzero(np.diff(part.cu_q_lens))
        assert [*own] == [*range(len(own))], "rows without tokens come last"
        assert part.has_short or part.num_short == 0
        mine = slice(number * size, (number + 1) * size)
        out, kv = paged_attention(q[mine], k[mine], v[mine], kv, part, layer)
        outs.append(out)
    used = int(num_new.sum())
    np.testing.assert_allclose(np.concatenate(outs)[:used], wanted[:used], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(kv[1:], pool[1:])  # page 0 takes padding
