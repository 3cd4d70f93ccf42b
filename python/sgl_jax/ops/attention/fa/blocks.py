"""Sizes of the kernels' blocks, from a small model of the chip; tuned.json may override them by chip and shape."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from sgl_jax.ops.attention.fa.ring import IDS
from sgl_jax.ops.attention.fa.tile import LANES

DECODE_KEYS = 1024  # larger blocks gain nothing per key; smaller ones are bound by scalar work
UNIT_KEYS = 256  # keys of a step in an edge block: they fill a matrix unit once
CHUNK_KEYS = 1024
CHUNK_UNIT_KEYS = 512
CHUNK_QUERIES = 128
FEW_HEADS, CHUNK_QUERIES_OF_FEW = 8, 256  # a tile of few heads has more queries, which share its scalar code
WRITE_TOKENS = 128
MAX_SLOTS = 8
EXPECTED_KEYS = 1024  # keys of a row, for the compiler's estimate of the cost


@dataclasses.dataclass(frozen=True)
class Chip:
    name: str  # name in pltpu.ChipVersion
    vmem_bytes: int


@dataclasses.dataclass(frozen=True)
class DecodeBlocks:
    slots: int  # slots of the ring
    pages: int  # in a slot: a power of two, at most IDS
    unit_pages: int  # per step in an edge block; divides pages
    vmem_limit: int
    max_tokens: int  # limit for the short rows of one call, whose q, o and new KV lie in VMEM; a multiple of 16


@dataclasses.dataclass(frozen=True)
class ChunkBlocks:
    slots: int
    pages: int
    unit_pages: int  # per step in an edge block; divides pages
    queries: int  # tokens of a tile, a multiple of 16
    write_pages: int  # pages written at a time
    write_slots: int
    vmem_limit: int


def current_chip() -> Chip:
    """Return the TPU that the program is traced for. Raises ValueError where there is none."""
    info = pltpu.get_tpu_info()
    return Chip(info.chip_version.name, info.vmem_capacity_bytes)


def _power_of_two(n: int) -> int:
    """Return the largest power of two that is at most n, and at least 1."""
    return 1 << max(0, n.bit_length() - 1)


def _ring(keys: int, page_size: int, row_pages: int, page_bytes: int, slots: int, budget: int) -> tuple[int, int]:
    """Return the slots and the pages of a slot: blocks of `keys` if so many slots of them fit the budget, else smaller ones."""
    pages = min(_power_of_two(keys // page_size), IDS, 2 * _power_of_two(max(1, row_pages - 1)))
    while pages > 1 and slots * pages * page_bytes > budget:
        pages //= 2
    return max(2, _power_of_two(min(MAX_SLOTS, budget // (pages * page_bytes)))), pages


def decode_blocks(
    chip: Chip, kv_shape: tuple[int, ...], dtype: DTypeLike, row_pages: int, num_heads: int
) -> DecodeBlocks:
    """Return the sizes for a pool [LP, K, planes, page, H], page tables of row_pages pages and num_heads query heads."""
    page_size, page_bytes = kv_shape[3], _page_bytes(kv_shape, dtype)
    slots, pages = _ring(DECODE_KEYS, page_size, row_pages, page_bytes, 4, chip.vmem_bytes // 8)
    unit = min(pages, _power_of_two(UNIT_KEYS // page_size))
    # A token has q and o as they come, at most float32, and both once more in float32; so for the new K and V.
    token_bytes = (3 * num_heads + 4 * kv_shape[1]) * kv_shape[4] * 4
    max_tokens = max(16, chip.vmem_bytes // 2 // token_bytes // 16 * 16)
    blocks = DecodeBlocks(slots, pages, unit, chip.vmem_bytes * 7 // 8, max_tokens)
    return dataclasses.replace(blocks, **_tuned("decode", chip, kv_shape, dtype))


def chunk_blocks(
    chip: Chip, kv_shape: tuple[int, ...], dtype: DTypeLike, row_pages: int, num_heads: int, num_tokens: int
) -> ChunkBlocks:
    """Return the sizes as decode_blocks does, for num_tokens packed tokens, a multiple of 16."""
    page_size, page_bytes = kv_shape[3], _page_bytes(kv_shape, dtype)
    slots, pages = _ring(CHUNK_KEYS, page_size, row_pages, page_bytes, 2, chip.vmem_bytes // 8)
    write_pages = max(1, WRITE_TOKENS // page_size)
    write_slots = max(2, _power_of_two(min(MAX_SLOTS, chip.vmem_bytes // 16 // (2 * write_pages * page_bytes))))
    unit = min(pages, _power_of_two(CHUNK_UNIT_KEYS // page_size))
    # A query has two slots of bfloat16 q and o, and acc, top and total in float32.
    query_bytes = num_heads * (2 * 2 * 2 * kv_shape[4] + 4 * (kv_shape[4] + 2 * LANES))
    wanted = CHUNK_QUERIES_OF_FEW if num_heads <= FEW_HEADS else CHUNK_QUERIES
    queries = min(wanted, num_tokens, max(16, _power_of_two(chip.vmem_bytes // 3 // query_bytes)))
    blocks = ChunkBlocks(min(slots, 4), pages, unit, queries, write_pages, write_slots, chip.vmem_bytes * 7 // 8)
    return dataclasses.replace(blocks, **_tuned("chunks", chip, kv_shape, dtype))


def _page_bytes(kv_shape: tuple[int, ...], dtype: DTypeLike) -> int:
    return jnp.dtype(dtype).itemsize * math.prod(kv_shape[1:])


@functools.cache
def _table() -> dict[str, dict[str, int]]:
    return json.loads(Path(__file__).with_name("tuned.json").read_text())


def _tuned(kernel: str, chip: Chip, kv_shape: tuple[int, ...], dtype: DTypeLike) -> dict[str, int]:
    _, heads, _, page_size, head_dim = kv_shape
    key = f"{kernel} {chip.name} kv_heads={heads} page={page_size} head_dim={head_dim} {jnp.dtype(dtype)}"
    return _table().get(key, {})
