"""Any grid of devices gives the reference's vectors: engines on 1 to 8 of 8 virtual CPU devices, with prefixes found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from grids import run_grids

from checkpoints import DATA

CASES = {
    "qwen3-embedding": ["1", "tp2", "dp2", "dp2-tp2-scan"],
    "llama-embedding-mean": ["tp2", "dp2-scan", "dp2-tp2-sp"],
    "qwen3-reranker": ["tp2", "dp2"],
    "llama-reward": ["dp2-tp2"],
}
SCRIPT = Path(__file__).with_name("pooling_engine.py")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CASES)
def test_vectors_are_the_references_on_any_grid(name: str) -> None:
    folder = DATA / "embed" / name
    cases = json.loads((folder / "oracle.json").read_text(encoding="utf-8"))["cases"]
    for run in run_grids(folder, CASES[name], SCRIPT):
        for case, *both in zip(cases, run["first"], run["second"], strict=True):
            for got in both:
                if "embedding" in case:
                    np.testing.assert_allclose(got["embedding"], case["embedding"], atol=1e-4)
                elif "score" in case:
                    assert got["score"] == pytest.approx(case["score"], abs=2e-4)
                else:
                    np.testing.assert_allclose(got["logits"], case["logits"], atol=1e-3)
        assert (run["cached_tokens"] > 0) == (name != "llama-embedding-mean")
