"""Tests of the division of a device's memory, and of the messages when it does not suffice."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

import jax
import pytest

from messages import says
from sgl_jax.models.decoder_config import DecoderConfig, MlaConfig, MoeConfig, RopeConfig
from sgl_jax.ops.attention import native
from sgl_jax.ops.attention.backends import NoSuchBackend, find_backend
from sgl_jax.ops.cpu import library
from sgl_jax.ops.dense.api import no_gated_product, plain_product
from sgl_jax.ops.norm_rope import PLAIN_NORMS
from sgl_jax.ops.quantized_matmul.native import quantized_matmul
from sgl_jax.parallel.grid import Grid
from sgl_jax.runtime import memory, platform
from sgl_jax.runtime.memory import DoesNotFit, MemoryPlan, device_memory, plan_memory
from sgl_jax.runtime.platform import PLATFORMS, dense_for, kernels_for
from sgl_jax.runtime.pool import pools_of

CONFIG = DecoderConfig(
    architecture="X",
    vocab_size=100,
    hidden_size=64,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope=RopeConfig((1.0,) * 8),
    context_length=2048,
)
# K and V in 2 layers with 2 heads of 16 values of 4 bytes: 512 bytes per token.
OPTIONS = {
    "total_bytes": 10_000_000,
    "weight_bytes": 1_000_000,
    "state_bytes": 0,
    "bytes_per_token": 512,
    "page_size": 16,
    "context_length": 2048,
    "num_rows": 4,
    "mem_fraction": 0.5,
    "max_total_tokens": None,
}
CPU, TPU = PLATFORMS["cpu"], PLATFORMS["tpu"]


def test_free_memory_is_what_kernel_and_control_groups_leave(tmp_path: Path) -> None:
    meminfo, limit = tmp_path / "proc/meminfo", tmp_path / "sys/fs/cgroup/memory.max"
    for file in (meminfo, limit):
        file.parent.mkdir(parents=True)
    cpu = jax.devices("cpu")[0]
    assert memory.free_memory(cpu, tmp_path) > 0
    meminfo.write_text("MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:  4000 kB\n")
    assert memory.free_memory(cpu, tmp_path) == 4000 * 1024
    limit.write_text("3000\n")
    limit.with_name("memory.current").write_text("1000\n")
    assert memory.free_memory(cpu, tmp_path) == 2000


def test_bytes_of_a_token() -> None:
    native = find_backend("native", "cpu", vectorise=False)
    padded = dataclasses.replace(native, pool_head_dim=lambda head_dim: 128)
    assert pools_of(CONFIG, native, "float32")[0].bytes_per_token == 512
    assert pools_of(CONFIG, padded, "float32")[0].bytes_per_token == 4096
    assert pools_of(CONFIG, native, "float32")[0].shape(num_pages=10, page_size=16) == (20, 2, 2, 16, 16)


def test_a_latent_pool_keeps_one_vector_for_all_heads_on_every_device() -> None:
    native = find_backend("native", "cpu", vectorise=False)
    latent = dataclasses.replace(CONFIG, num_kv_heads=1, mla=MlaConfig(512, None, 128, 64, 128))
    for shard in (latent, latent.shard(Grid(2)), latent.shard(Grid(4))):
        assert pools_of(shard, native, "float32")[0].shape(num_pages=10, page_size=16) == (20, 1, 1, 16, 576)
        assert pools_of(shard, native, "float32")[0].bytes_per_token == 2 * 576 * 4


def test_a_tpu_launch_takes_fa_for_heads_and_for_latent_vectors() -> None:
    latent = dataclasses.replace(CONFIG, num_kv_heads=1, mla=MlaConfig(512, None, 128, 64, 128))
    fa = find_backend("fa", "tpu", vectorise=True)
    assert fa.latent
    for model in (CONFIG, latent):
        assert kernels_for(None, PLATFORMS["tpu"], model).attention == fa


def test_a_tpu_launch_has_kernels_for_dense_layers_of_models_without_experts() -> None:
    def kernels(model: DecoderConfig) -> tuple:
        found = kernels_for(None, PLATFORMS["tpu"], model)
        return found.dense, found.gated, found.norms

    assert kernels(CONFIG) == dense_for("tpu")
    plain = plain_product, no_gated_product, PLAIN_NORMS
    assert kernels(dataclasses.replace(CONFIG, moe=MoeConfig(8, 2, 64))) == plain
    found = kernels_for("native", PLATFORMS["gpu"], CONFIG)
    assert (found.dense, found.gated, found.norms, dense_for("gpu")) == (*plain, None)


def test_the_budget_less_the_weights_becomes_whole_pages_and_a_scratch_page() -> None:
    plan = plan_memory(TPU, **OPTIONS)
    assert plan == MemoryPlan(10_000_000, 5_000_000, 1_000_000, 512, 16, 488 + 1)  # 7812 tokens: 488.25 pages
    assert plan.num_tokens == 488 * 16
    assert plan.kv_bytes == 489 * 16 * 512


def test_max_total_tokens_is_what_requests_get() -> None:
    plan = plan_memory(CPU, **(OPTIONS | {"max_total_tokens": 100}))
    assert plan.num_tokens == 96


def test_the_platform_sets_share_and_limit_where_the_user_does_not() -> None:
    cpu = dataclasses.replace(CPU, mem_fraction=0.25, max_pool_tokens=1024)
    plan = plan_memory(cpu, **(OPTIONS | {"mem_fraction": None}))
    assert (plan.budget_bytes, plan.num_tokens) == (2_500_000, 2048)  # at least one request of full context
    plan = plan_memory(cpu, **(OPTIONS | {"mem_fraction": None, "context_length": 512}))
    assert plan.num_tokens == 1024


@pytest.mark.parametrize(
    ("fitting", "num_tokens"),
    [(2928, 2816), (2800, 2560), (7812, 7680), (10**6, 2 * 4 * 2048), (10**9, 2 * 4 * 2048)],
)
def test_a_share_of_a_cpu_s_memory_is_taken_as_far_as_rows_and_a_cache_can_use_it(
    fitting: int, num_tokens: int
) -> None:
    """A pool between two sizes of four significant bits takes the lower one, so that programs stay in the cache."""
    cpu = dataclasses.replace(CPU, max_pool_tokens=1024)
    total = 2 * (1_000_000 + 512 * fitting)
    assert plan_memory(cpu, **(OPTIONS | {"total_bytes": total})).num_tokens == num_tokens
    assert plan_memory(TPU, **(OPTIONS | {"total_bytes": total})).num_tokens == fitting // 16 * 16


@pytest.mark.skipif(library.find_library() is None, reason="the library was not built")
def test_cpus_multiply_in_the_library() -> None:
    found = kernels_for(None, PLATFORMS["cpu"], CONFIG)
    assert isinstance(found.dense, functools.partial)
    assert isinstance(found.quantized, functools.partial)
    assert found.dense.keywords == found.quantized.keywords == {"library": library.find_library(), "live": None}


def test_without_the_library_for_cpus_attention_is_plain_and_a_line_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "LIBRARIES", {})
    monkeypatch.delitem(platform.logger.__dict__, "said_once", raising=False)
    for _ in range(2):
        found = kernels_for(None, PLATFORMS["cpu"], CONFIG)
        assert found.attention.attend.func is native.paged_attention
        assert (found.dense, found.quantized) == (plain_product, quantized_matmul)
    [line] = [record.getMessage() for record in caplog.records if record.name == "sgl_jax.runtime.platform"]
    assert says(line, "plain XLA … slower … C++ compiler … g++")
    with pytest.raises(NoSuchBackend, match=r"--attention-backend cpu.* C\+\+ compiler.* native"):
        kernels_for("cpu", PLATFORMS["cpu"], CONFIG)


def test_a_small_model_keeps_the_pool_of_a_default_launch_at_any_share() -> None:
    options = OPTIONS | {"total_bytes": 10**11, "mem_fraction": 0.8, "context_length": 512}
    assert plan_memory(CPU, **options).num_tokens == 65536
    assert plan_memory(CPU, **(options | {"num_rows": 256})).num_tokens == 2 * 256 * 512


def refusal(**options) -> str:
    with pytest.raises(DoesNotFit) as error:
        plan_memory(TPU, **(OPTIONS | options))
    return str(error.value)


def test_weights_that_leave_no_room_are_refused_with_numbers_and_remedies() -> None:
    message = refusal(weight_bytes=4_995_000)
    assert says(message, "0.00 GB … 0.01 GB … --mem-fraction-static 0.5 … 0.01 GB … 16 tokens")
    assert says(message, "; … --mem-fraction-static … --page-size")


def test_weights_bigger_than_the_budget_are_refused() -> None:
    assert "KV" in refusal(weight_bytes=6_000_000)


def test_weights_bigger_than_the_device_need_more_devices() -> None:
    assert says(refusal(weight_bytes=9_600_000), "; … --tp-size")


def test_more_tokens_than_fit_are_refused_with_the_number_that_would() -> None:
    message = refusal(max_total_tokens=8000)
    assert "--max-total-tokens 8000" in message
    assert "7812 tokens" in message
    assert "--mem-fraction-static 0.5" in message


def test_fewer_tokens_than_two_pages_are_refused_for_what_they_are() -> None:
    """The number of pages is the cause, so the message must not blame the memory."""
    message = refusal(max_total_tokens=31)
    assert "--max-total-tokens 31" in message
    assert "32" in message
    assert "weights" not in message


def test_tokens_of_several_ranks_are_told_as_they_were_given() -> None:
    """The flag counts the tokens of all ranks together, the pool those of one."""
    assert plan_memory(CPU, **(OPTIONS | {"max_total_tokens": 129, "num_ranks": 4})).num_pages == 2 + 1
    message = refusal(max_total_tokens=100, num_ranks=4)
    assert says(message, "--max-total-tokens 100 … 16 tokens … 4 data ranks … 128")
    message = refusal(max_total_tokens=40_000, num_ranks=4)
    assert says(message, f"--max-total-tokens 40000 … 0.01 GB … 4 data ranks … {4 * 7812} tokens")


def test_a_cpu_s_memory_is_what_is_free() -> None:
    cpu = jax.devices("cpu")[0]
    assert 2**28 < device_memory(cpu) < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
