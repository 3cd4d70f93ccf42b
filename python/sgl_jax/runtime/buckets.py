"""The static shapes a server compiles: as few as serve every step without much padding."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """A step of at most num_tokens packed tokens in at most num_rows rows."""

    num_tokens: int  # T
    num_rows: int  # S


def make_buckets(
    max_step_tokens: int, max_running_requests: int, smallest: int, multiple: int = 1
) -> tuple[Bucket, ...]:
    """Token counts are the smallest, then 8, 32, … up to the running rows, and doubles beyond, rounded up to multiples. A
    bucket has a row per token up to max_running_requests, so any step fits the smallest bucket that holds its tokens."""
    sizes = {smallest, max_running_requests, max_step_tokens}
    size = 8
    while size < max_step_tokens:
        sizes.add(size)
        size *= 4 if size < max_running_requests else 2
    sizes = {-(-max(s, smallest) // multiple) * multiple for s in sizes}
    return tuple(Bucket(t, min(t, max(max_running_requests, smallest))) for t in sorted(sizes))


def pick(buckets: tuple[Bucket, ...], num_tokens: int) -> Bucket:
    """The smallest bucket that holds num_tokens. Raises ValueError when none does."""
    for bucket in buckets:
        if num_tokens <= bucket.num_tokens:
            return bucket
    raise ValueError(f"a step of {num_tokens} tokens; the largest bucket holds {buckets[-1].num_tokens}")
