"""Checks of each kernel on the devices of this machine, against a reference in float64 numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sgl_jax.ops.attention import reference as attention_reference
from sgl_jax.ops.attention.api import AttentionLayer, AttentionSpec, make_ragged_batch
from sgl_jax.ops.attention.backends import Backend, NoSuchBackend, find_backend
from sgl_jax.ops.grouped_matmul import reference as grouped_reference
from sgl_jax.ops.grouped_matmul.api import GroupedMatmul
from sgl_jax.request import Request, SamplingParams
from sgl_jax.runtime import sampler
from sgl_jax.runtime.compiler import matmul_precision
from sgl_jax.runtime.device_state import initial_state
from sgl_jax.runtime.platform import Platform, grouped_matmul_for
from sgl_jax.runtime.sampler import SampleLines
from sgl_jax.scheduler.rows import encode_params

BACKENDS = ("native", "fa")
# Largest difference, for values around 1: a rounding of the dtype at each of the few places where one happens.
ALLOWED = {"bfloat16": 0.04, "float32": 0.001}
SAMPLER_ALLOWED = 1e-4  # probability, for the rounding of float32 sums over the vocabulary


@dataclasses.dataclass(frozen=True)
class Check:
    name: str
    error: float | None = None  # the largest difference; None: not run
    allowed: float = 0.0
    note: str = ""  # why it was not run, or how it failed
    failed: bool = False

    @property
    def passed(self) -> bool:
        return not self.failed and (self.error is None or self.error <= self.allowed)


def checks(platform: Platform, devices: Sequence[jax.Device]) -> Iterator[Check]:
    """Yield every check, on the first device where one is enough. One that raises has failed, and the next one runs."""
    for dtype in dict.fromkeys((platform.dtype, "float32")):
        for name in BACKENDS:
            title = f"attention {name}, {dtype}"
            try:
                backend = find_backend(name, platform.name, vectorise=platform.vectorises_rows)
            except NoSuchBackend as reason:
                yield Check(title, note=str(reason).partition(": ")[2].partition(";")[0])
                continue
            yield _run(title, ALLOWED[dtype], dtype, partial(attention_error, backend, dtype))
        error = partial(grouped_matmul_error, grouped_matmul_for(platform.name), dtype)
        yield _run(f"grouped matmul, {dtype}", ALLOWED[dtype], dtype, error)
    yield _run("sampler", SAMPLER_ALLOWED, "float32", sampler_error)
    if len(devices) > 1:
        yield _run(f"sum over {len(devices)} devices", 0.0, "float32", partial(sum_error, devices))


def _run(name: str, allowed: float, dtype: str, error: Callable[[], float]) -> Check:
    try:
        with jax.default_matmul_precision(matmul_precision(dtype)):
            found = error()
    except Exception as problem:  # the report says so, and goes on
        return Check(name, note=f"{type(problem).__name__}: {problem}".partition("\n")[0], failed=True)
    return Check(name, found, allowed, failed=not np.isfinite(found))


def attention_error(backend: Backend, dtype: str) -> float:
    """Return the largest difference of outputs, for decoding rows and chunks together in a pool of two layers."""
    heads, kv_heads, head_dim, num_tokens, num_rows = 8, 2, 128, 256, 8
    multiple = backend.page_multiple(np.dtype(dtype))
    page_size = -(-16 // multiple) * multiple
    start = np.array([0, 37, 511, 900, 0, 130, 7, 0], np.int32)
    num_new = np.array([1, 1, 1, 1, 65, 100, 16, 0], np.int32)
    row_pages = 1024 // page_size
    rng = np.random.default_rng(1)
    num_pages = num_rows * row_pages + 1
    table = 1 + rng.permutation(num_pages - 1).astype(np.int32).reshape(num_rows, row_pages)
    width = backend.pool_head_dim(head_dim)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape).astype(np.float32)).astype(dtype)

    q = random(num_tokens, heads, head_dim)
    k, v = random(num_tokens, kv_heads, head_dim), random(num_tokens, kv_heads, head_dim)
    kv = random(2 * num_pages, kv_heads, 2, page_size, width)
    rows = jnp.asarray(table), jnp.asarray(start), jnp.asarray(num_new), jnp.int32(4)
    batch = make_ragged_batch(*rows, num_tokens, page_size)
    layer = AttentionLayer(AttentionSpec(head_dim**-0.5), jnp.int32(num_pages))
    wanted, pool = attention_reference.paged_attention(q, k, v, kv[..., :head_dim], batch, layer)
    out, new_pool = jax.jit(backend)(q, k, v, kv, batch, layer)
    used = int(num_new.sum())
    error = np.abs(np.asarray(out, np.float64) - wanted)[:used].max()
    pages = np.arange(1, num_pages)  # page 0 of a layer holds nothing
    pool_error = np.abs(np.asarray(new_pool[..., :head_dim], np.float64) - pool)
    return float(max(error, pool_error[pages].max(), pool_error[num_pages + pages].max()))


def grouped_matmul_error(grouped_matmul: GroupedMatmul, dtype: str) -> float:
    """Return the largest difference of outputs, with groups of all sizes, empty ones too, and some padding."""
    rng = np.random.default_rng(2)
    sizes = np.array([0, 1, 60, 7, 0, 130, 16, 20], np.int32)
    x = jnp.asarray(rng.standard_normal((256, 256)).astype(np.float32)).astype(dtype)
    w = jnp.asarray(rng.standard_normal((2, len(sizes), 384, 256)).astype(np.float32) / 16).astype(dtype)
    out = jax.jit(grouped_matmul)(x, w, jnp.int32(1), sizes)
    used = int(sizes.sum())
    wanted = grouped_reference.grouped_matmul(np.asarray(x, np.float64), np.asarray(w, np.float64), 1, sizes)
    return float(np.abs(np.asarray(out, np.float64) - wanted)[:used].max())


def sampler_error(num_rows: int = 64, vocab_size: int = 32000) -> float:
    """Return the largest distance of a row's uniform number from the interval of probability of the token it drew.

    It is 1 for a token that the filters exclude, and for a greedy one that is not the best.
    """
    settings = [
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.5),
        SamplingParams(min_p=0.1),
        SamplingParams(top_k=1000, top_p=0.9, temperature=0.7),
    ]
    params = [settings[i % len(settings)] for i in range(num_rows)]
    columns = [encode_params(_request(each, seed)) for seed, each in enumerate(params)]
    logits = np.random.default_rng(3).normal(0, 2, (num_rows, vocab_size)).astype(np.float32)
    rows = jnp.arange(num_rows)
    lines = SampleLines(
        rows=rows,
        position=rows + 6,
        samples=jnp.ones(num_rows, jnp.bool_),
        params=jnp.asarray(np.stack(columns)),
        drafts=jnp.zeros((num_rows, 0), jnp.int32),
    )

    @jax.jit
    def draw(logits, lines):
        return sampler.sample(logits, lines, initial_state(num_rows, 1, vocab_size)), sampler.uniforms(lines)

    drawn = zip(logits.astype(np.float64), params, *map(np.asarray, draw(logits, lines)), strict=True)
    return max(_missed(row, each, int(token), float(uniform)) for row, each, token, uniform in drawn)


def _missed(logits: np.ndarray, params: SamplingParams, token: int, uniform: float) -> float:
    if params.temperature == 0:
        return float(token != logits.argmax())
    weights = np.exp((logits - logits.max()) / params.temperature)
    order = np.argsort(-weights, kind="stable")
    if params.top_k > 0:
        weights[order[params.top_k :]] = 0
    ranked = weights[order]
    weights[order[np.cumsum(ranked) - ranked >= params.top_p * ranked.sum()]] = 0
    weights[weights < params.min_p] = 0
    ends = np.cumsum(weights) / weights.sum()
    if weights[token] == 0:
        return 1.0
    return max(0.0, (ends[token - 1] if token else 0.0) - uniform, uniform - ends[token])


def _request(params: SamplingParams, seed: int) -> Request:
    return Request(0, np.zeros(1, np.int32), params, "", seed, 2**20, np.empty(0, np.int32), 0)


def sum_error(devices: Sequence[jax.Device]) -> float:
    """Return the error of a sum of whole numbers over all devices; it should be exact."""
    mesh = Mesh(np.array(devices), ("all",))
    values = np.arange(len(devices) * 4096, dtype=np.float32).reshape(len(devices), -1) % 1024
    divided = PartitionSpec("all")
    placed = jax.device_put(values, NamedSharding(mesh, divided))
    total = jax.shard_map(lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=divided, out_specs=PartitionSpec())
    return float(np.abs(np.asarray(jax.jit(total)(placed))[0] - values.sum(0)).max())
