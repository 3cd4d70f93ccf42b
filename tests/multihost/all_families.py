"""Every family of the oracles over two processes with four devices each: not part of the suite, run it by name.

`python -m pytest tests/multihost/all_families.py -n 0`
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from two_hosts import SIZES, flags_of, hosts, on_one_device, prompts

NEW_TOKENS = 32
TIGHT = flags_of(**{k: v for k, v in SIZES.items() if k != "dtype"}, page_size=4)
TOKENS_OF_A_RANK = 112  # a whole request fits, two do not
GRIDS = {
    "llama": ["--tp-size", "4", "--dp-size", "2"],
    "qwen3": ["--tp-size", "4", "--dp-size", "2", "--enable-sequence-parallel"],
    "gemma2": ["--tp-size", "2", "--dp-size", "4"],
    "qwen3_moe": ["--tp-size", "4", "--dp-size", "2", "--ep-size", "4"],
    "deepseek_v2": ["--tp-size", "4", "--dp-size", "2", "--ep-size", "2"],
    "deepseek_v3": ["--tp-size", "2", "--dp-size", "4", "--ep-size", "8"],
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", GRIDS)
def test_greedy_tokens_are_those_of_one_device(checkpoint: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    model = checkpoint(family)
    ranks = int(GRIDS[family][GRIDS[family].index("--dp-size") + 1])
    pool = flags_of(max_total_tokens=TOKENS_OF_A_RANK * ranks)
    with hosts(tmp_path, model, 2, 4, *GRIDS[family], *TIGHT, *pool) as all_hosts:
        all_hosts.lead()
        all_hosts.join(1)
        expected = on_one_device(model, NEW_TOKENS)
        all_hosts.wait_ready()
        for _ in range(2):  # the second time with prefix hits
            answers = all_hosts.ask(prompts(), max_new_tokens=NEW_TOKENS).json()
            assert [answer["output_ids"] for answer in answers] == expected
        assert all_hosts.metric("preemptions_total") > 0
        assert all_hosts.metric("prefix_cache_hit_tokens_total") > 0
