"""Free list of physical pages."""

import numpy as np

SCRATCH_PAGE = 0  # never allocated: padding tokens of a step write their KV here


class PagePool:
    """Page ids 1 .. num_pages-1. Each is free or owned by the caller that allocated it."""

    def __init__(self, num_pages: int):
        """`num_pages` includes the scratch page."""
        self.num_pages = num_pages
        self._stack = np.arange(num_pages - 1, 0, -1, dtype=np.int32)  # the lowest ids come out first
        self.num_free = num_pages - 1

    def allocate(self, n: int) -> np.ndarray:
        """Take n pages, i32[n], which the caller owns until `free`. Raises IndexError if fewer are free."""
        if n > self.num_free:
            raise IndexError(f"asked for {n} pages, {self.num_free} of {self.num_pages - 1} are free")
        self.num_free -= n
        return self._stack[self.num_free : self.num_free + n][::-1].copy()

    def free(self, pages: np.ndarray) -> None:
        """Give back allocated pages, i32[n]."""
        n, num_used = len(pages), self.num_pages - 1 - self.num_free
        assert n <= num_used, f"{n} pages freed, only {num_used} in use"
        self._stack[self.num_free : self.num_free + n] = pages[::-1]
        self.num_free += n

    def free_pages(self) -> np.ndarray:
        return self._stack[: self.num_free].copy()
