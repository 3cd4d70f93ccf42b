"""Measure products on a CPU: the compiled library beside plain XLA, in turn.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/cpu_products.py --out benchmarks/cpu/products.json

The variable is that of the engine process. One program has the products of all layers and the head of SmolLM2-135M, with
weights of their own: processor milliseconds of a run, the median of several. "int8" has matrices of int8 in the layers, and a
head of bfloat16; with "int8-weight-only" the tokens are not rounded, and plain XLA is left out, since it takes seconds.
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

from sgl_jax.models.scaled import Scaled
from sgl_jax.ops.cpu.library import find_library
from sgl_jax.ops.dense.api import DenseProduct, plain_product
from sgl_jax.ops.dense.cpu_library import library_product
from sgl_jax.ops.quantized_matmul.api import Planes, QuantizedMatmul
from sgl_jax.ops.quantized_matmul.compiled import library_matmul
from sgl_jax.ops.quantized_matmul.native import quantized_matmul

NUM_LAYERS, D, F, QKV, VOCAB = 30, 576, 1536, 960, 49152  # SmolLM2-135M
TOKENS = {"bfloat16": (1, 2, 4, 8, 16, 32, 64), "float32": (1, 2, 4, 8, 16, 32, 64)}
TOKENS |= dict.fromkeys(("int8", "int8-weight-only"), (1, 2, 4, 8, 16, 32, 64, 256))
ROUNDS = 7
type Weights = tuple[list[dict[str, Any]], jax.Array]


def draw_weights(kind: str) -> Weights:
    is_int8 = kind.startswith("int8")
    dtype = "bfloat16" if is_int8 else kind
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((rows, columns), np.float32) / columns**0.5, dtype)

    shapes = {"qkv": (QKV, D), "o": (D, D), "gate_up": (2 * F, D), "down": (D, F)}
    layers = [{name: matrix(*shape) for name, shape in shapes.items()} for _ in range(NUM_LAYERS)]
    if is_int8:
        layers = [
            {name: Planes(*Scaled("int8").quantise(np.asarray(w))[:2]) for name, w in each.items()} for each in layers
        ]
    return jax.tree.map(jnp.asarray, layers), matrix(VOCAB, D)


def product_of(
    x: Any, w: Any, out: Any = None, *, dense: DenseProduct, matmul: QuantizedMatmul, kind: str
) -> jax.Array:
    """Multiply with a matrix of floats or of int8."""
    return matmul(x, w, "int8" if kind == "int8" else None, out) if isinstance(w, Planes) else dense(x, w, out)


def program(product: Any) -> jax.stages.Wrapped:
    def run(x, layers, head):
        for w in layers:
            x += product(product(x, w["qkv"])[:, :D], w["o"])
            gate, up = jnp.split(product(x, w["gate_up"]), 2, axis=-1)
            x += product(jax.nn.silu(gate) * up, w["down"])
            x /= jnp.sqrt(jnp.square(x).mean(-1, keepdims=True))
        return product(x, head, jnp.float32)

    return jax.jit(run)


def measure(tokens: int, kind: str, weights: Weights) -> dict[str, Any]:
    library = find_library()
    assert library is not None
    x = jnp.asarray(np.random.default_rng(1).standard_normal((tokens, D), np.float32), weights[1].dtype)
    products = {
        "plain": (plain_product, quantized_matmul),
        "library": (library_product(library), library_matmul(library)),
    }
    if kind == "int8-weight-only":
        del products["plain"]
    calls = {}
    for name, (dense, matmul) in products.items():
        product = functools.partial(product_of, dense=dense, matmul=matmul, kind=kind)
        calls[name] = program(product).lower(x, *weights).compile()
        jax.block_until_ready(calls[name](x, *weights))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.process_time()
            jax.block_until_ready(call(x, *weights))
            times[name].append(time.process_time() - start)
    found = {name: round(1e3 * statistics.median(each), 2) for name, each in times.items()}
    ratio = {"ratio": round(found["plain"] / found["library"], 2)} if "plain" in found else {}
    return {"tokens": tokens, "dtype": kind} | {f"{name}_cpu_ms": each for name, each in found.items()} | ratio


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Products of tokens with matrices: the compiled library beside plain XLA."
    )
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    out = parser.parse_args().out
    jax.config.update("jax_platforms", "cpu")
    results = []
    for kind, numbers in TOKENS.items():
        weights = draw_weights(kind)
        for tokens in numbers:
            results.append(measure(tokens, kind, weights))
            print(json.dumps(results[-1]), flush=True)
    if out is not None:
        found = {"commit": commit(), "machine": machine(), "jax": jax.__version__}
        out.write_text(json.dumps(found | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
