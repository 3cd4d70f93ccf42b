"""Static shapes that a server compiles: as few as serve every step without much padding."""

import dataclasses


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """Sizes of a step: at most num_tokens packed tokens in at most num_rows rows."""

    num_tokens: int  # T
    num_rows: int  # S; S * W <= T
    width: int = 1  # W, tokens of a decoding row
    # Parts of the tokens that a layer computes one after the other (decoder.hidden_states). All short rows are in the first.
    num_parts: int = 1

    @property
    def decodes(self) -> bool:
        """Whether a full step has decoding rows alone."""
        return self.num_tokens <= self.num_rows * self.width


def make_buckets(
    max_step_tokens: int, max_running_requests: int, smallest: int, multiple: int = 1, width: int = 1, growth: int = 4
) -> tuple[Bucket, ...]:
    """Make the buckets of a launch, ascending. Token counts are `smallest`, then 8, times `growth` up to the running rows, then
    doubles, rounded up to a multiple and multiplied by the width. With a growth of 2 there is one of 4 tokens, too. A bucket has
    a row for each W tokens, up to max_running_requests."""
    sizes = {smallest, max_running_requests, -(-max_step_tokens // width)}
    size = 8 if growth > 2 else 4
    while size * width < max_step_tokens:
        sizes.add(size)
        size *= growth if size < max_running_requests else 2
    sizes = {-(-max(s, smallest) // multiple) * multiple for s in sizes}
    most_rows = max(max_running_requests, smallest)
    return tuple(Bucket(size * width, min(size, most_rows), width) for size in sorted(sizes))


def divided(bucket: Bucket, part_tokens: int, multiple: int) -> Bucket:
    """Return the bucket with its tokens in two equal parts of at least part_tokens, each a multiple; 0: in one part."""
    least = max(part_tokens, bucket.num_rows * bucket.width)
    fits = part_tokens > 0 and bucket.num_tokens >= 2 * least and bucket.num_tokens % (2 * multiple) == 0
    return dataclasses.replace(bucket, num_parts=2 if fits else 1)


def pick(buckets: tuple[Bucket, ...], num_tokens: int, num_rows: int = 0, width: int = 1) -> Bucket:
    """Return the smallest bucket of the width that holds the tokens and rows. Raises ValueError if none does."""
    for bucket in buckets:
        if num_tokens <= bucket.num_tokens and num_rows <= bucket.num_rows and width == bucket.width:
            return bucket
    largest = max((bucket for bucket in buckets if bucket.width == width), default=Bucket(0, 0))
    raise ValueError(
        f"a step of {num_tokens} tokens in {num_rows} rows of width {width}; "
        f"the largest bucket holds {largest.num_tokens} tokens in {largest.num_rows} rows"
    )
