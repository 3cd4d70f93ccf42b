"""Widths of steps: drafts are verified while few rows decode and they gain more tokens than their time would give without them."""

import collections
import dataclasses
import statistics

_WINDOW, _TRY = 64, 20  # rows of wide steps after which the gain is judged: usually, and when drafts are tried again
_WITHOUT_DRAFTS = 2  # wide steps after others: those in flight, whose rows have no drafts yet
_SHORTEST, _LONGEST = 64, 4096  # steps between two tries; doubled as long as drafts do not pay
_PAUSE = 100  # most of them for each step's time that the last try lost
_TIMES, _ENOUGH = 16, 4  # steps whose times count, and how many of them suffice
_COMPARED = 8  # steps without drafts, to learn how long they take
_KNOWN_FOR = 1024  # wide steps for which that is believed

type Seconds = collections.deque[float]


def _recent() -> Seconds:
    return collections.deque(maxlen=_TIMES)


def _usual(times: Seconds) -> float:
    """Return the mean without the fastest and the slowest eighth, or one each. The median would not do: a step's time may follow
    the number of its drafts."""
    left_out = max(1, len(times) // 8)
    return statistics.mean(sorted(times)[left_out:-left_out])


@dataclasses.dataclass
class _Load:
    """Steps of about as many rows: how long they take, and what drafts gained since the last judgement."""

    window: int = _WINDOW
    pause: int = 0  # steps to come without drafts
    longest: int = _SHORTEST  # the next pause at most
    compares: bool = False  # the pause is to learn how long such steps take
    steps: int = 0  # wide ones since the last judgement
    rows: int = 0  # in them
    gained: int = 0  # tokens of these
    narrow: Seconds = dataclasses.field(default_factory=_recent)
    wide: Seconds = dataclasses.field(default_factory=_recent)
    num_wide: int = 0

    def narrow_step(self, guess: float) -> None:
        self.pause = max(0, self.pause - 1)
        if not self.compares:
            self.steps = self.rows = self.gained = 0
        elif not self.pause:
            self.judge(guess, compare=False)

    def wide_step(self, num_rows: int, num_gained: int, guess: float) -> None:
        self.steps += 1
        self.rows += num_rows
        self.gained += num_gained
        if self.rows >= self.window:
            self.judge(guess, compare=True)

    def judge(self, guess: float, compare: bool) -> None:
        """Go on with drafts if they gained what they cost, else pause: ever longer, until tries cost a hundredth of the time. With
        `compare` time steps without drafts first, where none are known or those that are speak against drafts: a machine's
        speed changes."""
        is_known = min(len(self.narrow), len(self.wide)) >= _ENOUGH
        cost = _usual(self.wide) / _usual(self.narrow) if is_known else guess
        excess = cost - self.gained / self.rows
        self.compares = compare and len(self.wide) >= _ENOUGH and (excess > 0 or not is_known)
        if self.compares:
            self.pause = _COMPARED
            return
        if excess > 0:
            lost = self.steps * excess + _WITHOUT_DRAFTS * (cost - 1)
            self.window, self.pause = _TRY, min(max(round(_PAUSE * lost), _SHORTEST), self.longest)
            self.longest = min(2 * self.longest, _LONGEST)
        else:
            self.window, self.longest = _WINDOW, _SHORTEST
        self.steps = self.rows = self.gained = 0


class Widths:
    """Chooses the width of each step, W or 1, from the number of rows of the fullest rank and from what drafts gained.

    A step of width W takes longer than one of width 1: how much longer is measured, for each power of two of rows. When rows gain
    too few tokens in it on average, steps have width 1 for a while, and then drafts are tried again.
    """

    def __init__(self, width: int, max_rows: int, draft_cost: float = 0.0):
        """`draft_cost`: time that drafts are expected to add to a step, in steps of width 1, until it is measured."""
        self.width, self._max_rows, self._guess = width, max_rows, 1 + draft_cost
        self._loads: collections.defaultdict[int, _Load] = collections.defaultdict(_Load)
        self._skipped = 0  # wide steps to come that say nothing about drafts

    def __call__(self, num_rows: int) -> int:
        """Return the width of a step in which a rank has up to num_rows rows."""
        return self.width if num_rows <= self._max_rows and not self._load(num_rows).pause else 1

    def observe(self, width: int, most_rows: int, num_rows: int, num_gained: int, seconds: float | None = None) -> None:
        """Take in a processed step whose width was chosen for most_rows. Its num_rows decoding rows of all ranks gained so many
        tokens. `seconds`: what it took; None if something else took time, too."""
        if not num_rows:
            return
        load = self._load(most_rows)
        if seconds is not None and (width == 1 or not self._skipped):
            (load.narrow if width == 1 else load.wide).append(seconds)
        if width == 1:
            self._skipped = _WITHOUT_DRAFTS
            load.narrow_step(self._guess)
            return
        load.num_wide += 1
        if load.num_wide % _KNOWN_FOR == 0:
            load.narrow.clear()
        if self._skipped > 0:
            self._skipped -= 1
        elif not load.pause:
            load.wide_step(num_rows, num_gained, self._guess)

    def _load(self, num_rows: int) -> _Load:
        return self._loads[max(0, num_rows - 1).bit_length()]
