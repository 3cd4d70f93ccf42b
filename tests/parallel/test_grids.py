"""Any grid of devices gives the tokens of one: engines on 1 to 8 of 8 virtual CPU devices, with requests preempted and
prefixes found. `make test-grids-full` has every family on every grid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grids import assert_same, run_grids

from checkpoints import DATA

# gemma2 has 4 heads for tp8; qwen3, qwen3_moe and deepseek_v2 have fewer KV heads than devices; gpt_oss has biases in its
# experts, two devices to each with tp4-ep2.
CASES = {
    "llama": ["tp2-scan-parts", "dp4"],
    "qwen3": ["tp4-sp", "dp2-tp4"],
    "gemma2": ["tp8", "dp2-tp2-parts"],
    "qwen3_moe": ["tp4", "dp2-tp2-ep4"],
    "deepseek_v2": ["tp2-parts", "dp2-tp4-ep4-sp-scan"],
    "gpt_oss": ["tp4-ep2-parts"],
}


@pytest.fixture(scope="module", params=CASES)
def runs(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> dict[str, dict[str, Any]]:
    grids = ["1", *CASES[request.param]]
    return dict(zip(grids, run_grids(checkpoint(request.param), grids), strict=True))


@pytest.mark.supports("several devices, virtual", CASES)
@pytest.mark.timeout(900)
def test_tokens_and_logprobs_are_those_of_one_device(runs: dict[str, dict[str, Any]]) -> None:
    one = runs["1"]
    for many in (run for grid, run in runs.items() if grid != "1"):
        assert_same(one, many)
    assert one["preemptions"] > 0


@pytest.mark.timeout(900)
def test_steps_are_computed_in_parts_where_it_is_asked_for(runs: dict[str, dict[str, Any]]) -> None:
    for grid, run in runs.items():
        assert bool(run["parts"]) == ("parts" in grid), grid


@pytest.mark.timeout(900)
def test_ranks_preempt_their_own(runs: dict[str, dict[str, Any]]) -> None:
    two_ranks = [run["preemptions"] for grid, run in runs.items() if "dp2" in grid]
    assert all(two_ranks)


@pytest.mark.timeout(900)
def test_quantised_weights_are_divided_with_their_scales(checkpoint: Callable[[str], Path]) -> None:
    one, *others = run_grids(checkpoint("qwen3_moe"), ["int8", "tp2-int8", "dp2-tp2-ep4-int8-scan"])
    for many in others:
        assert_same(one, many)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "grids"),
    [("awq-g128-qwen3_moe", ["tp2-scan", "dp2-tp2-ep2"]), ("fp8-block-qwen3_moe", ["dp2-ep2", "tp2-scan"])],
)
def test_quantised_checkpoints_are_divided_as_they_are_read(name: str, grids: list[str]) -> None:
    """Codes, zero points and scales of a shard, and blocks that a shard's rows and columns cut."""
    first, *others = run_grids(DATA / "quant" / name, ["1", *grids])
    for many in others:
        assert_same(first, many)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("family", "grids"),
    [
        ("llama", ["kvint8", "tp2-kvint8", "dp2-tp2-kvint8-scan"]),
        ("llama", ["kvfp8", "tp2-kvfp8"]),
        ("deepseek_v2", ["kvint8", "dp2-tp2-kvint8"]),
    ],
)
def test_kv_of_eight_bits_has_the_same_scales_on_any_grid(
    checkpoint: Callable[[str], Path], family: str, grids: list[str]
) -> None:
    """Sums in another order round a few values of K and V to a neighbour. Scales of other tokens would change the answers."""
    one, *others = run_grids(checkpoint(family), grids)
    for many in others:
        assert_same(one, many, atol=0.02)


EAGLE3 = Path(__file__).parents[1] / "data" / "eagle" / "eagle3-qwen3" / "target"


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("family", "grids"),
    [
        ("llama", ["tp2-ngram-scan", "dp2-tp2-self-parts"]),
        ("deepseek_v2", ["dp2-self-scan"]),
        ("qwen3_moe", ["dp2-tp2-ep4-ngram"]),
        ("eagle3", ["tp2-sp-eagle3-parts", "dp2-eagle3-scan"]),
    ],
)
def test_speculation_changes_nothing_on_any_grid(
    checkpoint: Callable[[str], Path], family: str, grids: list[str]
) -> None:
    one, *others = run_grids(EAGLE3 if family == "eagle3" else checkpoint(family), ["1", *grids])
    for many, grid in zip(others, grids, strict=True):
        assert_same(one, many)
        drafted, accepted = many["drafts"]
        assert (drafted if "ngram" in grid else accepted) > 0, grid  # random text need not repeat itself


@pytest.mark.timeout(900)
def test_adapters_are_divided_like_the_matrices_they_change(checkpoint: Callable[[str], Path]) -> None:
    """Requests of five adapters, in two slots, among some for the model itself."""
    one, *others = run_grids(
        checkpoint("lora-llama"), ["lora", "tp2-lora-scan-parts", "dp2-tp2-sp-lora", "dp2-lora-ngram", "tp4-lora"]
    )
    for many in others:
        assert_same(one, many)
    assert one["preemptions"] > 0


@pytest.mark.timeout(900)
def test_masks_of_grammars_are_those_of_each_devices_vocabulary(checkpoint: Callable[[str], Path]) -> None:
    one, *others = run_grids(checkpoint("llama"), ["json", "tp2-json", "dp2-tp2-json", "dp2-ngram-json"])
    for many in others:
        assert_same(one, many)
    assert one["preemptions"] > 0
    assert all(answer["text"].startswith("[") for answer in one["answers"])
