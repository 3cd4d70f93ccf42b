"""`python grid_engine.py FOLDER GRID…`: what an engine on each grid of devices answers, as JSON lines. Run with 8 virtual
CPU devices.

GRID is "1", or sizes like "tp2-dp2-ep4"; "sp" adds sequence parallelism, "scan" stacks and scans the layers, as some
accelerators do, and "int8" holds their matrices as int8 with scales; "kvint8" and "kvfp8" hold KV in eight bits. "ngram" drafts by n-grams, "self" by the model itself, and
"eagle3" by the head beside FOLDER. "parts" computes steps in parts. "lora" asks for the adapters of tests/data/lora/llama in turn, and "json" for a form. The requests use every feature whose state or arithmetic is divided over the devices.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

import sgl_jax
from sgl_jax.engine import weight_files
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.families import decoder_config
from sgl_jax.models.scaled import Scaled
from sgl_jax.ops.attention.api import RaggedBatch, batch_part
from sgl_jax.runtime import forward, platform

STORIES = str(Path(__file__).parents[1] / "data" / "stories260k")  # a tokenizer for a model without one
LORA = Path(__file__).parents[1] / "data" / "lora" / "llama"
COMMON = {"max_new_tokens": 16, "ignore_eos": True}
FORM = {"json_schema": {"type": "array", "items": {"type": "string"}}, "ignore_eos": False}
PARAMS = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"temperature": 0, "logit_bias": {"17": 4.0, "300": 3.5, "511": 3.0}},
    {"temperature": 1.0, "sampling_seed": 1},
    {"temperature": 0.9, "sampling_seed": 2, "top_k": 20},
    {"temperature": 1.2, "sampling_seed": 3, "top_p": 0.8},
    {"temperature": 1.5, "sampling_seed": 4, "top_k": 200, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 0},
]


def flags(grid: str) -> dict[str, Any]:
    sizes = {f"{kind}_size": int(size) for kind, size in re.findall(r"(tp|dp|ep)(\d+)", grid)}
    words = grid.split("-")
    kv = "int8" if "kvint8" in words else "fp8_e4m3" if "kvfp8" in words else "auto"
    parts = {"collective_overlap_tokens": 1, "chunked_prefill_size": 32 * sizes.get("dp_size", 1)}
    return (
        sizes | {"enable_sequence_parallel": "sp" in words, "kv_cache_dtype": kv} | (parts if "parts" in words else {})
    )


def speculation(folder: str, grid: str) -> dict[str, Any]:
    drafts: dict[str, dict[str, Any]] = {
        "ngram": {"speculative_algorithm": "NGRAM"},
        "self": {"speculative_algorithm": "STANDALONE", "speculative_draft_model_path": folder},
        "eagle3": {
            "speculative_algorithm": "EAGLE3",
            "speculative_draft_model_path": folder.replace("target", "draft"),
        },
    }
    asked = [flags for name, flags in drafts.items() if name in grid.split("-")]
    return asked[0] | {"speculative_num_draft_tokens": 4, "speculative_disable_by_batch_size": 8} if asked else {}


def adapters(grid: str) -> list[str]:
    """Return an adapter's name or nothing for each request."""
    names = ["r8-all", "", "r16-rslora", "r4-qv", "r8-patterns", "", "r8-some-layers", "r8-all"]
    return names if "lora" in grid.split("-") else [""] * len(names)


def answers(folder: str, grid: str) -> dict[str, Any]:
    """Answer requests that fill the pool, so that some are preempted, and others that continue the same prompts."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 500, n).tolist() for n in (1, 5, 20, 40, 33, 2, 17, 28)]
    if (
        oracle := Path(folder).parent / "oracle.json"
    ).exists():  # texts that the head was trained on, asked for greedily
        prompts[0], _, prompts[-1] = (case["prompt_ids"][-40:] for case in json.loads(oracle.read_text())["cases"])
    sizes, lora, form = flags(grid), adapters(grid), FORM if "json" in grid.split("-") else {}
    paths = tuple(f"{name}={LORA / name}" for name in sorted({*lora} - {""}))
    with sgl_jax.Engine(
        model_path=folder,
        dtype="float32",
        page_size=4,
        max_running_requests=8,
        max_total_tokens=96 * sizes.get("dp_size", 1),
        tokenizer_path=None if (Path(folder) / "tokenizer.json").exists() else STORIES,
        **{"chunked_prefill_size": 16} | sizes,
        **speculation(folder, grid),
        **({"lora_paths": paths, "max_loras_per_batch": 2} if paths else {}),
    ) as engine:
        out = engine.generate(
            input_ids=prompts,
            sampling_params=[p | COMMON | form for p in PARAMS],
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=5,
            lora_path=[name or None for name in lora],
        )
        longer = [([*prompt, 7, 11, 13], name or None) for prompt, name in zip(prompts[-2:], lora[-2:], strict=True)]
        more = [
            engine.generate(input_ids=prompt, sampling_params=PARAMS[0] | COMMON | form, lora_path=name)
            for prompt, name in longer + longer
        ]
        assert engine.info.num_devices == sizes.get("tp_size", 1) * sizes.get("dp_size", 1)
        stats = engine.stats
    return {
        "answers": out,
        "more": [each["output_ids"] for each in more],
        "preemptions": stats.preemptions,
        "cached_tokens": stats.cached_tokens,
        "compiles_after_ready": stats.compiles_after_ready,
        "drafts": (stats.drafted_tokens, stats.accepted_drafts),
        "parts": sorted(parts_computed),
    }


parts_computed: set[int] = set()  # numbers of parts of the steps that were traced


def counted_part(batch: RaggedBatch, number: int, num_parts: int) -> RaggedBatch:
    parts_computed.add(num_parts)
    return batch_part(batch, number, num_parts)


def quantised_config(*args: Any) -> DecoderConfig:
    return dataclasses.replace(decoder_config(*args), weight_scheme=Scaled("int8", 8))


if __name__ == "__main__":
    forward.batch_part = counted_part
    for grid in sys.argv[2:]:
        parts_computed.clear()
        scan = "scan" in grid.split("-")
        cpu = dataclasses.replace(platform.PLATFORMS["cpu"], stacks_layers=scan, vectorises_rows=scan)
        platform.PLATFORMS["cpu"] = cpu
        weight_files.decoder_config = quantised_config if "int8" in grid.split("-") else decoder_config
        print(json.dumps(answers(sys.argv[1], grid)), flush=True)
