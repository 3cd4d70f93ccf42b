"""The merge list of a BPE vocabulary that comes as ranks only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping


def merges_of(ranks: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return, for each token of several characters in order of rank, the two tokens it is joined from (low joins first).

    Joining neighbours by the lowest rank of their union, the leftmost first, leads to a token in one way, wherever it
    stands: joins that end inside it come in the same order as if it stood alone. A token that is never reached so has no
    pair.
    """
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        parts = list(token)
        while len(parts) > 2:
            best, at = min((ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
            if best == math.inf:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges
