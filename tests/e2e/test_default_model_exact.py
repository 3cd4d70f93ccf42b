"""The model that `make serve` starts gives, in float32, the tokens and logprobs of Hugging Face transformers."""

from __future__ import annotations

import json
from pathlib import Path

from exact import GREEDY, Build, assert_top5

from sgl_jax.runtime.buckets import Bucket
from simulated import Client


def test_the_default_model_gives_transformers_tokens_and_logprobs(build: Build, golden: Path, smollm2: Path) -> None:
    cases = json.loads((golden / "smollm2-135m-instruct.json").read_text(encoding="utf-8"))["cases"]
    core = build(smollm2, bucket=Bucket(4, 4), optimised=True, max_total_tokens=1024, context_length=256)
    client = Client(core)
    for key, case in enumerate(cases):
        client.submit(key, case["prompt_ids"], max_tokens=64, logprobs=5, **GREEDY)
    client.run()
    for key, case in enumerate(cases):
        assert client.tokens[key] == case["output_ids_64_ignore_eos"], case["name"]
        assert_top5(client.answers[key].logprobs, case["top5_logprobs_first8"])
