"""The backend `tokamax`: its arguments for tokamax's operation, checked with tokamax's own reference, and its refusals.

Its kernels run on TPUs alone; that they compile for one is tests/tpu/test_tokamax_step.py.
"""

from __future__ import annotations

import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from batches import arguments, random_batch

from sgl_jax.ops.attention import reference
from sgl_jax.ops.attention.api import AttentionLayer, AttentionSpec, QKPrepare, make_ragged_batch
from sgl_jax.ops.attention.backends import NoSuchBackend, find_backend

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 128, "page_size": 16, "num_rows": 6}
ROWS = [(0, 1), (37, 1), (15, 1), (0, 20), (33, 9)]


@pytest.fixture(scope="module")
def tokamax():
    return pytest.importorskip("sgl_jax.ops.attention.tokamax")


def side_by_side(kv: np.ndarray) -> np.ndarray:
    """Order a pool [LP, K, 2, page, H] as its kernels do, in float32."""
    pages, heads, planes, page_size, width = kv.shape
    return kv.transpose(0, 3, 1, 2, 4).reshape(pages, page_size, heads * planes, 1, width)


def reference_op():
    from tokamax.ops import ragged_paged_attention

    def op(q, k, v, kv, *rows, **options):
        flat = kv.reshape(*kv.shape[:2], -1, kv.shape[-1])  # the reference's pool has heads in one axis
        out, flat = ragged_paged_attention(q, k, v, flat, *rows, implementation="reference", **options)
        return out, flat.reshape(kv.shape)

    return op


def called(tokamax, b, spec, op, **arrays):
    q, k, v, _, batch, layer = arguments(b, spec, **arrays)
    return tokamax.paged_attention(q, k, v, jnp.asarray(side_by_side(b["kv"])), batch, layer, op=op)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("prepared", [False, True])
def test_its_operation_is_told_rows_and_pages_as_they_are(tokamax, softcap, prepared):
    rng = np.random.default_rng(3)
    b = random_batch(rng, ROWS, num_tokens=40, **SIZES)
    angles = rng.uniform(0, 3, (40, 64)).astype(np.float32)
    rope = jnp.asarray(np.concatenate([np.cos(angles), np.sin(angles)], axis=1))
    prepare = QKPrepare(jnp.full(128, 1.5), jnp.full(128, 0.5), rope) if prepared else None
    spec = AttentionSpec(0.1, softcap)
    out, kv = called(tokamax, b, spec, reference_op(), prepare=prepare)
    expected, pool = reference.paged_attention(*arguments(b, spec, prepare=prepare))
    used = int(b["num_new"].sum())
    np.testing.assert_allclose(out[:used], expected[:used], atol=2e-5)
    np.testing.assert_allclose(kv, side_by_side(pool), atol=1e-6)


def test_its_pool_has_k_and_v_of_a_token_side_by_side_in_32_bits(tokamax):
    backend = find_backend("tokamax", "tpu", vectorise=True)
    assert backend.pool_order.page(8, 2, 128, 128, "bfloat16") == (128, 8, 2, 128)
    assert backend.pool_order.page(1, 2, 128, 128, "float32") == (128, 2, 1, 128)
    assert (backend.page_size, backend.pool_head_dim(80), backend.latent) == (128, 128, False)


@pytest.mark.parametrize(
    ("spec", "arrays", "message"),
    [
        ({}, {"window": jnp.int32(8)}, "window"),
        ({}, {"sinks": jnp.zeros(4)}, "sinks"),
        ({"temperature_length": 1024}, {}, "position"),
        ({}, {"kv_scales": jnp.ones(2)}, "8-bit KV"),
        ({"value_dim": 64}, {}, "latent"),
        ({"width": 4}, {}, "4 tokens"),
        ({"first_key": 1}, {}, "keys .*position 1;"),
    ],
)
def test_what_its_kernels_cannot_do_is_refused(tokamax, spec, arrays, message):
    b = random_batch(np.random.default_rng(0), ROWS, num_tokens=40, **SIZES)
    with pytest.raises(ValueError, match=f"--attention-backend tokamax .*{message}.* fa .*native"):
        called(tokamax, b, AttentionSpec(0.1, **spec), print, **arrays)


def test_pages_that_are_no_power_of_two_are_refused(tokamax):
    batch = make_ragged_batch(
        jnp.zeros((1, 4), jnp.int32), jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32), jnp.int32(1), 8, 48
    )
    q, k, kv = jnp.zeros((8, 4, 128)), jnp.zeros((8, 2, 128)), jnp.zeros((8, 48, 4, 1, 128))
    with pytest.raises(ValueError, match=r"--page-size .*power of two.* 48"):
        tokamax.paged_attention(q, k, k, kv, batch, AttentionLayer(AttentionSpec(0.1), 0), op=print)


@pytest.fixture
def v6e(tokamax, monkeypatch: pytest.MonkeyPatch):
    chip = types.SimpleNamespace(smem_capacity_bytes=1 << 20, vmem_capacity_bytes=128 << 20)
    monkeypatch.setattr(tokamax.pltpu, "get_tpu_info", lambda: chip)


POOL = (4096, 128, 2, 2, 128)  # 2 KV heads


@pytest.mark.parametrize(
    ("rows", "pages", "tokens", "keys"),
    [
        (64, 64, 2048, 512),  # 80 chunks and part-chunks, 2 at a time, of 16 blocks: 640 steps
        (256, 128, 256, 1024),  # 130 chunks of 32 blocks would be 2080 steps
        (256, 128, 2048, 2048),  # 272 chunks of 16 blocks would be 2176 steps, with 8 blocks they are 1088
    ],
)
def test_blocks_grow_until_the_work_list_holds_the_worst_step(tokamax, v6e, rows, pages, tokens, keys):
    assert tokamax._sized(POOL, 2, (rows, pages), tokens).config.bkv_sz == keys


@pytest.mark.parametrize(
    ("pool", "rows", "pages", "tokens"),
    [
        (POOL, 512, 257, 512),  # page ids take more than half of scalar memory
        (POOL, 256, 320, 2048),  # 2720 steps with blocks of 2048; those of 4096 take all of VMEM
        ((4096, 128, 8, 2, 128), 256, 128, 2048),  # 8 KV heads: blocks of 1024 are the largest
    ],
)
def test_more_than_its_memory_holds_is_refused(tokamax, v6e, pool, rows, pages, tokens):
    with pytest.raises(ValueError, match=rf"{rows} rows of {pages} pages of 128 and {tokens} tokens .* lower --max-"):
        tokamax._sized(pool, 2, (rows, pages), tokens)


def test_without_the_package_the_launch_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "sgl_jax.ops.attention.tokamax", raising=False)
    monkeypatch.setitem(sys.modules, "tokamax.ops.tpu", None)
    with pytest.raises(NoSuchBackend, match=r"--attention-backend tokamax.*`pip install tokamax`"):
        find_backend("tokamax", "tpu", vectorise=True)
