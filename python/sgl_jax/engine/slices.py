"""Long work in the event loop, done in slices, so that other tasks run in between."""

import asyncio
from collections.abc import AsyncIterator, Iterable

SLICE = 32  # items; each takes some 50 microseconds


async def in_slices[T](items: Iterable[T], size: int = SLICE) -> AsyncIterator[T]:
    """Yield the items, and let other tasks run after each `size` of them."""
    for i, item in enumerate(items, 1):
        yield item
        if i % size == 0:
            await asyncio.sleep(0)
