"""One test body for every implementation of the attention contract, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgl_jax.ops.attention import native, reference
from sgl_jax.ops.attention.api import make_ragged_batch

IMPLEMENTATIONS = {
    "native": native.paged_attention,
    "native-vectorised": functools.partial(native.paged_attention, vectorise=True),
}


@pytest.fixture(params=IMPLEMENTATIONS)
def attention(request):
    return IMPLEMENTATIONS[request.param]


def random_batch(rng, rows, *, num_heads, num_kv_heads, head_dim, page_size, num_tokens, num_rows, layer=1):
    """rows: (start, num_new) with the single-token ones first. Pages are dealt at random."""
    pages_per_row = 12 * 16 // page_size + 8
    num_pages = 1 + sum(-(-(s + n) // page_size) for s, n in rows) + 3
    deal = iter(rng.permutation(np.arange(1, num_pages)))
    table = np.zeros((num_rows, pages_per_row), np.int32)
    for i, (s, n) in enumerate(rows):
        count = -(-(s + n) // page_size)
        table[i, :count] = [next(deal) for _ in range(count)]
    start = np.array([s for s, _ in rows] + [0] * (num_rows - len(rows)), np.int32)
    num_new = np.array([n for _, n in rows] + [0] * (num_rows - len(rows)), np.int32)
    return {
        "q": rng.standard_normal((num_tokens, num_heads, head_dim)).astype(np.float32),
        "k": rng.standard_normal((num_tokens, num_kv_heads, head_dim)).astype(np.float32),
        "v": rng.standard_normal((num_tokens, num_kv_heads, head_dim)).astype(np.float32),
        "kv": rng.standard_normal((2 * num_pages, num_kv_heads, 2, page_size, head_dim)).astype(np.float32),
        "page_table": table,
        "start": start,
        "num_new": num_new,
        "first_page": layer * num_pages,
    }


def run(attention, b, **options):
    batch = make_ragged_batch(
        jnp.asarray(b["page_table"]),
        jnp.asarray(b["start"]),
        jnp.asarray(b["num_new"]),
        jnp.int32((b["num_new"] == 1).sum()),
        len(b["q"]),
        b["kv"].shape[3],
    )
    options = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    call = jax.jit(functools.partial(attention, first_page=b["first_page"], **options))
    return call(b["q"], b["k"], b["v"], b["kv"], batch)


def check(attention, b, **options):
    out, kv = run(attention, b, **options)
    expected, expected_kv = reference.paged_attention(**b, **options)
    n = b["num_new"].sum()
    np.testing.assert_allclose(np.asarray(out)[:n], expected[:n], atol=2e-5)
    used = np.ones(len(expected_kv), bool)
    used[b["first_page"]] = False  # the scratch page
    np.testing.assert_allclose(np.asarray(kv)[used], expected_kv[used], atol=1e-6)


MIXED = [(0, 1), (40, 1), (5, 1), (0, 70), (33, 9), (100, 32)]


@pytest.mark.parametrize("page_size", [1, 16, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 20), (8, 1, 80)])
def test_mixed_batch_matches_reference(attention, page_size, num_heads, num_kv_heads, head_dim):
    b = random_batch(
        np.random.default_rng(0),
        MIXED,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        num_tokens=128,
        num_rows=8,
    )
    check(attention, b, scale=head_dim**-0.5)


@pytest.mark.parametrize("rows", [[(17, 1)], [(0, 1), (1, 1), (170, 1)], [(0, 33)], [(15, 2), (16, 2)]])
def test_batches_of_one_kind_match_reference(attention, rows):
    b = random_batch(
        np.random.default_rng(1),
        rows,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        page_size=16,
        num_tokens=64,
        num_rows=4,
    )
    check(attention, b, scale=0.25)


@pytest.mark.parametrize(
    "options", [{"window": 1}, {"window": 20}, {"softcap": 3.0}, {"sinks": np.array([0.5, -1, 2, 8], np.float32)}]
)
def test_window_softcap_and_sinks_match_reference(attention, options):
    b = random_batch(
        np.random.default_rng(2),
        MIXED,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        page_size=16,
        num_tokens=128,
        num_rows=6,
    )
    check(attention, b, scale=0.25, **options)


def test_empty_batch_leaves_the_pool_as_it_was(attention):
    b = random_batch(
        np.random.default_rng(3), [], num_heads=4, num_kv_heads=2, head_dim=16, page_size=16, num_tokens=4, num_rows=4
    )
    _, kv = run(attention, b, scale=0.25)
    used = np.arange(len(kv)) != b["first_page"]
    np.testing.assert_array_equal(np.asarray(kv)[used], b["kv"][used])
