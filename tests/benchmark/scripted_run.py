"""A run of bench_serving's load against a scripted server, in virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scripted_server import Script, ScriptedServer
from virtual_time import run_in_virtual_time

from sgl_jax.benchmark.figures import ServingRun
from sgl_jax.benchmark.records import Prompt
from sgl_jax.benchmark.serving import ServingConfig, run_serving

COST = {"weight_bytes": 1_000_000_000, "kv_bytes_per_token": 10_000_000, "parameters_per_token": 50_000_000_000}
INFO = {"engine": COST | {"vocab_size": 7}}
LIMITS = {
    "memory_gb_per_s": 20.0,
    "matmul_tflop_per_s": 10.0,
    "dtype": "bfloat16",
    "device_kind": "abacus",
    "num_devices": 2,
}


async def ran(
    script: Script, prompts: Sequence[Prompt], tokenizer: Any = None, **config: Any
) -> tuple[ServingRun, ScriptedServer]:
    server = ScriptedServer(script)
    config = {"backend": "sgl-jax", "warmup_requests": 0, "show_progress": False} | config
    async with server.running():
        run = await run_serving(ServingConfig(base_url=server.url, **config), prompts, tokenizer)
    return run, server


def bench(
    script: Script, prompts: Sequence[Prompt], tokenizer: Any = None, **config: Any
) -> tuple[ServingRun, ScriptedServer]:
    return run_in_virtual_time(ran(script, prompts, tokenizer, **config))
