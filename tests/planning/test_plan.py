"""Models that fit a topology, and the change that is advised for one that does not."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from messages import says
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.parallel.grid import Grid
from sgl_jax.planning.fit import Misfit, Plan, make_plan
from sgl_jax.planning.model import PlannedModel, bundled, find_model
from sgl_jax.planning.target import find_target
from sgl_jax.planning.topology import NoSuchTopology
from sgl_jax.settings.server_args import ServerArgs

GIB = 1 << 30


def named(path: str) -> PlannedModel:
    return find_model(ServerArgs(model_path=path))


def plan(model: str | PlannedModel, topology: str, context: int = 1024, **flags) -> Plan:
    args = ServerArgs(model_path=model if isinstance(model, str) else "model", **flags)
    found = find_model(args) if isinstance(model, str) else model
    return make_plan(args, found, find_target(topology, args.tp_size, args.dp_size), context)


def test_qwen3_8b_on_four_v6e_chips_by_hand() -> None:
    found = plan("Qwen3-8B", "v6e-4")
    assert found.parameters == 8_190_735_360
    weights = 2 * (2 * 151936 * 4096 + 36 * (4096 * 48 * 128 + 4096 * 4096 + 3 * 4096 * 12288)) // 4
    norms = 36 * (4 * 2 * 4096 + 2 * 2 * 128) + 4 * 4096  # on every device, those of hidden states in float32
    assert found.launch.weight_bytes == weights + norms
    assert found.launch.memory.bytes_per_token == 36 * 2 * 2 * 128 * 2
    state = (
        257 * 4 * (1 + 40960 // 128 + 151936 // 4 + 3 * 1104) + 257 * 151936 // 4
    )  # and a mask of a byte for each token
    tokens = (int(int(31.24 * GIB) * 0.88) - weights - norms - state) // (36 * 2 * 2 * 128 * 2) // 128 * 128
    assert found.launch.memory.num_tokens == tokens
    assert found.full_contexts == pytest.approx(tokens / 40960)
    decode = next(step for step in found.steps if step.bucket.num_tokens == 16)
    assert decode.bucket.decodes
    assert decode.bound is not None
    # 3.78 GB of weights without the embedding, and 16 rows of 1024 tokens, at 1640 GB/s.
    read = weights - 2 * 151936 * 4096 // 4 + 16 * 1024 * 36864
    assert decode.bound.seconds == pytest.approx(read / 1640e9, rel=0.002)
    assert decode.bound.limit == "memory"
    sums = 73 * (16 * 4096 * 2 * 3 / (2 * 100e9 * 2) + 4e-6)  # over two links, and two hops there and back
    assert decode.bound.in_turn_s == pytest.approx(decode.bound.seconds + sums, rel=0.002)
    assert decode.tokens_per_s == pytest.approx(16 / decode.bound.in_turn_s)
    prompt = found.steps[-1]
    assert prompt.bound is not None
    assert (prompt.bucket.num_parts, prompt.tokens_per_s) == (2, pytest.approx(2048 / prompt.bound.seconds))


@pytest.mark.parametrize(("asked", "num_parts"), [(None, 2), (0, 1), (1, 2), (1024, 2)])
def test_long_steps_have_two_parts_unless_told_otherwise(asked: int | None, num_parts: int) -> None:
    steps = plan("Qwen3-8B", "v6e-4", collective_overlap_tokens=asked).steps
    assert max(steps, key=lambda step: step.bucket.num_tokens).bucket.num_parts == num_parts


def test_parts_that_no_step_can_have_are_refused() -> None:
    with pytest.raises(ValueError, match="1025") as error:
        plan("Qwen3-8B", "v6e-4", collective_overlap_tokens=1025)
    assert says(
        str(error.value), "--collective-overlap-tokens … 1025 … 2048 tokens … 256 rows … lower … --chunked-prefill-size"
    )


def test_pages_have_128_tokens_for_the_kernels_of_a_tpu_unless_asked_otherwise() -> None:
    assert plan("Qwen3-8B", "v6e-4").launch.runner_config.page_size == 128
    assert plan("Qwen3-8B", "v6e-4", page_size=16).launch.runner_config.page_size == 16
    assert plan("Qwen3-8B", "v6e-4", attention_backend="native").launch.runner_config.page_size == 16
    assert plan("Qwen3-8B", "v6e-4", attention_backend="native", page_size=1).launch.runner_config.page_size == 1
    assert plan("Qwen3-0.6B", "cpu").launch.runner_config.page_size == 16


def test_a_topology_is_used_whole_unless_tp_size_says_less() -> None:
    assert plan("Qwen3-8B", "v7x-4").target.num_devices == 8
    assert plan("Qwen3-8B", "v7x-4", dp_size=2).launch.grid == Grid(4, 2)
    assert plan("Qwen3-8B", "v6e-8", tp_size=4).target.num_devices == 4
    assert plan("Qwen3-8B", "v6e-8", tp_size=1, dp_size=2).launch.grid == Grid(1, 2)
    assert plan("Qwen3-0.6B", "cpu").launch.grid == Grid(1)
    with pytest.raises(NoSuchTopology, match=r"--dp-size .*3.* v6e-4 .*4"):
        plan("Qwen3-8B", "v6e-4", dp_size=3)
    with pytest.raises(NoSuchTopology, match=r"--tp-size .*8 .*--dp-size 1.* v6e-4 .*4"):
        plan("Qwen3-8B", "v6e-4", tp_size=8)


def test_what_does_not_fit_is_told_what_would() -> None:
    with pytest.raises(Misfit) as caught:
        plan("Llama-3.1-70B", "v6e-4")
    reason, *advice = str(caught.value).splitlines()
    assert says(reason, "35.33 GB … 29.52 GB")
    assert len(advice) == 1
    match = re.search(r"v6e-8 \(8 chips, --tp-size 8\) .* ([\d,]+) tokens", advice[0])
    assert match is not None
    assert int(match[1].replace(",", "")) == plan("Llama-3.1-70B", "v6e-8").launch.memory.num_tokens


def test_what_would_fit_is_told_with_the_flags_of_all_ranks() -> None:
    with pytest.raises(Misfit) as caught:
        plan("Llama-3.1-70B", "v6e-4", dp_size=2)
    *_, advice = str(caught.value).splitlines()
    assert re.search(r"\((16 chips, --tp-size 8|8 chips, --tp-size 4) --dp-size 2\)", advice)


def test_each_single_change_that_helps_is_named_and_does_help() -> None:
    with pytest.raises(Misfit) as caught:
        plan("Qwen3-32B", "v5e-4", dtype="float32", mem_fraction_static=0.5)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(" ")[0] for line in lines] == ["v5e-16"]
    assert plan("Qwen3-32B", "v5e-16", dtype="float32", mem_fraction_static=0.5).launch.memory.num_tokens > 0
    with pytest.raises(Misfit) as caught:
        plan("Qwen3-8B", "v6e-1", mem_fraction_static=0.3)
    advice = str(caught.value)
    fraction = re.search(r"--mem-fraction-static 0\.97 .*[\d,]+ tokens .*(0\.\d\d)", advice)
    assert fraction is not None
    assert plan("Qwen3-8B", "v6e-1", mem_fraction_static=float(fraction[1])).launch.memory.num_tokens > 0
    with pytest.raises(Misfit):
        plan("Qwen3-8B", "v6e-1", mem_fraction_static=float(fraction[1]) - 0.01)


def test_heads_that_cannot_be_divided_are_refused_by_flag() -> None:
    with pytest.raises(ValueError, match=r"--tp-size .*3.* 32 attention heads"):
        plan("Qwen3-8B", "v6e-4", tp_size=3)


def test_steps_are_counted_with_at_most_the_models_context() -> None:
    assert plan("Qwen3-8B", "v6e-4", context=10**6).context == 40960
    assert plan("Qwen3-8B", "v6e-4", context=10**6, context_length=2048).context == 2048


@pytest.mark.parametrize(
    ("name", "billions", "kv_bytes"),
    [
        *[("Qwen3-0.6B", 0.596, 114688), ("Qwen3-4B", 4.02, 147456), ("Qwen3-8B", 8.19, 147456)],
        *[("Qwen3-14B", 14.77, 163840), ("Qwen3-32B", 32.76, 262144), ("Qwen2.5-7B", 7.62, 57344)],
        *[("Llama-3.1-8B", 8.03, 131072), ("Llama-3.1-70B", 70.55, 327680)],
        *[("Gemma-2-9B", 9.24, 344064), ("Qwen3-30B-A3B", 30.53, 98304)],
        *[("Qwen3-Coder-30B-A3B", 30.53, 98304), ("Qwen3-235B-A22B", 235.09, 192512)],
        *[("GLM-4.5-Air", 106.85, 188416), ("GLM-4.5", 352.80, 376832)],  # without their MTP layers
        ("DeepSeek-V2-Lite", 15.71, 27 * 640 * 2),
        # A head of gpt-oss has 64 values, of which a TPU makes 128; a latent vector 576, of which it makes 640.
        *[("Mixtral-8x7B", 46.70, 131072), ("gpt-oss-20b", 20.91, 2 * 49152), ("DeepSeek-V3", 671.03, 61 * 640 * 2)],
    ],
)
def test_bundled_configs_have_the_published_sizes(name: str, billions: float, kv_bytes: int) -> None:
    args = ServerArgs(model_path=name)
    one = dataclasses.replace(find_target("v7x-1"), num_devices=1, device_bytes=1 << 42)
    found = make_plan(args, find_model(args), one, 1024)
    assert found.parameters / 1e9 == pytest.approx(billions, rel=0.002)
    assert found.launch.memory.bytes_per_token == kv_bytes


def test_every_bundled_config_is_one_we_serve() -> None:
    assert {type(named(name).config) for name in bundled()} == {DecoderConfig}


def test_a_hub_id_of_a_bundled_model_needs_no_network_and_a_path_wins(tmp_path: Path) -> None:
    assert named("meta-llama/Llama-3.1-8B-Instruct").source == "config:Llama-3.1-8B"
    assert named("google/gemma-2-9b").source == "config:Gemma-2-9B"
    folder = tmp_path / "Qwen3-8B"
    folder.mkdir()
    config = json.loads(bundled()["Qwen3-8B"]) | {"num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    assert named(str(folder)).config.num_layers == 2


def test_limits_are_those_of_all_ranks_together() -> None:
    found = plan("Qwen3-8B", "v6e-8", tp_size=4, dp_size=2, max_running_requests=64, max_total_tokens=65536)
    assert found.launch.scheduler_config.max_running_requests == 32
    assert found.launch.runner_config.num_rows == 64
    assert found.launch.kv_tokens == 65536
    with pytest.raises(ValueError, match=r"--max-running-requests .*5.* --dp-size 2"):
        plan("Qwen3-8B", "v6e-8", tp_size=4, dp_size=2, max_running_requests=5)


def test_ranks_hold_more_than_copies_of_heads() -> None:
    """With four KV heads, eight devices hold each twice; two ranks of four devices hold other tokens in that place."""
    copies = plan("Qwen3-30B-A3B", "v6e-8", tp_size=8)
    ranks = plan("Qwen3-30B-A3B", "v6e-8", tp_size=4, dp_size=2, ep_size=8)
    assert ranks.launch.kv_tokens > 1.8 * copies.launch.kv_tokens
