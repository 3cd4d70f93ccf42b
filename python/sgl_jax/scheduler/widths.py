"""Widths of steps: drafts are verified while few rows decode and enough drafts are accepted."""

_WINDOW, _TRY = 32, 10  # wide steps after which their gain is judged: usually, and when drafts are tried again
_WITHOUT_DRAFTS = 2  # wide steps after others: those in flight, whose rows have no drafts yet
_SHORTEST, _LONGEST = 64, 1024  # steps between two tries; doubled as long as drafts do not pay


class Widths:
    """Chooses the width of each step, W or 1, from the number of rows of the fullest rank and from what drafts gained.

    A step of width W takes longer than one of width 1. When rows gain too few tokens in it on average, steps have width 1 for a
    while, and then drafts are tried again.
    """

    def __init__(self, width: int, max_rows: int, draft_cost: float = 0.0, ridge_tokens: int = 1 << 30):
        """`draft_cost`: time that drafts take beside their products in the step, in steps of width 1. `ridge_tokens`: see runtime.platform.Platform."""
        self.width, self._max_rows = width, max_rows
        self._draft_cost, self._ridge = draft_cost, ridge_tokens
        self._window, self._pause = _WINDOW, _SHORTEST
        self._left = 0  # steps to come without drafts
        self._begin(skipped=0)

    def __call__(self, num_rows: int) -> int:
        """Return the width of a step in which a rank has up to num_rows rows."""
        return self.width if num_rows <= self._max_rows and not self._left else 1

    def observe(self, width: int, num_rows: int, num_gained: int) -> None:
        """Take in a processed step of num_rows decoding rows, which gained so many tokens."""
        if not num_rows:
            return
        if width == 1:
            self._left = max(0, self._left - 1)
            self._begin(skipped=_WITHOUT_DRAFTS)
            return
        self._steps += 1
        if self._left or self._steps <= 0:
            return
        self._needed += num_rows * (self._time(num_rows * width) / self._time(num_rows) + self._draft_cost)
        self._gained += num_gained
        if self._steps < self._window:
            return
        if self._gained >= self._needed:
            self._window, self._pause = _WINDOW, _SHORTEST
        else:
            self._window, self._left = _TRY, self._pause
            self._pause = min(2 * self._pause, _LONGEST)
        self._begin(skipped=0)

    def _begin(self, skipped: int) -> None:
        """Begin to judge wide steps, without the first ones."""
        self._steps, self._needed, self._gained = -skipped, 0.0, 0

    def _time(self, tokens: int) -> float:
        """Return about how long a step takes, as a multiple of one that reads the weights for a few tokens: reading and products
        overlap up to half of the ridge."""
        return max(1.0, (self._ridge + tokens) / (1.5 * self._ridge))
