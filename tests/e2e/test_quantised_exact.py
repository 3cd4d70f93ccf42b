"""Quantised checkpoints give, in float32, the tokens and logprobs of transformers with the matrices that they stand for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from exact import ALL_PROMPTS, GREEDY, Build, assert_oracle, assert_top5
from safetensors.numpy import load_file

import checkpoints
from sgl_jax.engine.core import Core
from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.models.families import decoder_config
from sgl_jax.models.linear import linear
from sgl_jax.models.loader import load_weights
from sgl_jax.models.scaled import Scaled
from simulated import Answer, Client

DATA = checkpoints.DATA / "quant"
EXACT = ["awq-g128-qwen3_moe", "gptq-int4-actorder-qwen2", "ct-w4a16-asym-qwen3"]
FORMATS = {
    "qwen3_moe": ["AWQ", "FP8 in blocks"],
    "qwen2": ["GPTQ", "W8A8"],
    "qwen3": ["W4A16", "FP8"],
    "llama": ["FP8"],
}
ROUNDED = ["fp8-block-qwen3_moe", "ct-fp8-static-llama", "ct-fp8-dynamic-qwen3"]  # made for rounded tokens


def oracle(name: str) -> dict[str, Any]:
    return json.loads((DATA / name / "oracle.json").read_text())


def started(build: Build, name: str, **options: Any) -> Core:
    return build(DATA / name, bucket=ALL_PROMPTS, page_size=16, max_total_tokens=1024, **options)


@pytest.mark.supports("stored quantised, dequantised while loading", FORMATS)
@pytest.mark.parametrize("name", EXACT)
def test_weights_alone(build: Build, name: str) -> None:
    core = started(build, name)
    assert core.info.quantization == ""  # nothing multiplies them faster on a CPU
    assert_oracle(core, DATA / name)


@pytest.mark.parametrize("name", ROUNDED)
def test_without_rounding_tokens(build: Build, name: str) -> None:
    """Along the golden's own text."""
    said = oracle(name)
    wanted = said["alternatives"]["weights only (activations not quantised)"]["cases"]
    core = started(build, name)
    for case, paths in zip(said["cases"], wanted, strict=True):
        number = len(case["prompt_ids"])
        (answer,) = answers(core, [case["prompt_ids"] + case["greedy_ids"][:-1]], max_tokens=1)
        assert answer.prompt is not None
        assert answer.prompt.logprobs is not None
        scored = [each for each in answer.prompt.logprobs[number:] if each is not None] + answer.logprobs
        assert len(scored) == 24
        assert_top5(scored, paths["top5_on_the_golden_path"])


def answers(core: Core, prompts: list[list[int]], **params: Any) -> list[Answer]:
    client = Client(core)
    for key, prompt in enumerate(prompts):
        client.submit(key, prompt, **GREEDY, logprobs=5, prompt_logprobs=5, **params)
    client.run()
    return [client.answers[key] for key in range(len(prompts))]


def test_int8_by_channel_for_tokens_rounded_to_int8(build: Build) -> None:
    """Sums are exact, so the tokens are the golden's."""
    name = "ct-w8a8-qwen2"
    core = started(build, name)
    assert core.info.quantization == "int8 by output, tokens rounded to int8"
    assert_oracle(core, DATA / name)


def test_a_product_is_that_of_the_maker_s_arithmetic() -> None:
    """On tokens with an outlier, rounded to int8, by the matrices that stand alone."""
    folder = DATA / "ct-w8a8-qwen2"
    checkpoint, probe = open_checkpoint(str(folder)), load_file(folder / "probe.safetensors")
    config = decoder_config(checkpoint.config, tensors=checkpoint.tensors)
    layers = load_weights(checkpoint, replace(config, weight_scheme=Scaled("int8", rounding="int8")), "float32").layers
    tried = 0
    for module in sorted({key.rpartition(".")[0] for key in probe}):
        layer, _, end = module.removeprefix("model.layers.").partition(".")
        matrix = {"self_attn.o_proj": layers[int(layer)].o, "mlp.down_proj": layers[int(layer)].down}.get(end)
        if matrix is not None:
            found, wanted = (
                np.asarray(linear(jnp.asarray(probe[f"{module}.x"]), matrix, site="o")),
                probe[f"{module}.y"],
            )
            largest = np.abs(wanted).max()
            np.testing.assert_allclose(found, wanted, atol=1e-4 * largest)
            assert np.abs(found - probe[f"{module}.y_weight_only"]).max() > 1e-3 * largest
            tried += 1
    assert tried == 2


def test_a_plain_checkpoint_is_rounded_while_it_is_read(build: Build, stories260k: Path) -> None:
    """Tokens differ a little; bytes are a quarter of float32's, but for embeddings and norms."""
    plain, rounded = (build(stories260k, bucket=ALL_PROMPTS, quantization=each) for each in (None, "int8"))
    assert (plain.info.quantization, rounded.info.quantization) == ("", "int8 by output, tokens rounded to int8")
    assert 0.25 < rounded.info.weight_bytes / plain.info.weight_bytes < 0.4
    prompt = [1, 403, 407, 261, 378]
    one, two = (answers(core, [prompt], max_tokens=24)[0] for core in (plain, rounded))
    assert one.tokens[:8] == two.tokens[:8]
    ours, theirs = ([each.logprob for each in answer.logprobs[:8]] for answer in (one, two))
    assert 0 < np.abs(np.subtract(ours, theirs)).max() < 0.2
