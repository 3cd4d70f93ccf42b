"""Folders in sentence-transformers' format: which say how vectors are made, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints import DATA
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.sentence_transformers import sentence_pooling

KINDS = ("Transformer", "Pooling", "Normalize")


def folder(path: Path, pooling: dict[str, Any], kinds: tuple[str, ...] = KINDS, place: str = "1_Pooling") -> Path:
    modules = [
        {"idx": i, "path": place if kind == "Pooling" else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return path


def test_published_layouts_are_read() -> None:
    found = sentence_pooling(DATA / "embed" / "qwen3-embedding")
    assert found is not None
    assert (found.method, found.normalize, list(found.prompts), found.default_prompt) == ("last", True, ["query"], "")
    found = sentence_pooling(DATA / "embed" / "llama-embedding-mean")
    assert found is not None
    assert (found.method, found.normalize, found.prompts) == ("mean", False, {})
    assert sentence_pooling(DATA / "embed" / "llama-reward") is None


def test_newer_names_of_modes_are_read(tmp_path: Path) -> None:
    found = sentence_pooling(folder(tmp_path, {"pooling_mode": "lasttoken"}, KINDS[:2]))
    assert found is not None
    assert (found.method, found.normalize) == ("last", False)


def test_modules_that_make_no_vectors_are_no_pooling(tmp_path: Path) -> None:
    assert sentence_pooling(folder(tmp_path, {}, ("Transformer", "LogitScore"))) is None


@pytest.mark.parametrize(
    ("pooling", "options", "message"),
    [
        ({"pooling_mode_cls_token": True}, {}, "pooling_mode_cls_token; served are"),
        ({"pooling_mode_max_tokens": True}, {}, "pooling_mode_max_tokens"),
        (
            {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True},
            {},
            "mean_tokens and pooling_mode_lasttoken",
        ),
        ({"pooling_mode_mean_tokens": False}, {}, "no pooling mode"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": False}, {}, "include_prompt False"),
        (
            {"pooling_mode_lasttoken": True},
            {"kinds": ("Transformer", "Pooling", "Dense")},
            "Transformer, Pooling, Dense",
        ),
        ({"pooling_mode_lasttoken": True}, {"place": "../1_Pooling"}, "the path '../1_Pooling'"),
        ({"pooling_mode": 3}, {}, "pooling_mode 3"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    tmp_path: Path, pooling: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        sentence_pooling(folder(tmp_path, pooling, **options))


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[1]", '[{"type": "x"}]'])
def test_damaged_modules_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(ModelError, match=r"modules\.json"):
        sentence_pooling(tmp_path)
