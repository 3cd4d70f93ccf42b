"""Full steps of buckets: they are the steps that a plan counts, each waited for."""

from __future__ import annotations

from itertools import count
from typing import cast

import numpy as np
import pytest

from fakes.fake_runner import FakeRunner
from sgl_jax.planning.topology import CHIPS
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.pool import Pool
from sgl_jax.runtime.programs import RunnerConfig
from sgl_jax.runtime.runner import ModelRunner
from sgl_jax.tools.benchmark import bucket_steps
from sgl_jax.tools.benchmark.bucket_steps import context_for_all_rows, full_step, maker_rates, step_seconds

CONFIG = RunnerConfig(
    compute_dtype="float32",
    weight_dtype="float32",
    pools=cast("tuple[Pool, ...]", ()),
    page_size=4,
    num_pages=41,
    num_rows=4,
    context_length=64,
    buckets=(),
)


@pytest.mark.parametrize(
    ("bucket", "num_new", "start"),
    [
        (Bucket(4, 4), [1, 1, 1, 1], [15, 15, 15, 15]),  # each row decodes behind 15 tokens
        (Bucket(16, 4), [16], [0]),  # one prompt
        (Bucket(12, 4), [12], [4]),  # the end of one
        (Bucket(40, 4), [16, 16, 8], [0, 0, 0]),
        (Bucket(128, 4), [16, 16, 16, 16], [0, 0, 0, 0]),  # no more rows than the bucket has
    ],
)
def test_a_full_step_is_the_one_that_is_counted(bucket: Bucket, num_new: list[int], start: list[int]) -> None:
    plan = full_step(CONFIG, bucket, 16)
    assert (plan.num_new.tolist(), plan.start.tolist()) == (num_new, start)
    assert plan.samples.all()
    pages = np.concatenate([load.pages for load in plan.loads if load.pages is not None])
    assert len({*pages}) == len(pages) == 4 * len(num_new)  # none is shared
    assert pages.min() >= 1
    assert pages.max() < CONFIG.num_pages
    layout = CONFIG.layout(bucket)
    assert layout.pack(plan).shape == (layout.size,)


def test_a_context_is_one_that_all_rows_can_have_at_once() -> None:
    assert [context_for_all_rows(CONFIG, wanted) for wanted in (16, 1024)] == [16, 40]  # 40 pages of 4 tokens, 4 rows


def test_every_run_is_waited_for_and_the_first_is_not_counted() -> None:
    runner = FakeRunner(num_rows=4, num_pages=41, page_size=4, context_length=64)
    ticks = count()
    seconds = step_seconds(cast(ModelRunner, runner), full_step(CONFIG, Bucket(4, 4), 16), 3, lambda: next(ticks))
    assert seconds == [1, 1, 1]
    assert next(ticks) == 6


@pytest.mark.parametrize("kind", bucket_steps._CHIP_OF_KIND)
def test_makers_rates_are_those_of_the_chip(kind: str) -> None:
    chip = CHIPS[bucket_steps._CHIP_OF_KIND[kind]]
    one, four = (maker_rates(kind, number, "bfloat16") for number in (1, 4))
    assert one is not None
    assert four is not None
    assert (one.flops, one.bytes_per_s) == (chip.flops["bfloat16"], chip.bytes_per_s) == (four.flops, four.bytes_per_s)
    assert four.all_reduce_bytes_per_s < one.all_reduce_bytes_per_s == float("inf")


def test_no_rates_are_made_up_for_another_kind() -> None:
    assert maker_rates("abacus", 1, "bfloat16") is None
    assert maker_rates("NVIDIA H200", 512, "bfloat16") is None
