"""Measure products of few tokens on a CPU: the compiled library beside plain XLA, in turn.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/cpu_products.py --out benchmarks/cpu/products.json

The variable is that of the engine process. One program has the products of all layers and the head of SmolLM2-135M, with
weights of their own: processor milliseconds of a run, the median of several.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from provenance import commit, machine

from sgl_jax.ops.cpu.library import find_library
from sgl_jax.ops.dense import DenseProduct, library_product, plain_product

NUM_LAYERS, D, F, QKV, VOCAB = 30, 576, 1536, 960, 49152  # SmolLM2-135M
TOKENS = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 7


def draw_weights(dtype: str) -> tuple[list[dict[str, jax.Array]], jax.Array]:
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((rows, columns), np.float32) / columns**0.5, dtype)

    shapes = {"qkv": (QKV, D), "o": (D, D), "gate_up": (2 * F, D), "down": (D, F)}
    return [{name: matrix(*shape) for name, shape in shapes.items()} for _ in range(NUM_LAYERS)], matrix(VOCAB, D)


def program(product: DenseProduct) -> jax.stages.Wrapped:
    def run(x, layers, head):
        for w in layers:
            x += product(product(x, w["qkv"])[:, :D], w["o"])
            gate, up = jnp.split(product(x, w["gate_up"]), 2, axis=-1)
            x += product(jax.nn.silu(gate) * up, w["down"])
            x /= jnp.sqrt(jnp.square(x).mean(-1, keepdims=True))
        return product(x, head, jnp.float32)

    return jax.jit(run)


def measure(tokens: int, dtype: str, weights: tuple[list[dict[str, jax.Array]], jax.Array]) -> dict[str, Any]:
    library = find_library()
    assert library is not None
    x = jnp.asarray(np.random.default_rng(1).standard_normal((tokens, D), np.float32), dtype)
    calls, times = {}, {"plain": [], "library": []}
    for name, product in (("plain", plain_product), ("library", library_product(library))):
        calls[name] = program(product).lower(x, *weights).compile()
        jax.block_until_ready(calls[name](x, *weights))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.process_time()
            jax.block_until_ready(call(x, *weights))
            times[name].append(time.process_time() - start)
    found = {f"{name}_cpu_ms": round(1e3 * statistics.median(each), 2) for name, each in times.items()}
    ratio = round(found["plain_cpu_ms"] / found["library_cpu_ms"], 2)
    return {"tokens": tokens, "dtype": dtype, **found, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description="Products of few tokens: the compiled library beside plain XLA.")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    out = parser.parse_args().out
    jax.config.update("jax_platforms", "cpu")
    results = []
    for dtype in ("bfloat16", "float32"):
        weights = draw_weights(dtype)
        for tokens in TOKENS:
            results.append(measure(tokens, dtype, weights))
            print(json.dumps(results[-1]), flush=True)
    if out is not None:
        found = {"commit": commit(), "machine": machine(), "jax": jax.__version__}
        out.write_text(json.dumps(found | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
