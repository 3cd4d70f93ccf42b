"""The shard of a model, and of each of its weights, on each device of a grid."""

from __future__ import annotations

import numpy as np
import pytest

from sgl_jax.models.decoder_config import DecoderConfig, MoeConfig, RopeConfig
from sgl_jax.models.shard import shard_of
from sgl_jax.models.spec import WeightSpec
from sgl_jax.parallel.grid import Grid
from shards import cut


def rows_of(spec: WeightSpec, grid: Grid) -> list[list[int]]:
    """Row numbers that each device holds of a weight whose rows are numbered."""
    whole = np.arange(np.prod(spec.shape)).reshape(spec.shape)
    return [cut(whole, shard_of(spec, grid, device)).tolist() for device in range(grid.num_devices)]


def test_each_device_gets_a_shard_of_every_part() -> None:
    qkv = WeightSpec((12,), ("heads",), "float32", parts=(8, 4), unit=2)  # 4 heads of q, then 2 of k
    assert rows_of(qkv, Grid(tensor=2)) == [[0, 1, 2, 3, 8, 9], [4, 5, 6, 7, 10, 11]]


def test_heads_that_are_fewer_than_devices_are_repeated() -> None:
    qkv = WeightSpec((12,), ("heads",), "float32", parts=(8, 4), unit=2)
    assert rows_of(qkv, Grid(tensor=4)) == [[0, 1, 8, 9], [2, 3, 8, 9], [4, 5, 10, 11], [6, 7, 10, 11]]


def test_ranks_hold_the_same_heads_and_other_neurons() -> None:
    grid = Grid(tensor=2, data=2)
    heads, ffn = WeightSpec((4,), ("heads",), "float32"), WeightSpec((8,), ("ffn",), "float32", parts=(4, 4))
    assert rows_of(heads, grid) == [[0, 1], [2, 3], [0, 1], [2, 3]]
    assert rows_of(ffn, grid) == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_columns_are_divided_where_the_inputs_are() -> None:
    down = WeightSpec((2, 4), ("model", "ffn"), "float32")
    assert rows_of(down, Grid(tensor=2)) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_experts_are_spread_over_groups_and_divided_within() -> None:
    up = WeightSpec((2, 2, 1), ("experts", "expert_ffn", "model"), "float32")
    assert rows_of(up, Grid(tensor=2, expert=2)) == [[[[0], [1]]], [[[2], [3]]]]
    assert rows_of(up, Grid(tensor=4, expert=2)) == [[[[0]]], [[[1]]], [[[2]]], [[[3]]]]
    assert rows_of(up, Grid(tensor=2)) == [[[[0]], [[2]]], [[[1]], [[3]]]]


def config(**changes: object) -> DecoderConfig:
    sizes = {"vocab_size": 64, "intermediate_size": 32, "num_heads": 8, "num_kv_heads": 2} | changes
    return DecoderConfig(
        "X", hidden_size=16, num_layers=1, head_dim=4, rope=RopeConfig((1.0,)), context_length=8, **sizes
    )


def test_a_device_holds_its_shard() -> None:
    shard = config().shard(Grid(tensor=4))
    assert (shard.num_heads, shard.num_kv_heads, shard.intermediate_size, shard.vocab_size) == (2, 1, 8, 16)
    shard = config().shard(Grid(tensor=2, data=2))
    assert (shard.num_heads, shard.num_kv_heads, shard.intermediate_size, shard.vocab_size) == (4, 1, 8, 16)


def test_a_head_may_have_several_devices() -> None:
    shard = config(num_heads=4).shard(Grid(tensor=8))
    assert (shard.num_heads, shard.num_kv_heads, shard.head_replicas) == (1, 1, 2)


MOE = MoeConfig(num_experts=6, experts_per_token=2, intermediate_size=12)


@pytest.mark.parametrize(
    ("changes", "grid", "message"),
    [
        ({"num_heads": 6}, Grid(4), "--tp-size .*4.* 6 attention heads"),
        ({"intermediate_size": 30}, Grid(4), "--tp-size .*4.* 30 MLP"),
        (
            {"intermediate_size": 30},
            Grid(2, data=2),
            "--tp-size .*--dp-size .*4.* 30 MLP",
        ),
        ({"vocab_size": 63}, Grid(2), "--tp-size .*2.* 63 vocabulary"),
        (
            {"num_heads": 12, "num_kv_heads": 3},
            Grid(4),
            "--tp-size .*4.* 3 KV heads",
        ),
        ({}, Grid(4, expert=2), "--ep-size .*2.* X "),
        ({"moe": MOE}, Grid(4, expert=3), "--ep-size .*3.* 4 devices"),
        ({"moe": MOE}, Grid(4, expert=4), "--ep-size .*4.* 6 experts"),
    ],
)
def test_a_size_that_does_not_divide_the_model_is_refused(changes: dict, grid: Grid, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes).shard(grid)
