"""The merge list of a BPE vocabulary that comes as ranks only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping


def merges_of(ranks: Mapping[str, float]) -> list[tuple[str, str]]:
    """For each token of several characters, in order of rank (low is joined first), the two it is joined from.

    Joining neighbours by the lowest rank of what they make, the leftmost first, leads to a token in one way, wherever it
    stands: joins that end inside it come in the same order as if it stood alone. A token that is never reached so has no
    pair.
    """
    merges, unknown = [], math.inf
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, at = min((ranks.get(a + b, unknown), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
            if best == unknown:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges
