"""The arithmetic of a step, against formulas written out by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest

from sgl_jax.models.decoder_config import DecoderConfig, MlaConfig
from sgl_jax.ops.attention.backends import find_backend
from sgl_jax.parallel.grid import Grid
from sgl_jax.planning.cost import Rates, StepCost, step_cost
from sgl_jax.planning.model import find_model
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.pool import pools_of
from sgl_jax.settings.server_args import ServerArgs

QWEN3_8B = find_model(ServerArgs(model_path="Qwen3-8B")).config
NATIVE = find_backend("native", "cpu", vectorise=False)


def cost_of(model: DecoderConfig, devices: int, dtype: str, bucket: Bucket, context: int) -> StepCost:
    pool = pools_of(model.shard(Grid(devices)), NATIVE, dtype)[0]
    return step_cost(model, Grid(devices), pool, bucket, context, weight_dtype=dtype, compute_dtype=dtype)


def test_a_decode_step_of_qwen3_8b_on_four_devices() -> None:
    cost = cost_of(QWEN3_8B, 4, "bfloat16", Bucket(256, 256), 1024)
    # Per device: 36 layers of q 1024, k 256, v 256 out of 4096; o 1024 in; gate and up 3072 out, down 3072 in.
    layer = 4096 * (1024 + 256 + 256) + 1024 * 4096 + 3 * 4096 * 3072
    head = 151936 // 4 * 4096
    attention = 4 * 8 * 128 * 36 * 256 * 1024  # two products of 8 heads with 1024 keys of 128
    assert cost.flops == 2 * 256 * (36 * layer + head) + attention
    norms = 36 * (2 * 2 * 4096 + 2 * 128)  # a layer's inputs have float32
    token_kv = 36 * 2 * 2 * 128  # 2 KV heads
    assert cost.memory_bytes == 2 * (36 * layer + norms + head + 256 * 4096 + token_kv * 256 * (1024 + 1))
    assert cost.reduced_bytes == (2 * 36 + 1) * 256 * 4096 * 2


def test_a_wide_step_multiplies_every_draft_and_reads_each_rows_kv_once() -> None:
    plain, wide = (cost_of(QWEN3_8B, 1, "bfloat16", Bucket(8 * w, 8, w), 1024) for w in (1, 4))
    assert wide.flops == 4 * plain.flops
    token_kv = 2 * 36 * 2 * 8 * 128
    assert wide.memory_bytes - plain.memory_bytes == 24 * (2 * 4096 + token_kv)  # embedding and new KV of the drafts


def test_a_prompt_step_has_whole_prompts_or_the_end_of_one() -> None:
    whole = cost_of(QWEN3_8B, 1, "bfloat16", Bucket(2048, 256), 1024)  # two prompts
    end = cost_of(QWEN3_8B, 1, "bfloat16", Bucket(512, 256), 1024)  # tokens 512 to 1023 of one
    layer = 4096 * (32 + 16) * 128 + 4096 * 4096 + 3 * 4096 * 12288
    head = 151936 * 4096
    per_key = 4 * 32 * 128 * 36
    assert whole.flops == 2 * (2048 * 36 * layer + 256 * head) + per_key * 2 * sum(range(1, 1025))
    assert end.flops == 2 * (512 * 36 * layer + 256 * head) + per_key * sum(range(513, 1025))
    token_kv = 36 * 2 * 8 * 128
    weights = 36 * (layer + 2 * 2 * 4096 + 2 * 128) + head  # norms of a layer's input in float32
    assert whole.memory_bytes == 2 * (weights + 2048 * 4096 + token_kv * (2048 + 2048))
    assert end.memory_bytes == 2 * (weights + 512 * 4096 + token_kv * (1024 + 512))
    assert whole.reduced_bytes == 0  # one device


def test_a_window_limits_the_keys_and_the_kv_read() -> None:
    windows = tuple(256 if layer % 2 else None for layer in range(36))
    mixed = dataclasses.replace(QWEN3_8B, sliding_windows=windows)
    token_kv = 2 * 8 * 128 * 2
    full = cost_of(QWEN3_8B, 1, "bfloat16", Bucket(8, 8), 1024)
    half = cost_of(mixed, 1, "bfloat16", Bucket(8, 8), 1024)
    assert full.memory_bytes - half.memory_bytes == token_kv * 18 * 8 * (1024 - 256)
    assert full.flops - half.flops == 4 * 32 * 128 * 18 * 8 * (1024 - 256)
    prompt = cost_of(mixed, 1, "bfloat16", Bucket(1024, 256), 1024)
    whole = cost_of(QWEN3_8B, 1, "bfloat16", Bucket(1024, 256), 1024)
    seen = sum(min(position + 1, 256) for position in range(1024))
    assert whole.flops - prompt.flops == 4 * 32 * 128 * 18 * (sum(range(1, 1025)) - seen)


def test_an_expert_is_multiplied_with_its_tokens_and_read_if_any_token_chose_it() -> None:
    moe = find_model(ServerArgs(model_path="Qwen3-30B-A3B")).config
    one, many = (cost_of(moe, 1, "bfloat16", Bucket(n, n), 1024) for n in (1, 4096))
    attention = 2048 * (32 + 2 * 4) * 128 + 32 * 128 * 2048
    router, expert = 2048 * 128, 3 * 2048 * 768
    head, per_key = 151936 * 2048, 4 * 32 * 128 * 48
    assert one.flops == 2 * (48 * (attention + router + 8 * expert) + head) + per_key * 1024
    assert many.flops == 4096 * one.flops
    weights = 48 * (attention + router + 2 * 2 * 2048 + 2 * 128) + head
    assert one.memory_bytes == pytest.approx(2 * (weights + 48 * 8 * expert + 2048) + 98304 * 1025)
    all_experts = 2 * (weights + 48 * 128 * expert + 4096 * 2048) + 4096 * 98304 * 1025
    assert many.memory_bytes == pytest.approx(all_experts, rel=1e-6)


@pytest.mark.parametrize(
    ("cost", "limit", "seconds"),
    [(StepCost(10, 1, 1), "compute", 10), (StepCost(1, 10, 1), "memory", 5), (StepCost(1, 1, 100), "links", 25)],
)
def test_the_slowest_resource_is_the_limit(cost: StepCost, limit: str, seconds: float) -> None:
    bound = cost.bound(Rates(flops=1, bytes_per_s=2, all_reduce_bytes_per_s=4))
    assert (bound.limit, bound.seconds) == (limit, seconds)


def test_sums_that_are_waited_for_come_after_everything_else() -> None:
    bound = StepCost(10, 4, 100, num_sums=3).bound(Rates(1, 2, 4, all_reduce_s=0.5))
    assert (bound.links_s, bound.seconds, bound.in_turn_s) == (26.5, 26.5, 36.5)


def test_one_device_waits_for_no_other() -> None:
    assert StepCost(1, 1, 0).bound(Rates(1, 1, math.inf)).links_s == 0


def test_latent_attention_reads_one_vector_per_token_and_takes_its_keys_as_values() -> None:
    latent = dataclasses.replace(QWEN3_8B, num_kv_heads=1, mla=MlaConfig(512, None, 128, 64, 128))
    near, far = (cost_of(latent, 4, "bfloat16", Bucket(8, 8), context) for context in (1024, 2048))
    assert far.memory_bytes - near.memory_bytes == 2 * 36 * 576 * 8 * 1024
    assert far.flops - near.flops == 36 * 8 * 8 * 1024 * 2 * (576 + 512)  # 8 of 32 heads
