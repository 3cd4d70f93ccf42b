"""Operands of the two kernels, and the Pallas call around either."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sgl_jax.ops.attention.fa.ring import IDS, PageRing, Ref
from sgl_jax.ops.attention.fa.tile import LANES, Prepare, Scores

IN_VMEM = "sinks", "q_norm", "k_norm"  # whole; other operands stay in HBM, unless they are packed lines of short rows
PACKED = "q", "k", "v", "rope", "o"


@dataclasses.dataclass(frozen=True)
class Static:
    """Numbers that a kernel is compiled for."""

    num_heads: int
    num_kv_heads: int
    planes: int
    page_size: int
    head_dim: int  # H of the pool
    value_dim: int  # V, in whole lane tiles
    width: int  # W
    has_window: bool
    first_key: int  # as in api.AttentionSpec
    scores: Scores
    prepare: Prepare

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def sees_all(self) -> bool:
        """Whether a query sees every key up to its own."""
        return not self.has_window and self.first_key == 0

    @property
    def lane_tiles(self) -> range:
        return range(self.head_dim // LANES)


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a call, and numbers that change by step or by layer, an array each: one array of all would be an
    operation to make."""

    num_short: Ref  # i32[1]: rows of at most W tokens, which are the decode kernel's
    first_page: Ref  # i32[1]: of the layer
    window: Ref  # i32[1]: keys; 0 if there is none
    kv_scales: Ref | None  # f32[2]: factors of K and V as the pool has them; None: 1
    kv_lens: Ref  # i32[S]
    cu_q_lens: Ref  # i32[S + 1]; None in the decode kernel if W = 1: row s is then token s
    token_page: Ref  # i32[T], without the layer's first page; None for the decode kernel
    table: Ref  # i32[S, groups * IDS]: each row's page ids, padded to whole groups (ring.py)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The packed tokens, T of them with padding, and the arrays that go with their heads. V is H, or less where the pool has
    one plane, whose first V columns are the values."""

    q: Ref  # [T, N * H] or [N, T, H] (tile.of_head); fused: [T, (N + 2K) * H]
    k: Ref  # [T, K * H]; None: q is fused
    v: Ref | None  # [T, K * H]; None also for a pool of one plane
    sinks: Ref | None  # f32[N + 8, 128]: the same in all lanes
    q_norm: Ref | None  # [1, H]: weight of the norm, as it is stored
    k_norm: Ref | None  # [1, H]
    rope: Ref | None  # f32[T, H]: cos and sin (api.QKPrepare)

    def outputs(self, static: Static) -> jax.ShapeDtypeStruct:
        """Return the shape of the outputs: [T, N * V] or [N, T, V], as q is."""
        whole = *self.q.shape[:-1], static.num_heads * static.value_dim
        return jax.ShapeDtypeStruct((*self.q.shape[:-1], static.value_dim) if self.q.ndim == 3 else whole, self.q.dtype)

    def cut(self, start: jax.Array | int, lines: int) -> Tokens:
        """Take the tokens [start, start + lines)."""

        def some(x: jax.Array) -> jax.Array:
            x = x.swapaxes(0, -2)  # cut along the middle axis, latent queries were copied twice
            if isinstance(start, int):
                x = x[start : start + lines]
            else:
                room = [(0, lines)] + [(0, 0)] * (x.ndim - 1)
                x = lax.dynamic_slice_in_dim(jnp.pad(x, room), start, lines)
            return x.swapaxes(0, -2)

        k, v, rope = (None if x is None else some(x) for x in (self.k, self.v, self.rope))
        return dataclasses.replace(self, q=some(self.q), k=k, v=v, rope=rope)


@dataclasses.dataclass(frozen=True)
class Refs(Tokens, Rows):
    """The refs that both kernels have: Rows in SMEM, but for the table, flat and in HBM; sinks and norms in VMEM; packed
    lines and o in HBM in the chunk kernel, in VMEM in the decode kernel."""

    o: Ref  # [T, N * V] or [N, T, V]
    kv: Ref  # HBM [LP, K, planes, page, H]
    ring: dict[str, Ref]

    def pages(self) -> PageRing:
        """Return the ring of these refs."""
        groups = self.table.shape[0] // (self.kv_lens.shape[0] * IDS)
        return PageRing(**self.ring, kv=self.kv, table=self.table, groups=groups, first_page=self.first_page[0])


def run_kernel(
    name: str,
    kernel: Callable[[dict[str, Any]], None],
    tokens: Tokens,
    rows: Rows,
    kv: jax.Array,
    o: jax.Array | jax.ShapeDtypeStruct,
    scratch: dict[str, Any],
    *,
    static: Static,
    lines: int | None,
    vmem_limit: int,
    pairs: int,
    keys: int,
) -> tuple[jax.Array, jax.Array]:
    """Call `kernel` with the refs of Refs and `scratch` by name: None for what is None, and q, k and v apart where they are
    fused. Returns o and the pool, which take the buffers of `kv` and of an `o` that is an array.

    `lines`: so many packed lines are put into VMEM; None: all stay in HBM. The compiler is told what the call costs:
    `pairs` of a query and a key that each head multiplies, and `keys` read for each KV head.
    """
    scalars = dict(vars(rows))
    table = scalars.pop("table").reshape(-1)
    inputs = vars(tokens) | {"table": table, "o": o if isinstance(o, jax.Array) else None, "kv": kv}
    given = {key: x for key, x in scalars.items() if x is not None}
    arrays = {key: x for key, x in inputs.items() if x is not None}
    outputs = {"o": o, "kv": kv}
    names = [*given, *arrays]

    def body(*args):
        *refs, scratch_refs = args
        by_name = dict.fromkeys([*scalars, *inputs]) | dict(zip([*names, *outputs], refs, strict=True))
        if by_name["k"] is None:
            by_name |= _views(by_name["q"], static)
        kernel(by_name | scratch_refs)

    return pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(given),
            grid=() if lines is None else (1,),
            in_specs=[_block(*each, lines) for each in arrays.items()],
            out_specs=[_block(*each, lines) for each in outputs.items()],
            scratch_shapes=[scratch],
        ),
        input_output_aliases={names.index(key): i for i, key in enumerate(outputs) if key in names},
        compiler_params=pltpu.CompilerParams(
            disable_bounds_checks=True, disable_semaphore_checks=True, vmem_limit_bytes=vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * static.num_heads * (static.head_dim + static.value_dim),
            transcendentals=pairs * static.num_heads,
            bytes_accessed=static.planes * keys * static.num_kv_heads * static.head_dim * kv.dtype.itemsize
            + (tokens.q.size + o.size) * tokens.q.dtype.itemsize,
        ),
        name=name,
    )(*given.values(), *arrays.values())


def _block(name: str, x: jax.Array | jax.ShapeDtypeStruct, lines: int | None) -> pl.BlockSpec:
    if lines is None or name not in PACKED:
        return pl.BlockSpec(memory_space=pltpu.VMEM if name in IN_VMEM else pltpu.HBM)
    shape = (*x.shape[:-2], lines, x.shape[-1])
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape), pipeline_mode=pl.Buffered(1))


def _views(qkv: Ref, static: Static) -> dict[str, Ref]:
    """Cut a ref of fused q, k and v [T, (N + 2K) * H], heads of whole lane tiles, into a ref of each."""
    sizes = static.num_heads * static.head_dim, static.num_kv_heads * static.head_dim
    ends = [0, sizes[0], sizes[0] + sizes[1], sizes[0] + 2 * sizes[1]]
    return {name: qkv.at[:, slice(*ends[i : i + 2])] for i, name in enumerate("qkv")}
