"""Block sizes fit any shape, and the table overrides the model of the chip."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_jax.ops.attention.fa import blocks
from sgl_jax.ops.attention.fa.blocks import Chip
from sgl_jax.ops.attention.fa.ring import IDS

V6E, V7X = Chip("TPU_V6E", 128 << 20), Chip("TPU_7X", 64 << 20)


@given(
    chip=st.sampled_from([V6E, V7X]),
    kv_heads=st.integers(1, 32),
    page=st.sampled_from([8, 16, 32, 48, 64, 128, 256, 1024]),
    head_dim=st.sampled_from([128, 256]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.int8]),
    row_pages=st.integers(1, 20000),
    tokens=st.sampled_from([16, 64, 2048]),
)
def test_blocks_fit_and_keep_what_the_kernels_rely_on(chip, kv_heads, page, head_dim, dtype, row_pages, tokens):
    shape = (100, kv_heads, 2, page, head_dim)
    page_bytes = kv_heads * 2 * page * head_dim * jnp.dtype(dtype).itemsize
    decode = blocks.decode_blocks(chip, shape, dtype, row_pages, 4 * kv_heads)
    chunks = blocks.chunk_blocks(chip, shape, dtype, row_pages, 4 * kv_heads, tokens)
    for sizes in (decode, chunks):
        assert IDS % sizes.pages == 0
        assert sizes.pages % sizes.unit_pages == 0
        assert sizes.slots >= 2
        assert sizes.slots & (sizes.slots - 1) == 0
        at_least = 2 * page_bytes  # two pages, however large
        assert sizes.slots * sizes.pages * page_bytes <= max(chip.vmem_bytes // 8, at_least)
    assert tokens % chunks.queries == 0
    assert chunks.queries % 16 == 0
    assert chunks.write_slots >= 2
    assert decode.max_tokens % 16 == 0


def test_qwen3_8b_on_four_devices():
    """With 2 KV heads of 128, blocks have 1024 keys and 8 of them are in flight, for every page size."""
    for page in (16, 64, 128):
        sizes = blocks.decode_blocks(V6E, (100, 2, 2, page, 128), jnp.bfloat16, 4096, 8)
        assert sizes.max_tokens >= 512
        assert (sizes.slots, sizes.pages * page, sizes.unit_pages * page) == (8, 1024, 256)


@pytest.mark.parametrize(
    ("chip", "heads", "queries", "rows"), [(V6E, 128, 32, 64), (V7X, 128, 16, 32), (V6E, 32, 128, 256)]
)
def test_many_heads_over_latent_vectors_of_576_leave_room_in_vmem(chip, heads, queries, rows):
    """DeepSeek-V3 on one device and on four: the memory of a query grows with its heads."""
    shape = (100, 1, 1, 16, 640)
    chunks = blocks.chunk_blocks(chip, shape, jnp.bfloat16, 256, heads, 2048)
    assert (chunks.queries, chunks.pages * 16) == (queries, 1024)
    assert blocks.decode_blocks(chip, shape, jnp.bfloat16, 256, heads).max_tokens // 16 * 16 >= rows


def test_short_rows_get_no_larger_block_than_they_need():
    assert blocks.decode_blocks(V6E, (100, 2, 2, 16, 128), jnp.bfloat16, 3, 8).pages == 4


@pytest.mark.parametrize("chip", [V6E, V7X])
def test_the_table_overrides_by_chip_and_shape(monkeypatch, chip):
    key = "decode TPU_V6E kv_heads=2 page=16 head_dim=128 bfloat16"
    monkeypatch.setattr(blocks, "_table", lambda: {key: {"slots": 4}})
    sizes = blocks.decode_blocks(chip, (100, 2, 2, 16, 128), jnp.bfloat16, 256, 8)
    assert sizes.slots == (4 if chip is V6E else 8)
