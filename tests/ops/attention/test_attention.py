"""One test body for every implementation of the attention contract, against the reference."""

import dataclasses
import functools
import mmap
from pathlib import Path

import batches
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import defined, interpreted, random_batch

from sgl_jax.ops.attention import cpu, native, reference
from sgl_jax.ops.attention.api import AttentionSpec, QKPrepare
from sgl_jax.ops.cpu import library

SPEC_FIELDS = {field.name for field in dataclasses.fields(AttentionSpec)}
IMPLEMENTATIONS = {
    "native": native.paged_attention,
    "native-vectorised": functools.partial(native.paged_attention, vectorise=True),
    "fa": interpreted,
}


def compiled(name):
    """Return the attention of a compiled library, which is found when it first runs."""

    def attend(*arguments):
        built = library.usable(library.processor_flags())
        if name not in built:
            pytest.skip(f"the library {name} was not built, or this processor cannot run it")
        return cpu.paged_attention(*arguments, library=library.register(built[name]))

    return attend


PLAIN = ("native", "native-vectorised")
COMPILED = tuple(library.LIBRARIES)
IMPLEMENTATIONS |= {name: compiled(name) for name in COMPILED}


# Interpreting a kernel takes seconds, so fa runs only these cases of the mixed batch.
MIXED_FOR_FA = {(16, 9, 3, 64), (128, 8, 1, 80)}


@pytest.fixture(params=IMPLEMENTATIONS)
def attention(request):
    case = request.node.callspec.params
    if request.param == "fa" and "page_size" in case:
        shape = tuple(case[name] for name in ("page_size", "num_heads", "num_kv_heads", "head_dim"))
        if shape not in MIXED_FOR_FA:
            pytest.skip("not among the shapes that are interpreted")
    return IMPLEMENTATIONS[request.param]


def check(attention, b, *, num_short=None, atol=1e-6, prepare=None, **options):
    """Compare outputs and pool with the reference. `options` are fields of AttentionSpec, and arrays of AttentionLayer."""
    static = {name: options.pop(name) for name in SPEC_FIELDS & options.keys()}
    arguments = batches.arguments(b, AttentionSpec(**static), num_short, **options)
    *_, layer = arguments
    out, kv = jax.jit(attention)(*arguments[:-1], dataclasses.replace(layer, prepare=prepare))
    b = b if prepare is None else prepared(b, prepare)
    expected, expected_kv = reference.paged_attention(b["q"], b["k"], b["v"], b["kv"], *arguments[4:])
    n = b["num_new"].sum()
    assert np.isfinite(out[:n]).all()
    mine = defined(*arguments[4:], n)
    np.testing.assert_allclose(np.asarray(out)[:n][mine], expected[:n][mine], atol=2e-5)
    used = np.ones(len(expected_kv), bool)
    used[b["first_page"]] = False  # the scratch page
    np.testing.assert_allclose(np.asarray(kv)[used], expected_kv[used], atol=atol)


def prepared(b, prepare):
    """Norm and rotate q and k of the batch in numpy."""
    half = 0 if prepare.rope is None else prepare.rope.shape[1] // 2
    turn = 1 if prepare.rope is None else (np.asarray(prepare.rope) @ np.kron([[1], [1j]], np.eye(half)))[:, None]

    def one(x, weight):
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * np.asarray(weight)
        turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * turn
        return np.concatenate([turned.real, turned.imag, x[..., 2 * half :]], -1)

    return b | {"q": one(b["q"], prepare.q_norm), "k": one(b["k"], prepare.k_norm)}


MIXED = [(0, 1), (40, 1), (5, 1), (0, 70), (33, 9), (100, 32)]


@pytest.mark.parametrize("page_size", [256, 200])
@pytest.mark.parametrize("name", [*PLAIN, *COMPILED])
def test_pages_longer_than_a_turn_match_reference(name, page_size):
    rows = [(40, 1), (130, 1), (399, 1), (0, 20), (250, 9)]
    sizes = {"num_heads": 6, "num_kv_heads": 3, "head_dim": 16, "page_size": page_size}
    b = random_batch(np.random.default_rng(5), rows, **sizes, num_tokens=32, num_rows=6)
    check(IMPLEMENTATIONS[name], b, scale=0.3, window=150)


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
        num_tokens=128,
        num_rows=6,
    )
    check(attention, b, scale=0.25)


SINKS = np.array([0.5, -1, 2, 8], np.float32)
OPTIONS = [
    {"window": 1},
    {"window": 20},
    {"softcap": 3.0},
    {"sinks": SINKS},
    {"first_key": 1},
    {"first_key": 40},  # rows end before it, begin at it, begin before and end after it
    {"first_key": 1, "window": 20, "softcap": 3.0, "sinks": SINKS},
]


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_window_softcap_sinks_and_first_key_match_reference(attention, options):
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


def test_capped_scores_grow_with_the_position_of_the_query(attention):
    b = random_batch(
        np.random.default_rng(3),
        MIXED,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        page_size=16,
        num_tokens=128,
        num_rows=6,
    )
    check(attention, b, scale=0.25, softcap=3.0, temperature_length=8)


@pytest.mark.parametrize("half", [0, 5, 8])
def test_prepared_q_and_k_are_normed_and_rotated_first(attention, half):
    """The norm of each head, then the rotation of its first 2 * half dimensions, equal the same in numpy."""
    if attention is interpreted and half != 5:
        pytest.skip("not among the shapes that are interpreted")
    b = random_batch(
        np.random.default_rng(4),
        MIXED,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        page_size=16,
        num_tokens=128,
        num_rows=6,
    )
    rng = np.random.default_rng(5)
    angles = rng.uniform(0, 6, (128, half))
    weights = [rng.uniform(0.5, 2, 16).astype(np.float32) for _ in range(2)]
    rope = np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32) if half else None
    prepare = QKPrepare(*(None if x is None else jnp.asarray(x) for x in (*weights, rope)))
    check(attention, b, scale=0.25, prepare=prepare, atol=1e-5)


def test_empty_batch_leaves_the_pool_as_it_was(attention):
    b = random_batch(
        np.random.default_rng(3), [], num_heads=4, num_kv_heads=2, head_dim=16, page_size=16, num_tokens=128, num_rows=6
    )
    _, kv = jax.jit(attention)(*batches.arguments(b, AttentionSpec(0.25)))
    used = np.arange(len(kv)) != b["first_page"]
    np.testing.assert_array_equal(np.asarray(kv)[used], b["kv"][used])


SHORT = [(0, 1), (38, 4), (5, 2), (14, 4), (0, 3), (126, 3)]  # rows of at most 4 tokens, on both sides of page borders


@pytest.mark.parametrize("width", [4, 7])
@pytest.mark.parametrize("page_size", [1, 16, 128])
@pytest.mark.parametrize("name", [*PLAIN, *COMPILED])
@pytest.mark.parametrize(
    "options", [{}, {"window": 9, "softcap": 3.0, "temperature_length": 8, "sinks": True}], ids=len
)
def test_short_rows_of_up_to_w_tokens_match_reference(name, page_size, width, options):
    """Short rows alone; before chunks, of which one is no longer than they are; and with a window and a sink."""
    options = options | ({"sinks": SINKS} if options else {})
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": page_size, "num_rows": 9}
    for rows in (SHORT, [*SHORT, (33, 2), (100, 32), (0, 40)]):
        b = random_batch(np.random.default_rng(6), rows, **sizes, num_tokens=128)
        check(IMPLEMENTATIONS[name], b, num_short=len(SHORT), scale=0.25, width=width, **options)


@pytest.mark.parametrize("name", COMPILED)
def test_tokens_that_a_row_lacks_give_zeros_and_leave_the_pool(name):
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": 16, "num_tokens": 24, "num_rows": 4}
    b = random_batch(np.random.default_rng(6), [(40, 8), (0, 8), (90, 4)], **sizes)
    *arrays, batch, layer = batches.arguments(b, AttentionSpec(0.25, width=8), 3)
    expected, whole = IMPLEMENTATIONS[name](*arrays, batch, layer)
    lacking = dataclasses.replace(batch, num_missing=jnp.array([7, 3, 0, 0], jnp.int32))
    out, kv = IMPLEMENTATIONS[name](*arrays, lacking, layer)
    kept = np.isin(np.arange(len(out)), [0, *range(8, 13), *range(16, 20)])
    assert (np.asarray(out)[~kept] == 0).all()
    np.testing.assert_allclose(np.asarray(out)[kept], np.asarray(expected)[kept], atol=1e-6)
    before, changed = np.asarray(b["kv"]), np.asarray(whole)
    assert ((np.asarray(kv) == before) | (np.asarray(kv) == changed)).all()
    assert (np.asarray(kv) != before).sum() == (changed != before).sum() * 10 // 20


@pytest.mark.parametrize("page_size", [1, 16, 128])
@pytest.mark.parametrize("name", [*PLAIN, *COMPILED])
def test_rows_of_up_to_w_tokens_begin_before_at_and_after_the_first_key(name, page_size):
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": page_size, "num_rows": 9}
    b = random_batch(np.random.default_rng(6), [*SHORT, (38, 2), (100, 32), (0, 40)], **sizes, num_tokens=128)
    for options in ({"first_key": 1}, {"first_key": 38, "window": 9, "sinks": SINKS}):
        check(IMPLEMENTATIONS[name], b, num_short=len(SHORT), scale=0.25, width=4, **options)


def test_two_rows_of_one_token_fill_all_packed_tokens(attention):
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": 16}
    b = random_batch(np.random.default_rng(7), [(1, 1), (70, 1)], **sizes, num_tokens=2, num_rows=2)
    check(attention, b, scale=0.25, first_key=1)


@pytest.mark.parametrize("name", [*PLAIN, *COMPILED])
def test_short_rows_fill_all_packed_tokens(name):
    """Several rows without padding, where W is more than the last row has left."""
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": 16}
    b = random_batch(np.random.default_rng(7), [(3, 4), (30, 1), (60, 3)], **sizes, num_tokens=8, num_rows=3)
    check(IMPLEMENTATIONS[name], b, num_short=3, scale=0.25, width=4)


@pytest.mark.parametrize("name", [*PLAIN, *COMPILED])
def test_a_latent_pool_serves_short_rows_of_up_to_w_tokens(name):
    sizes = {"num_heads": 6, "num_kv_heads": 1, "head_dim": 40, "page_size": 16}
    b = random_batch(np.random.default_rng(8), [*SHORT, (20, 30)], **sizes, num_tokens=64, num_rows=8)
    b |= {"kv": b["kv"][:, :, :1], "v": None}
    for first_key in (0, 1):
        check(IMPLEMENTATIONS[name], b, num_short=6, scale=0.2, value_dim=24, width=4, first_key=first_key)


EIGHT_BITS = ["int8", "float8_e4m3fn", "float8_e5m2"]
SCALED = [(n, "int8") for n in PLAIN] + [(n, d) for n in COMPILED for d in ("float32", *EIGHT_BITS)]


@pytest.mark.parametrize(("name", "dtype"), SCALED)
def test_layers_of_one_program_have_kv_scales_of_their_own(name, dtype):
    """The scales are [L, 2], indexed by a traced layer."""
    b = random_batch(
        np.random.default_rng(9),
        MIXED,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        page_size=16,
        num_tokens=128,
        num_rows=6,
    )
    b["kv"] = jnp.asarray(b["kv"] * 20).astype(dtype)
    q, k, v, kv, batch, layer = batches.arguments(b, AttentionSpec(0.25))
    scales = jnp.array([[0.05, 0.03], [0.02, 0.04]])

    @jax.jit
    def attend(i):
        at = dataclasses.replace(layer, first_page=i * (len(kv) // 2), kv_scales=scales[i])
        return IMPLEMENTATIONS[name](q, k, v, kv, batch, at)

    used = np.arange(len(kv)) % (len(kv) // 2) > 0  # not the scratch pages
    for i in range(2):
        at = dataclasses.replace(layer, first_page=i * (len(kv) // 2), kv_scales=scales[i])
        expected, expected_kv = reference.paged_attention(q, k, v, kv, batch, at)
        out, new = attend(i)
        np.testing.assert_allclose(np.asarray(out)[:114], expected[:114], atol=2e-5)
        np.testing.assert_allclose(np.asarray(new, np.float64)[used], expected_kv[used], rtol=3e-7)


LATENT = [(name, page, window) for name in (*PLAIN, *COMPILED) for page in (1, 16) for window in (None, 20)]


@pytest.mark.parametrize(("name", "page_size", "window"), [*LATENT, ("fa", 16, 20)])
def test_a_latent_pool_keeps_one_vector_whose_first_columns_are_the_value(name, page_size, window):
    sizes = {"num_heads": 6, "num_kv_heads": 1, "head_dim": 40, "page_size": page_size}
    b = random_batch(np.random.default_rng(4), MIXED, **sizes, num_tokens=128, num_rows=6)
    b |= {"kv": b["kv"][:, :, :1], "v": None}
    options = {} if window is None else {"window": window}
    check(IMPLEMENTATIONS[name], b, scale=0.2, value_dim=24, **options)


@pytest.mark.parametrize("options", [{}, {"window": 2001, "sinks": SINKS}, {"first_key": 1500}], ids="-".join)
@pytest.mark.parametrize("name", COMPILED)
def test_rows_cut_into_segments_match_reference(name, options):
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 32, "num_tokens": 16, "num_rows": 5}
    b = random_batch(np.random.default_rng(10), [(3000, 1), (1024, 1), (1500, 3), (7, 5)], **sizes, context_length=3200)
    check(IMPLEMENTATIONS[name], b, scale=0.125, **options)


@pytest.mark.parametrize("page_size", [1, 16, 128])
@pytest.mark.parametrize("options", [{}, {"window": 21}], ids=len)
@pytest.mark.parametrize("name", COMPILED)
def test_bfloat16_matches_reference(name, options, page_size):
    """Weights and outputs are rounded; a window makes blocks begin anywhere in a page."""
    sizes = {
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 32,
        "page_size": page_size,
        "num_tokens": 128,
        "num_rows": 6,
    }
    b = random_batch(np.random.default_rng(11), MIXED, **sizes)
    b |= {x: np.asarray(jnp.asarray(b[x]).astype(jnp.bfloat16)) for x in ("q", "k", "v", "kv")}
    arguments = batches.arguments(b, AttentionSpec(0.2), **options)
    expected, expected_kv = reference.paged_attention(*arguments)
    out, kv = jax.jit(IMPLEMENTATIONS[name])(*arguments)
    assert out.dtype == kv.dtype == jnp.bfloat16
    n = b["num_new"].sum()
    np.testing.assert_allclose(np.asarray(out, np.float32)[:n], expected[:n], atol=0.02)
    np.testing.assert_array_equal(np.asarray(kv, np.float32), expected_kv)
    np.testing.assert_array_equal(np.asarray(out, np.float32)[n:], 0)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("name", COMPILED)
def test_every_number_of_eight_bits_is_read_and_written(name, dtype):
    """Each value comes back as it is, halves go to the even neighbour, and larger ones to the largest."""
    every = np.arange(256, dtype=np.uint8).view(jnp.dtype(dtype)).astype(np.float32)
    every = np.unique(every[np.isfinite(every) & (every != -128)])
    between = np.concatenate([(every[1:] + every[:-1]) / 2, every * np.float32(1.0001), every[[0, -1]] * 3])
    values = np.resize(np.concatenate([every, between]), (32, 2, 40)).astype(np.float32)
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 40, "page_size": 16, "num_tokens": 32, "num_rows": 1}
    b = random_batch(np.random.default_rng(13), [(0, 32)], **sizes) | {"k": values, "v": values[::-1]}
    b["kv"] = np.asarray(jnp.zeros(b["kv"].shape, dtype))
    arguments = batches.arguments(b, AttentionSpec(0.1), kv_scales=np.ones(2, np.float32))
    expected, expected_kv = reference.paged_attention(*arguments)
    out, kv = jax.jit(IMPLEMENTATIONS[name])(*arguments)
    assert kv.dtype == dtype
    np.testing.assert_array_equal(np.asarray(kv).astype(np.float32), expected_kv)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4 * np.abs(every).max())


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("name", COMPILED)
def test_queries_in_bfloat16_attend_to_eight_bits(name, dtype):
    sizes = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 32, "page_size": 1, "num_tokens": 128, "num_rows": 6}
    b = random_batch(np.random.default_rng(11), MIXED, **sizes)
    b |= {x: np.asarray(jnp.asarray(b[x]).astype(jnp.bfloat16)) for x in ("q", "k", "v")}
    b["kv"] = np.asarray(jnp.asarray(b["kv"] * 20).astype(dtype))
    arguments = batches.arguments(b, AttentionSpec(0.2), window=21, kv_scales=jnp.array([0.05, 0.05]))
    expected, expected_kv = reference.paged_attention(*arguments)
    out, kv = jax.jit(IMPLEMENTATIONS[name])(*arguments)
    n = b["num_new"].sum()
    np.testing.assert_allclose(np.asarray(out, np.float32)[:n], expected[:n], atol=0.02)
    np.testing.assert_array_equal(np.asarray(kv).astype(np.float32)[1:], expected_kv[1:])


def test_the_library_for_cpus_refuses_pools_that_it_cannot_read():
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": 16}
    b = random_batch(np.random.default_rng(12), [(3, 1)], **sizes, num_tokens=8, num_rows=1)
    b["kv"] = np.asarray(jnp.asarray(b["kv"], jnp.bfloat16))
    nameless = library.Library(**dict.fromkeys((each.name for each in dataclasses.fields(library.Library)), ""))
    with pytest.raises(ValueError, match=r"--attention-backend cpu.* bfloat16 .*float32.*use native"):
        cpu.paged_attention(*batches.arguments(b, AttentionSpec(0.25)), library=nameless)


def test_a_large_pool_of_the_library_takes_memory_when_it_is_written():
    if (found := library.find_library()) is None:
        pytest.skip("no library was built")
    make = functools.partial(cpu.make_pool, library=found)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    shape, size = (64, 2, 2, 16, 1 << 14), 1 << 28
    before = resident()
    pool = jax.block_until_ready(jax.jit(lambda: make(shape, "float32"))())
    assert resident() - before < size / 8
    written = jax.jit(lambda pool: pool.at[3, 1, 0, 5].set(7.0), donate_argnums=0)(pool)
    assert written.nbytes == size
    assert resident() - before < size / 8
    values = np.asarray(written)
    assert (values != 0).sum() == shape[-1]
    assert (values[3, 1, 0, 5] == 7).all()
    small = jax.jit(lambda: make((4, 2, 2, 16, 8), "float32"))
    assert "custom_call" not in small.lower().as_text()
