"""Scores of a real reranker through the routes' own code: equal to transformers', template and head included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from starlette.requests import Request

from sgl_jax import Engine
from sgl_jax.server.app_state import ServerState
from sgl_jax.server.encoding_bodies import RerankRequest, ScoreRequest
from sgl_jax.server.rerank_api import ranked, scored
from sgl_jax.settings.server_args import ServerArgs

EMBED = Path(__file__).parents[1] / "data" / "embed"
MODEL = EMBED / "qwen3-reranker"
CLASSIFIER = EMBED / "qwen3-reranker-seqcls"  # config and oracle; its weights are those of the other, and one row
NO, YES = 512, 513


def test_a_qwen3_reranker_scores_as_transformers_does() -> None:
    cases = [each for each in json.loads((MODEL / "oracle.json").read_text())["cases"] if "query" in each]
    flags = {"model_path": str(MODEL), "task": "score", "dtype": "float32", "device": "cpu", "max_total_tokens": 2048}
    with Engine(**flags) as engine:
        state = ServerState(engine._service, ServerArgs(**flags))
        body = ScoreRequest(queries=[each["query"] for each in cases], documents=[each["document"] for each in cases])
        found = engine._call(scored(state, body, Request({"type": "http"})))
        assert [each.score for each in found.data] == pytest.approx([each["score"] for each in cases], abs=2e-5)
        assert found.usage.prompt_tokens == sum(len(each["ids"]) for each in cases)
        of_query = {each["document"]: each["score"] for each in cases if each["query"] == cases[0]["query"]}
        body = RerankRequest(query=cases[0]["query"], documents=[*of_query])
        best = engine._call(ranked(state, body, Request({"type": "http"}))).results
        assert [each.document.text for each in best] == sorted(of_query, key=of_query.__getitem__, reverse=True)


def test_the_same_reranker_as_a_classifier_of_one_label(tmp_path: Path) -> None:
    folder = shutil.copytree(MODEL, tmp_path / "model")
    shutil.copy(CLASSIFIER / "config.json", folder)
    tensors = load_file(MODEL / "model.safetensors")
    head = tensors["model.embed_tokens.weight"]
    row = head[YES].astype(np.float32) - head[NO].astype(np.float32)
    save_file(tensors | {"score.weight": row.astype(head.dtype)[None]}, folder / "model.safetensors")
    cases = json.loads((CLASSIFIER / "oracle.json").read_text())["cases"]
    with Engine(model_path=str(folder), dtype="float32", device="cpu", max_total_tokens=2048) as engine:
        found = engine.encode(input_ids=[each["ids"] for each in cases])
    assert isinstance(found, list)
    assert [each["logits"][0] for each in found] == pytest.approx([each["logits"][0] for each in cases], abs=2e-3)
    assert [each["probs"][0] for each in found] == pytest.approx([each["probabilities"][0] for each in cases], abs=1e-4)
