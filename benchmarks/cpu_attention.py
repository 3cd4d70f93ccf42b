"""Measure attention on a CPU: the compiled library beside plain XLA, in turn.

    python benchmarks/cpu_attention.py --out benchmarks/cpu/attention.json

For each batch, one program of several layers of nothing but attention: processor seconds to compile it, and processor
milliseconds of a run, the median of several.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from provenance import commit, machine

from sgl_jax.ops.attention.api import AttentionLayer, AttentionSpec, make_ragged_batch
from sgl_jax.ops.attention.backends import Backend, find_backend

NUM_LAYERS, PAGE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 16, 9, 3, 64  # heads of SmolLM2-135M
BATCHES = [(1, 1, 150), (32, 1, 150), (128, 1, 150), (8, 1, 1100), (1, 1, 8000), (1, 256, 1024), (1, 256, 8000)]
ROUNDS = 5


def program(backend: Backend, num_pages: int) -> jax.stages.Wrapped:
    def layers(kv, q, k, v, page_table, start, num_new):
        short = (num_new == 1).sum().astype(jnp.int32)
        batch = make_ragged_batch(page_table, start, num_new, short, len(q), PAGE)
        out = jnp.zeros_like(q)
        for layer in range(NUM_LAYERS):
            first = AttentionLayer(AttentionSpec(HEAD_DIM**-0.5), layer * num_pages)
            out, kv = backend(q + 0.001 * out, k, v, kv, batch, first)
        return kv, out

    return jax.jit(layers, donate_argnums=0)


def measure(rows: int, new: int, context: int, dtype: str) -> dict[str, Any]:
    pages = -(-context // PAGE)
    num_pages, rng = rows * pages + 1, np.random.default_rng(0)
    table = 1 + np.arange(rows * pages, dtype=np.int32).reshape(rows, pages)
    columns = table, np.full(rows, context - new, np.int32), np.full(rows, new, np.int32)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    heads = [random(rows * new, n, HEAD_DIM) for n in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]
    pool = random(NUM_LAYERS * num_pages, NUM_KV_HEADS, 2, PAGE, HEAD_DIM)
    found: dict[str, Any] = {"rows": rows, "new_tokens": new, "context": context, "dtype": dtype}
    calls, pools, times = {}, {}, {"native": [], "cpu": []}
    for name in times:
        backend = find_backend(name, "cpu", vectorise=False)
        start = time.process_time()
        pools[name] = jnp.copy(pool)
        calls[name] = program(backend, num_pages).lower(pools[name], *heads, *columns).compile()
        found[f"{name}_compile_cpu_s"] = round(time.process_time() - start, 2)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.process_time()
            pools[name], _out = jax.block_until_ready(call(pools[name], *heads, *columns))
            times[name].append(time.process_time() - start)
    found |= {f"{name}_cpu_ms": round(1e3 * statistics.median(each), 2) for name, each in times.items()}
    return found | {"ratio": round(found["native_cpu_ms"] / found["cpu_cpu_ms"], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention on a CPU: the compiled library beside plain XLA.")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    out = parser.parse_args().out
    jax.config.update("jax_platforms", "cpu")
    results = []
    for dtype in ("bfloat16", "float32"):
        for result in map(functools.partial(measure, dtype=dtype), *zip(*BATCHES, strict=True)):
            print(json.dumps(result), flush=True)
            results.append(result)
    if out is not None:
        found = {"commit": commit(), "machine": machine(), "jax": jax.__version__, "layers": NUM_LAYERS}
        out.write_text(json.dumps(found | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
