"""Random ragged batches, and the fa kernels in interpret mode, for the attention tests."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from sgl_jax.ops.attention.api import AttentionLayer, make_ragged_batch
from sgl_jax.ops.attention.fa import call as fa
from sgl_jax.ops.attention.fa.blocks import ChunkBlocks, DecodeBlocks

VMEM = 64 << 20
# Small, so that short rows already have several blocks, tiles and turns of each ring.
BLOCKS = (
    DecodeBlocks(slots=2, pages=4, unit_pages=2, vmem_limit=VMEM, max_tokens=512),
    ChunkBlocks(slots=2, pages=4, unit_pages=2, queries=32, write_pages=2, write_slots=4, vmem_limit=VMEM),
)
# RACES raises on a race and runs copies when they are waited for; EAGER runs them when they are started.
RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
EAGER = pltpu.InterpretParams(dma_execution_mode="eager", uninitialized_memory="nan")


def interpreted(q, k, v, kv, batch, layer, *, params=RACES, blocks=BLOCKS):
    """Run fa on the CPU, for a pool of any head_dim."""
    head_dim = q.shape[-1]
    pad = fa.pool_head_dim(head_dim) - head_dim
    wide = jnp.pad(kv, [(0, 0)] * 4 + [(0, pad)])
    with pltpu.force_tpu_interpret_mode(params):
        out, wide = fa.paged_attention(q, k, v, wide, batch, layer, blocks=blocks)
    return out, wide[..., :head_dim]


_ragged = jax.jit(make_ragged_batch, static_argnums=(4, 5))


def arguments(b, spec, num_short=None, **arrays):
    """Make the six arguments of the contract from a random_batch; `arrays` are those of AttentionLayer."""
    if num_short is None:
        num_short = (b["num_new"] == 1).sum()
    rows = (jnp.asarray(b[name]) for name in ("page_table", "start", "num_new"))
    batch = _ragged(*rows, jnp.int32(num_short), len(b["q"]), b["kv"].shape[3])
    layer = AttentionLayer(spec, jnp.int32(b["first_page"]), **jax.tree.map(jnp.asarray, arrays))
    q, k, v, kv = (None if b[name] is None else jnp.asarray(b[name]) for name in ("q", "k", "v", "kv"))
    return q, k, v, kv, batch, layer


def defined(batch, layer, num_tokens):
    """Return which of the first num_tokens outputs the contract defines: not those of queries that see nothing at all."""
    return (np.asarray(batch.positions)[:num_tokens] >= layer.spec.first_key) | (layer.sinks is not None)


def random_batch(
    rng, rows, *, num_heads, num_kv_heads, head_dim, page_size, num_tokens, num_rows, layer=1, context_length=192
):
    """Make a batch of rows (start, num_new), the short ones first. Pages are dealt at random."""
    pages_per_row = context_length // page_size + 8
    num_pages = 4 + sum(-(-(s + n) // page_size) for s, n in rows)
    num_pages += -num_pages % 32  # few shapes, so few programs
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
