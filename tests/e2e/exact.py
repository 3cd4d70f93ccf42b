"""What the tests of exact tokens share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sgl_jax.engine.core import Core
from sgl_jax.engine.messages import TokenLogprobs

TOLERANCE = 2e-3  # of logprobs

Build = Callable[..., Core]

GREEDY = {"temperature": 0.0, "ignore_eos": True}


def assert_top5(scored: list[TokenLogprobs], top5: list[list[tuple[int, float]]]) -> None:
    """The five best of each position that has a golden value."""
    for ours, theirs in zip(scored, top5, strict=False):
        assert ours.top_ids[:5] == [token for token, _ in theirs]
        np.testing.assert_allclose(ours.top_logprobs[:5], [logprob for _, logprob in theirs], atol=TOLERANCE)
