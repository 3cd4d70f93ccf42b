"""The merge list of a BPE vocabulary that comes as ranks only."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any


def merges_of[T: (bytes, str)](ranks: Mapping[T, int]) -> list[tuple[T, T]]:
    """For each token of several bytes or characters, in order of rank (low is joined first), the two it is joined from.

    Joining neighbours by the lowest rank of what they make, the leftmost first, leads to a token from one pair only:
    that which the tokens of lower rank leave of it. A token that they leave in more parts is joined from none.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts: list[Any] = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, at = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
            if best >= rank:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges
