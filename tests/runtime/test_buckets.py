"""Tests of buckets: there are few, and every step fits one."""

import pytest

from sgl_jax.runtime.buckets import Bucket, make_buckets, pick
from sgl_jax.runtime.loads import LOADS
from sgl_jax.runtime.platform import PLATFORMS


def test_tokens_grow_fourfold_up_to_the_rows_and_twofold_beyond() -> None:
    assert make_buckets(256, 64, 2) == (
        Bucket(2, 2),
        Bucket(8, 8),
        Bucket(32, 32),
        Bucket(64, 64),
        Bucket(128, 64),
        Bucket(256, 64),
    )


def test_tokens_can_double_from_the_smallest_on() -> None:
    found = [bucket.num_tokens for bucket in make_buckets(256, 64, 2, growth=2)]
    assert found == [2, 4, 8, 16, 32, 64, 128, 256]


def test_one_request_with_a_chunk_of_one_has_one_bucket() -> None:
    assert make_buckets(1, 1, 2) == (Bucket(2, 2),)
    assert make_buckets(1, 1, 1) == (Bucket(1, 1),)


@pytest.mark.parametrize("platform", PLATFORMS.values(), ids=lambda p: p.name)
def test_a_default_launch_compiles_at_most_twelve_programs(platform) -> None:
    for smallest in platform.smallest_bucket.values():
        sizes = platform.chunked_prefill_size, platform.max_running_requests, smallest
        buckets = make_buckets(*sizes, growth=platform.bucket_growth)
        assert len(buckets) + len(LOADS) - 1 <= 12  # tokens are loaded for n-grams alone


@pytest.mark.parametrize(
    ("step_tokens", "rows", "smallest"), [(256, 64, 2), (100, 100, 2), (17, 3, 8), (5, 4, 2), (300, 1, 8)]
)
def test_every_step_fits_the_smallest_bucket_that_holds_its_tokens(step_tokens: int, rows: int, smallest: int) -> None:
    buckets = make_buckets(step_tokens, rows, smallest)
    for num_tokens in range(step_tokens + 1):
        bucket = pick(buckets, num_tokens)
        assert bucket.num_tokens >= num_tokens
        assert bucket.num_rows >= min(num_tokens, rows)
        assert not [b for b in buckets if num_tokens <= b.num_tokens < bucket.num_tokens]


def test_a_step_beyond_the_largest_bucket_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"257 tokens .*256 tokens .*64 rows"):
        pick(make_buckets(256, 64, 2), 257)
