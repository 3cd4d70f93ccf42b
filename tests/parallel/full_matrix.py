"""Every family of the multi-device bar on every grid: `make test-grids-full`. Takes half an hour on two quiet cores;
`make test` has a choice of it (test_grids.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from grids import assert_same, run_grids

FAMILIES = ["llama", "qwen3", "gemma2", "qwen3_moe", "deepseek_v2"]
GRIDS = ["tp2", "tp4", "tp8", "dp2", "dp4", "dp2-tp2", "dp2-tp4", "tp4-sp", "dp2-tp2-sp"]
OF_EXPERTS = ["tp4-ep4", "dp2-tp2-ep4", "dp2-tp4-ep4", "dp2-tp4-ep4-sp"]


@pytest.mark.timeout(0)
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, checkpoint: Callable[[str], Path]) -> None:
    grids = GRIDS + (OF_EXPERTS if family in ("qwen3_moe", "deepseek_v2") else [])
    one, *others = run_grids(checkpoint(family), ["1", *grids])
    for many in others:
        assert_same(one, many)
