"""`python tp_engine.py FOLDER SIZE…`: what an engine of each size answers, as JSON lines. Run with 8 virtual CPU devices.

SIZE is a --tp-size; with "-scan" after it the layers are stacked and scanned, as on accelerators. The requests use every feature whose state or arithmetic is divided over the devices.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np

import sgl_jax
from sgl_jax.runtime import platform

COMMON = {"max_new_tokens": 16, "ignore_eos": True}
PARAMS = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"temperature": 0, "logit_bias": {"17": 4.0, "300": 3.5, "511": 3.0}},
    {"temperature": 1.0, "sampling_seed": 1},
    {"temperature": 0.9, "sampling_seed": 2, "top_k": 20},
    {"temperature": 1.2, "sampling_seed": 3, "top_p": 0.8},
    {"temperature": 1.5, "sampling_seed": 4, "top_k": 200, "top_p": 0.95, "min_p": 0.01},
]


def answers(folder: str, tp_size: int) -> list[dict]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 500, n).tolist() for n in (1, 5, 20, 40, 33, 2, 17)]
    with sgl_jax.Engine(
        model_path=folder,
        tp_size=tp_size,
        dtype="float32",
        max_running_requests=8,
        chunked_prefill_size=8,
        max_total_tokens=2048,
    ) as engine:
        out = engine.generate(
            input_ids=prompts,
            sampling_params=[p | COMMON for p in PARAMS],
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=5,
        )
        assert engine.info.num_devices == tp_size
    return out


if __name__ == "__main__":
    for size in sys.argv[2:]:
        tp_size, _, form = size.partition("-")
        cpu = dataclasses.replace(
            platform.PLATFORMS["cpu"], stacks_layers=form == "scan", vectorises_rows=form == "scan"
        )
        platform.PLATFORMS["cpu"] = cpu
        print(json.dumps(answers(sys.argv[1], int(tp_size))), flush=True)
