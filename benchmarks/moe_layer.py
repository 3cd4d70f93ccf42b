"""Compare a mixture-of-experts layer by grouped matmul with computing every expert for every token.

    python benchmarks/moe_layer.py --output benchmarks/moe_layer.json

Both forms run in turn in one process, so their ratio is what counts on a shared machine.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from provenance import commit, machine

from sgl_jax.models.decoder_config import MoeConfig
from sgl_jax.models.layers import gated
from sgl_jax.models.moe import LayerExperts, moe_layer, route
from sgl_jax.models.weights import Experts, MoeWeights
from sgl_jax.ops.grouped_matmul import native

D, MOE = 1024, MoeConfig(num_experts=64, experts_per_token=8, intermediate_size=384)
SILU = functools.partial(gated, activation="silu")


def grouped(x: jax.Array, w: MoeWeights, at: LayerExperts) -> jax.Array:
    valid = jnp.ones(len(x), bool)
    return moe_layer(x, w, at, MOE, SILU, valid, native.grouped_matmul)


def dense(x: jax.Array, w: MoeWeights, at: LayerExperts) -> jax.Array:
    """Compute every expert for every token, with weight zero where it was not chosen."""
    weights, ids = route(x, w, MOE)
    share = (
        jnp.zeros((len(x), MOE.num_experts), x.dtype).at[jnp.arange(len(x))[:, None], ids].set(weights.astype(x.dtype))
    )
    h = SILU(jnp.einsum("efd,td->etf", at.experts.gate_up[at.layer], x))
    return jnp.einsum("edf,etf,te->td", at.experts.down[at.layer], h, share)


def seconds(function, *args) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*shape: int) -> jax.Array:
        return (jax.random.normal(next(keys), shape) * 0.02).astype(args.dtype)

    e, f = MOE.num_experts, MOE.intermediate_size
    at = LayerExperts(Experts(normal(1, e, 2 * f, D), None, normal(1, e, D, f), None), jnp.int32(0))
    w = MoeWeights(normal(e, D), None, None, at.experts, None, None, None)
    results = []
    for tokens in args.tokens:
        x = normal(tokens, D) * 50
        forms = [jax.jit(grouped), jax.jit(dense)]
        outs = [form(x, w, at) for form in forms]
        error = float(jnp.abs(outs[0] - outs[1]).max() / jnp.abs(outs[1]).max())
        times = [[seconds(form, x, w, at) for form in forms] for _ in range(args.runs)]
        ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        results.append(
            {
                "tokens": tokens,
                "grouped_ms": round(ours * 1e3, 2),
                "dense_ms": round(theirs * 1e3, 2),
                "dense_over_grouped": round(theirs / ours, 2),
                "largest_relative_difference": round(error, 4),
            }
        )
        print(results[-1], file=sys.stderr)
    report = {
        "layer": {"D": D, "E": e, "X": MOE.experts_per_token, "F": f, "dtype": args.dtype},
        "results": results,
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "machine": machine(),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
