"""The fa kernels in interpret mode, where a race, a read of unwritten memory and a wrong byte are errors.

`--fa-examples N` runs more random batches.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import BLOCKS, EAGER, RACES, arguments, defined, interpreted, random_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from sgl_jax.ops.attention import native, reference
from sgl_jax.ops.attention.api import AttentionLayer, AttentionSpec, QKPrepare, make_ragged_batch, to_pool
from sgl_jax.ops.attention.fa import call as fa
from sgl_jax.ops.attention.fa import decode
from sgl_jax.ops.attention.fa.ring import PageRing

TOKENS, ROWS = 96, 8
SPEC = AttentionSpec(0.25)


@functools.cache
def compiled(params=RACES, blocks=BLOCKS):
    return jax.jit(functools.partial(interpreted, params=params, blocks=blocks))


def rounded(b, dtype):
    """Round the numbers of a batch to the dtype."""
    return b | {name: jnp.asarray(b[name]).astype(dtype) for name in ("q", "k", "v", "kv") if b[name] is not None}


def check(
    b, dtype=jnp.float32, params=RACES, atol=1e-5, spec=SPEC, num_short=None, blocks=BLOCKS, has_short=True, **arrays
):
    """Compare outputs with the reference, within atol, zeros for padding, and every byte of the pool."""
    *given, batch, layer = arguments(rounded(b, dtype), spec, num_short, **arrays)
    given += [dataclasses.replace(batch, has_short=has_short), layer]
    out, kv = compiled(params, blocks)(*given)
    expected, expected_kv = reference.paged_attention(*given)
    n = b["num_new"].sum()
    out, mine = np.asarray(out, np.float32), defined(*given[4:], n)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[:n][mine], expected[:n][mine], atol=atol)
    np.testing.assert_array_equal(out[n:], 0)
    np.testing.assert_array_equal(np.asarray(kv, np.float32), expected_kv.astype(np.float32))


@dataclasses.dataclass(frozen=True)
class Rows:
    width: int  # W
    short: list[tuple[int, int]]  # (start, num_new), of at most W tokens
    chunks: list[tuple[int, int]]

    def check(self, make, dtype=jnp.float32, params=RACES, value_dim=None, **options):
        spec = AttentionSpec(0.25, value_dim=value_dim, width=self.width)
        b = make(self.short + self.chunks)
        check(b, dtype, params, spec=spec, num_short=len(self.short), **options)


@st.composite
def ragged_rows(draw, widths=(1, 2, 4), tokens=TOKENS, rows=ROWS, longest=200):
    """Draw some short rows, ragged up to W tokens, then some chunks, which fit the tokens."""
    width = draw(st.sampled_from(widths))
    numbers = draw(st.lists(st.integers(1, width), max_size=rows))
    short = [(draw(st.integers(0, longest - n)), n) for n in numbers]
    chunks, left = [], tokens - sum(numbers)
    for start in draw(st.lists(st.integers(0, longest - 2), max_size=min(4, rows - len(short)))):
        if left < 2:
            break
        chunks.append((start, draw(st.integers(2, min(left, longest - start)))))
        left -= chunks[-1][1]
    return Rows(width, short, chunks)


def batch_of(rows, seed=0, *, num_heads=4, num_kv_heads=2, head_dim=16, page_size=16, num_tokens=TOKENS):
    sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "page_size": page_size}
    b = random_batch(np.random.default_rng(seed), rows, **sizes, num_tokens=num_tokens, num_rows=ROWS)
    spare = -len(b["kv"]) % 256
    b["kv"] = np.concatenate([b["kv"], np.full((spare, *b["kv"].shape[1:]), 7, np.float32)])
    return b


def examples(request) -> int:
    return request.config.getoption("--fa-examples")


def test_random_batches_with_windows_match_reference_without_a_race(request):
    @settings(max_examples=examples(request), deadline=None, derandomize=True, database=None)
    @given(rows=ragged_rows(), window=st.sampled_from([1, 15, 16, 17, 64, 100, 1 << 30]), seed=st.integers(0, 99))
    def run(rows, window, seed):
        rows.check(lambda each: batch_of(each, seed), window=window)

    run()


def test_random_bfloat16_batches_with_eager_copies_match_reference(request):
    @settings(max_examples=examples(request), deadline=None, derandomize=True, database=None)
    @given(rows=ragged_rows(), seed=st.integers(0, 99))
    def run(rows, seed):
        sizes = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 8, "page_size": 32}
        rows.check(lambda each: batch_of(each, seed, **sizes), jnp.bfloat16, EAGER, atol=0.03)

    run()


@pytest.mark.parametrize("has_short", [True, False])
@pytest.mark.parametrize("width", [1, 4])
def test_a_chunk_may_have_as_few_tokens_as_a_short_row(width, has_short):
    """A part of a step begins and ends anywhere in a row, and all but the first have no short rows."""
    rows = [(5, 1), (0, 3), (40, 1), (16, 30), (99, 2), (0, 1)]
    check(batch_of(rows), spec=AttentionSpec(0.25, width=width), num_short=0, window=64, has_short=has_short)


@pytest.mark.parametrize("rows", [[], [(7, 1), (0, 30)]])
def test_a_part_without_short_rows_over_a_latent_pool_has_zeros_for_its_padding(rows):
    check(latent_batch(rows), atol=1e-4, spec=AttentionSpec(0.25, value_dim=128), num_short=0, has_short=False)


def latent_batch(rows, seed=0, *, num_heads=8, head_dim=144, page_size=16, num_tokens=TOKENS):
    """Make a batch with a pool of one plane, whose keys have two lane tiles and whose values are fewer."""
    b = batch_of(
        rows, seed, num_heads=num_heads, num_kv_heads=1, head_dim=head_dim, page_size=page_size, num_tokens=num_tokens
    )
    return b | {"kv": b["kv"][:, :, :1], "v": None}


def test_random_batches_over_a_latent_pool_match_reference_without_a_race(request):
    @settings(max_examples=examples(request), deadline=None, derandomize=True, database=None)
    @given(rows=ragged_rows(), window=st.sampled_from([1, 16, 17, 100, 1 << 30]), seed=st.integers(0, 99))
    def run(rows, window, seed):
        rows.check(lambda each: latent_batch(each, seed), window=window, atol=1e-4, value_dim=128)

    run()


@pytest.mark.parametrize(("num_heads", "value_dim"), [(48, 130), (5, 24)])
def test_any_number_of_heads_reads_one_latent_vector_in_bfloat16(num_heads, value_dim, monkeypatch):
    """Cases: more heads than a product and a turn take, and fewer than a tile has rows."""
    monkeypatch.setattr(decode, "PART_HEADS", 24)
    b = latent_batch([(70, 1), (15, 1), (3, 29)], num_heads=num_heads, num_tokens=32)
    check(b, jnp.bfloat16, atol=0.05, spec=AttentionSpec(0.25, softcap=20.0, value_dim=value_dim))


def test_latent_rows_beyond_what_vmem_holds_are_served_in_turn():
    rows = [*((7 * i, 1) for i in range(20)), (9, 12)]
    sizes = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 40, "page_size": 16, "num_tokens": 64, "num_rows": 24}
    b = random_batch(np.random.default_rng(0), rows, **sizes)
    b |= {"kv": b["kv"][:, :, :1], "v": None}
    blocks = dataclasses.replace(BLOCKS[0], max_tokens=16), BLOCKS[1]
    check(b, blocks=blocks, spec=AttentionSpec(0.25, value_dim=24))


@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)])
def test_products_of_many_queries_over_several_blocks_with_sinks(dtype, atol):
    """256 queries of one KV head, so that their sums come out of the product with V; a turn has both KV heads."""
    b = batch_of([(70, 1), (150, 29), (3, 40)], num_heads=16, num_tokens=96)
    sinks = np.linspace(-2, 8, 16).astype(np.float32)
    check(b, dtype, atol=atol, spec=AttentionSpec(0.25, 3.0, 8), sinks=sinks)


def test_scores_grow_with_the_position_of_the_query():
    b = batch_of([(0, 1), (190, 1), (3, 40)])
    check(b, spec=AttentionSpec(0.25, temperature_length=8))


STRADDLING = [(14, 4), (62, 3), (127, 4), (190, 1), (0, 4), (61, 3), (15, 2)]  # borders of tiles, pages and blocks


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_short_rows_straddle_borders_with_every_option(dtype):
    """New tokens on both sides of a border of a row tile (8 or 16), a page (16) or a block (64), and a chunk after them."""
    b = batch_of([*STRADDLING, (60, 7)], num_heads=6, num_tokens=32)
    sinks = np.linspace(-2, 8, 6).astype(np.float32)
    spec = AttentionSpec(0.25, 3.0, 8, width=4)
    check(b, dtype, atol=1e-5 if dtype == jnp.float32 else 0.03, spec=spec, num_short=7, sinks=sinks, window=37)


@pytest.mark.parametrize("window", [None, 20])
def test_a_short_row_s_pages_are_read_once_for_all_its_queries(monkeypatch, window):
    read = []

    def announce(self, n, row, block, first, end):
        jax.debug.callback(lambda *item: read.append([int(x) for x in item]), row, first, end)
        announced(self, n, row, block, first, end)

    announced = PageRing.announce
    monkeypatch.setattr(PageRing, "announce", announce)
    b = batch_of(STRADDLING, num_tokens=32)
    given = arguments(b, AttentionSpec(0.25, width=4), num_short=7, window=window)
    jax.block_until_ready(jax.jit(functools.partial(interpreted, params=EAGER))(*given))
    jax.effects_barrier()
    pages = [[row, page] for row, first, end in read for page in range(first, end)]
    lowest = [0 if window is None else max(start + 1 - window, 0) // 16 for start, _ in STRADDLING]
    expected = [[i, page] for i, (s, n) in enumerate(STRADDLING) for page in range(lowest[i], -(-(s + n) // 16))]
    assert sorted(pages) == expected


@pytest.mark.parametrize(
    ("first_key", "width", "window", "sinks"),
    [(1, 1, None, True), (1, 4, None, False), (70, 4, 100, True), (130, 1, None, False)],
)
def test_keys_before_the_first_one_are_not_seen(first_key, width, window, sinks):
    """Blocks have 64 keys: the first key is in the first, second or third one of a row, or behind all of its tokens."""
    short = [(14, 4), (63, 3), (127, 4), (190, 1), (0, 4), (first_key, 4)]
    rows = short if width > 1 else [(start, 1) for start, _ in short]
    b = batch_of([*rows, (first_key - 1, 20), (0, 40)])
    spec = AttentionSpec(0.25, width=width, first_key=first_key)
    arrays = {"window": window} if window else {}
    arrays |= {"sinks": np.array([0.5, -1, 2, 8], np.float32)} if sinks else {}
    check(b, spec=spec, num_short=len(rows), **arrays)


def test_keys_before_the_first_one_of_a_latent_pool_are_not_seen():
    b = latent_batch([(0, 1), (70, 1), (1, 1), (0, 29)], num_heads=5, num_tokens=32)
    check(b, jnp.bfloat16, atol=0.05, spec=AttentionSpec(0.25, value_dim=24, first_key=1))


def test_short_rows_that_fill_whole_tiles_and_blocks():
    b = batch_of([(60, 4), (124, 4), (0, 1), (63, 1), (64, 4)], num_tokens=16)
    check(b, spec=AttentionSpec(0.25, width=4), num_short=5)


@pytest.mark.parametrize(("width", "fused"), [(4, False), (4, True), (3, False)])
def test_short_rows_beyond_what_vmem_holds_are_served_in_turn(width, fused):
    """10 rows are served 4 or 5 at a time; their tokens begin anywhere."""
    rows = [(7 * i, 1 + i % width) for i in range(10)]
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 128, "page_size": 16, "num_tokens": 64, "num_rows": 12}
    b = random_batch(np.random.default_rng(0), [*rows, (9, 20)], **sizes)
    blocks = dataclasses.replace(BLOCKS[0], max_tokens=16), BLOCKS[1]
    spec = AttentionSpec(0.25, width=width)
    if fused:
        same_fused(b, jnp.float32, blocks, spec, num_short=10)
    else:
        check(b, blocks=blocks, spec=spec, num_short=10)


@pytest.mark.parametrize(("num_heads", "value_dim"), [(48, 130), (5, 24)])
def test_short_rows_over_a_latent_pool_in_bfloat16(num_heads, value_dim, monkeypatch):
    """Cases: more heads than a product takes of 4 queries, and fewer than a tile has lines."""
    monkeypatch.setattr(decode, "PART_HEADS", 96)
    b = latent_batch([(61, 4), (15, 2), (3, 1), (3, 19)], num_heads=num_heads, num_tokens=32)
    spec = AttentionSpec(0.25, softcap=20.0, value_dim=value_dim, width=4)
    check(b, jnp.bfloat16, atol=0.05, spec=spec, num_short=3)


def test_chunks_leave_what_decode_has_set_and_clear_the_rest():
    """The decode kernel sets the first 16 lines for 8 rows; tiles have 32."""
    check(batch_of([(i, 1) for i in range(3)], num_tokens=64))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("attention", [functools.partial(interpreted, params=RACES), native.paged_attention])
def test_eight_bit_pools_hold_scaled_values_and_are_read_back(attention, dtype):
    rows = [(40, 1), (63, 1), (3, 40)]
    b = batch_of(rows, page_size=32, num_tokens=64)
    scales = np.array([[0.5, 2], [0.02, 0.03]], np.float32)  # one line for each of two layers; the second is used
    b["kv"] = to_pool(jnp.asarray(b["kv"]).reshape(len(b["kv"]), -1, 16), dtype, 0.03).reshape(b["kv"].shape)
    given = arguments(b, SPEC, kv_scales=scales[1])
    out, pool = jax.jit(attention)(*given)
    expected, expected_pool = reference.paged_attention(*given)
    assert pool.dtype == dtype
    mine = np.arange(len(pool)) != b["first_page"]  # the scratch page
    np.testing.assert_array_equal(np.asarray(pool, np.float32)[mine], expected_pool[mine])
    np.testing.assert_allclose(np.asarray(out)[:42], expected[:42], atol=0.03)


def test_values_beyond_an_eight_bit_pool_are_cut_off():
    x = jnp.array([[[-1000.0, -1.26, 0.0, 1.26, 1000.0]]])
    np.testing.assert_array_equal(to_pool(x, jnp.int8, 0.5)[0, 0], [-127, -3, 0, 3, 127])
    np.testing.assert_array_equal(
        to_pool(x, jnp.float8_e4m3fn, 0.5)[0, 0].astype(jnp.float32), [-448, -2.5, 0, 2.5, 448]
    )
    np.testing.assert_array_equal(to_pool(x, jnp.float32, 1.0), x)


def test_decode_with_softcap_and_sinks_over_page_and_block_boundaries():
    rows = [(length - 1, 1) for length in (1, 16, 17, 64, 65, 128, 129, 200)]
    b = batch_of(rows, num_tokens=16)
    sinks = np.array([0.5, -1, 2, 8], np.float32)
    check(b, spec=AttentionSpec(0.25, 3.0), sinks=sinks)


def test_rows_beyond_what_vmem_holds_are_served_in_turn():
    """20 rows are served 16 at a time; then the chunks."""
    rows = [*((7 * i, 1) for i in range(20)), (9, 12), (60, 30)]
    sizes = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "page_size": 16, "num_tokens": 64, "num_rows": 24}
    b = random_batch(np.random.default_rng(0), rows, **sizes)
    blocks = dataclasses.replace(BLOCKS[0], max_tokens=16), BLOCKS[1]
    check(b, blocks=blocks)


def test_norm_and_rotation_inside_on_heads_of_two_lane_tiles_with_a_window():
    b = batch_of([(30, 1), (3, 40), (64, 20)], num_heads=2, num_kv_heads=2, head_dim=256)
    rng = np.random.default_rng(1)
    angles = rng.uniform(0, 6, (TOKENS, 128))
    rope = jnp.asarray(np.concatenate([np.cos(angles), np.sin(angles)], 1), jnp.float32)
    prepare = QKPrepare(*jnp.asarray(rng.uniform(0.5, 2, (2, 256)), jnp.float32), rope)
    q, k, v, kv, batch, layer = arguments(b, SPEC, num_short=1, window=50)
    out, new = compiled()(q, k, v, kv, batch, dataclasses.replace(layer, prepare=prepare))
    expected, expected_kv = reference.paged_attention(*prepare(q, k), v, kv, batch, layer)
    np.testing.assert_allclose(np.asarray(out)[:61], expected[:61], atol=1e-4)
    np.testing.assert_allclose(np.asarray(new), expected_kv, atol=1e-5)


def same_fused(b, dtype, blocks, spec=SPEC, num_short=None, **arrays):
    """Check that fused q, k and v give the same as apart, bit by bit."""
    b = b if dtype is None else rounded(b, dtype)
    fused = b | {"q": jnp.concatenate([b["q"], b["k"], b["v"]], axis=1), "k": None, "v": None}
    results = [compiled(blocks=blocks)(*arguments(each, spec, num_short, **arrays)) for each in (b, fused)]
    for apart, joined in zip(*results, strict=True):
        np.testing.assert_array_equal(np.asarray(joined, np.float32), np.asarray(apart, np.float32))


@pytest.mark.parametrize(("heads", "head_dim", "dtype"), [((4, 2), 128, jnp.bfloat16), ((3, 1), 256, jnp.float32)])
def test_q_k_and_v_side_by_side_give_the_same_as_apart(heads, head_dim, dtype):
    b = batch_of([(70, 1), (15, 1), (3, 29), (40, 30)], num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim)
    rng = np.random.default_rng(1)
    rope = jnp.asarray(rng.uniform(-1, 1, (TOKENS, head_dim)), jnp.float32)
    prepare = QKPrepare(*jnp.asarray(rng.uniform(0.5, 2, (2, head_dim)), jnp.float32), rope)
    same_fused(b, dtype, BLOCKS, prepare=prepare, window=50)


def test_side_by_side_rows_beyond_what_vmem_holds_are_served_in_turn():
    rows = [*((7 * i, 1) for i in range(20)), (9, 12)]
    sizes = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "page_size": 16, "num_tokens": 64, "num_rows": 24}
    b = random_batch(np.random.default_rng(0), rows, **sizes)
    blocks = dataclasses.replace(BLOCKS[0], max_tokens=16), BLOCKS[1]
    same_fused(b, jnp.float32, blocks)


def test_heads_that_need_padding_and_eight_bit_pools_take_the_three_apart():
    b = batch_of([(20, 1), (3, 40)])  # heads of 16
    same_fused(b, jnp.float32, BLOCKS)
    b = batch_of([(20, 1), (3, 40)], head_dim=128, page_size=32)
    b["kv"] = jnp.asarray(b["kv"]).astype(jnp.float8_e4m3fn)
    same_fused(b, None, BLOCKS, kv_scales=jnp.array([0.02, 0.03]))


def test_rows_share_the_pages_of_a_prefix():
    rows = [(70, 1), (65, 1), (64, 30), (64, 2)]
    b = batch_of(rows)
    b["page_table"][:4, :4] = b["page_table"][0, :4]
    check(b, window=1 << 30)


def test_what_no_row_owns_may_be_nan():
    """Stale pages, the rest of a row's last page and the scratch page hold anything."""
    rows = [(20, 1), (3, 40)]
    b = batch_of(rows)
    owned = np.zeros(b["kv"].shape[:1] + b["kv"].shape[3:4], bool)
    for row, (start, num_new) in enumerate(rows):
        for position in range(start + num_new):
            owned[b["first_page"] + b["page_table"][row, position // 16], position % 16] = True
    b["kv"] = np.where(owned[:, None, None, :, None], b["kv"], np.nan).astype(np.float32)
    check(b, window=1 << 30)


def test_the_race_detector_sees_a_missing_wait(monkeypatch):
    monkeypatch.setattr(PageRing, "wait", lambda self, n: n % self.slots)
    params = dataclasses.replace(
        RACES, dma_execution_mode="eager"
    )  # the copy is done at once, and the read is a race all the same
    with pytest.raises(Exception, match=r"(?i)race"):
        check(batch_of([(20, 1), (40, 1)]), params=params)
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ((9, 2, 2, 16, 64), "128 .*64.* 64"),
        ((9, 2, 2, 20, 128), "--page-size.* 20"),
    ],
)
def test_pools_it_cannot_use_are_refused(pool, message):
    b = batch_of([(3, 1)], head_dim=64)
    q, k, v, *rows = (jnp.asarray(b[name]) for name in ("q", "k", "v", "page_table", "start", "num_new"))
    batch = make_ragged_batch(*rows, jnp.int32(1), TOKENS, pool[3])
    with pytest.raises(ValueError, match=message):
        fa.paged_attention(q, k, v, jnp.zeros(pool), batch, AttentionLayer(SPEC, 0), blocks=BLOCKS)
