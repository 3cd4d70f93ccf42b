"""Tests of a model without weights and tokenizer: served with random weights and bytes as tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sgl_jax
from sgl_jax.models import bundled


def test_a_bundled_config_is_served_by_name(stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((stories260k / "config.json").read_text())
    monkeypatch.setattr(bundled, "bundled", lambda: {"Tale-1M": json.dumps(config)})
    options = {"device": "cpu", "max_running_requests": 2, "chunked_prefill_size": 2, "max_total_tokens": 128}
    with sgl_jax.Engine(
        model_path="config:tale-1m", load_format="dummy", compilation_cache_dir=str(tmp_path), **options
    ) as engine:
        answer = engine.generate("né", {"max_new_tokens": 5, "ignore_eos": True, "temperature": 0})
        assert answer["meta_info"]["prompt_tokens"] == 3
        assert len(answer["output_ids"]) == 5
        of_bytes = bytes(token for token in answer["output_ids"] if token < 256)
        assert answer["text"] == of_bytes.decode(errors="replace")
