"""A run of bench_serving's load against a scripted server, in virtual time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from scripted_server import Script, ScriptedServer
from virtual_time import run_in_virtual_time

from sgl_jax.tools.benchmark.arguments import parse
from sgl_jax.tools.benchmark.figures import ServingRun
from sgl_jax.tools.benchmark.machine_limits import MachineLimits, ModelCost, Roofline
from sgl_jax.tools.benchmark.protocols import Prompt
from sgl_jax.tools.benchmark.serving import ServerFacts, run_serving

COST = {"weight_bytes": 1_000_000_000, "kv_bytes_per_token": 10_000_000, "parameters_per_token": 50_000_000_000}
LIMITS = {
    "memory_gb_per_s": 20.0,
    "matmul_tflop_per_s": 10.0,
    "dtype": "bfloat16",
    "device_kind": "abacus",
    "num_devices": 2,
}


def serving_args(url: str, **changed: Any) -> argparse.Namespace:
    """bench_serving's flags, with no warm-up, but for those that are `changed`."""
    args = parse("bench_serving", ["--base-url", url, "--warmup-requests", "0", "--disable-tqdm"])[0]
    assert set(changed) <= set(vars(args))
    return argparse.Namespace(**vars(args) | changed)


ROOFLINE = Roofline(MachineLimits(**LIMITS), ModelCost(**COST))


async def ran(
    script: Script,
    prompts: Sequence[Prompt],
    tokenizer: Any = None,
    model: str | None = None,
    roofline: Roofline | None = None,
    **changed: Any,
) -> tuple[ServingRun, ScriptedServer]:
    server = ScriptedServer(script)
    async with server.running():
        facts = ServerFacts(model, None, None, roofline)
        run = await run_serving(serving_args(server.url, **changed), facts, prompts, tokenizer)
    return run, server


def bench(script: Script, prompts: Sequence[Prompt], *more: Any, **changed: Any) -> tuple[ServingRun, ScriptedServer]:
    return run_in_virtual_time(ran(script, prompts, *more, **changed))
