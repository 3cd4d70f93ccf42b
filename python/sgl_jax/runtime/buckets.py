"""The static shapes a server compiles: as few as serve every step without much padding."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """A step of at most num_tokens packed tokens in at most num_rows rows, where rows that decode have `width` tokens."""

    num_tokens: int  # T
    num_rows: int  # S; S * W <= T
    width: int = 1  # W


def make_buckets(
    max_step_tokens: int, max_running_requests: int, smallest: int, multiple: int = 1, width: int = 1
) -> tuple[Bucket, ...]:
    """Token counts are the smallest, then 8, 32, … up to the running rows, and doubles beyond, rounded up to multiples, all
    times the width. A bucket has a row for each W tokens, up to max_running_requests."""
    sizes = {smallest, max_running_requests, -(-max_step_tokens // width)}
    size = 8
    while size * width < max_step_tokens:
        sizes.add(size)
        size *= 4 if size < max_running_requests else 2
    sizes = {-(-max(s, smallest) // multiple) * multiple for s in sizes}
    most_rows = max(max_running_requests, smallest)
    return tuple(Bucket(size * width, min(size, most_rows), width) for size in sorted(sizes))


def pick(buckets: tuple[Bucket, ...], num_tokens: int, num_rows: int = 0, width: int = 1) -> Bucket:
    """The smallest bucket of the width that holds so many tokens and rows. Raises ValueError when none does."""
    for bucket in buckets:
        if num_tokens <= bucket.num_tokens and num_rows <= bucket.num_rows and width == bucket.width:
            return bucket
    largest = max((bucket for bucket in buckets if bucket.width == width), default=Bucket(0, 0))
    raise ValueError(
        f"a step of {num_tokens} tokens in {num_rows} rows of width {width}; "
        f"the largest bucket holds {largest.num_tokens} tokens in {largest.num_rows} rows"
    )
