"""Any number of devices gives the tokens of one: the same engine on 1, 2 and 4 of 8 virtual CPU devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sgl_jax.models.config import DecoderConfig, RopeConfig
from sgl_jax.parallel.grid import Grid
from sgl_jax.parallel.placement import interleave

SCRIPT = Path(__file__).with_name("tp_engine.py")


@pytest.fixture(scope="module", params=["qwen3", "qwen2_moe", "gemma3_text", "deepseek_v2"])
def runs(request: pytest.FixtureRequest, shared_data: Path) -> dict[str, list[dict]]:
    """qwen3 and gemma3_text have one KV head, fewer than devices; gemma3_text a tied head; qwen2_moe biases and experts;
    deepseek_v2 one latent vector per token, whole on every device."""
    command = [sys.executable, str(SCRIPT), str(shared_data / "oracle" / request.param), "1", "2", "4-scan"]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(["1", "2", "4-scan"], map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("size", ["2", "4-scan"])
def test_tokens_and_logprobs_are_those_of_one_device(runs: dict[str, list[dict]], size: str) -> None:
    for one, many in zip(runs["1"], runs[size], strict=True):
        assert many["output_ids"] == one["output_ids"]
        a, b = one["meta_info"], many["meta_info"]
        assert [top[0][1] for top in a["output_top_logprobs"]] == [top[0][1] for top in b["output_top_logprobs"]]
        for key in ("input_token_logprobs", "output_token_logprobs"):
            first = 1 if key == "input_token_logprobs" else 0  # nothing comes before the first prompt token
            np.testing.assert_allclose(
                [x[0] for x in a[key][first:]], [x[0] for x in b[key][first:]], atol=1e-4, err_msg=key
            )


def test_interleave_gives_each_device_a_share_of_every_part() -> None:
    q, k = np.arange(8), 100 + np.arange(4)
    out = interleave(np.concatenate([q, k]), (8, 4), 2, 2)
    assert out.tolist() == [0, 1, 2, 3, 100, 101, 4, 5, 6, 7, 102, 103]


def test_interleave_repeats_heads_that_are_fewer_than_devices() -> None:
    q, k = np.arange(8), 100 + np.arange(4)
    out = interleave(np.concatenate([q, k]), (8, 4), 2, 4)
    assert out.tolist() == [0, 1, 100, 101, 2, 3, 100, 101, 4, 5, 102, 103, 6, 7, 102, 103]


def _config(**changes: int) -> DecoderConfig:
    sizes = {"vocab_size": 64, "intermediate_size": 32, "num_heads": 8, "num_kv_heads": 2} | changes
    return DecoderConfig(
        "X", hidden_size=16, num_layers=1, head_dim=4, rope=RopeConfig((1.0,)), context_length=8, **sizes
    )


def test_a_device_holds_its_share() -> None:
    share = _config().share(Grid(4))
    assert (share.num_heads, share.num_kv_heads, share.intermediate_size, share.vocab_size) == (2, 1, 8, 16)


@pytest.mark.parametrize(
    ("changes", "devices", "message"),
    [
        ({"num_heads": 6}, 4, "--tp-size is 4; it must divide the model's 6 attention heads"),
        ({"intermediate_size": 30}, 4, "--tp-size is 4; it must divide the model's 30 MLP neurons"),
        ({"vocab_size": 63}, 2, "--tp-size is 2; it must divide the model's 63 vocabulary entries"),
        ({"num_heads": 12, "num_kv_heads": 3}, 4, "--tp-size is 4; it must divide or be a multiple of the 3 KV heads"),
    ],
)
def test_a_size_that_does_not_divide_the_model_is_refused(changes: dict, devices: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(**changes).share(Grid(devices))
