"""Vectors and logits of real checkpoints equal the references', however prompts are batched, cut, cached and preempted."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact import CHUNK, Build, with_empty_cache

import sgl_jax
from checkpoints import DATA
from models.gguf_fixture import F32, Q8_0, random_hf_tensors, write_gguf
from sgl_jax.engine.core import Core
from sgl_jax.engine.pooled_results import embedding, probabilities, relevance
from sgl_jax.request import FinishReason, InvalidParameter
from sgl_jax.runtime.buckets import Bucket
from simulated import Client

TASKS = {"qwen3-reranker": "score"}  # where the checkpoint does not say it
NAMES = (
    "llama-embedding-mean",
    "llama-reward",
    "mistral-embedding",
    "qwen3-embedding",
    "qwen3-reranker",
    "qwen3-seqcls",
)


def cases(name: str) -> list[dict[str, Any]]:
    return json.loads((DATA / "embed" / name / "oracle.json").read_text(encoding="utf-8"))["cases"]


def vectors(core: Core, prompts: Sequence[list[int]], *, together: bool = True) -> list[np.ndarray]:
    client = Client(core)
    for key, prompt in enumerate(prompts, 1):
        client.submit(key, prompt, max_tokens=0)
        if not together:
            client.run()
    client.run(5000)
    assert all(each.reason == FinishReason("length") and not each.tokens for each in client.answers.values())
    return [np.array(answer.vector, np.float32) for answer in client.answers.values()]


def assert_oracle(core: Core, name: str, *, together: bool = True) -> None:
    pooling, goldens = core.info.pooling, cases(name)
    assert pooling is not None
    for case, got in zip(goldens, vectors(core, [c["ids"] for c in goldens], together=together), strict=True):
        assert len(got) == pooling.size
        if pooling.kind == "embed":
            np.testing.assert_allclose(embedding(got, pooling), case["embedding"], atol=1e-4)
            np.testing.assert_allclose(np.linalg.norm(got), case["pooled_norm"], rtol=1e-4)
            for dimensions, values in case.get("embedding_by_dimensions", {}).items():
                np.testing.assert_allclose(embedding(got, pooling, int(dimensions)), values, atol=1e-4)
        elif pooling.kind == "score":
            np.testing.assert_allclose(got, [case["logit_no"], case["logit_yes"]], atol=1e-3)
            assert relevance(got, pooling) == pytest.approx(case["score"], abs=2e-4)
        else:
            np.testing.assert_allclose(got, case["logits"], atol=1e-3)
            np.testing.assert_allclose(probabilities(got, pooling), case["probabilities"], atol=2e-4)


@pytest.fixture(scope="module", params=NAMES)
def named(request: pytest.FixtureRequest, build: Build) -> tuple[str, Core]:
    name = request.param
    options = {"page_size": 16, "max_running_requests": 4, "chunked_prefill_size": 64, "task": TASKS.get(name)}
    return name, build(DATA / "embed" / name, **options)


def chunked(core: Core) -> dict[str, Any]:
    return {"config": dataclasses.replace(core.scheduler.config, max_step_tokens=CHUNK, max_prefill_tokens=CHUNK)}


@pytest.mark.parametrize("overlap", [True, False])
def test_vectors_are_the_references_in_every_way(named: tuple[str, Core], overlap: bool) -> None:
    name, core = named
    for options in ({}, chunked(core)):
        assert_oracle(with_empty_cache(core, overlap=overlap, **options), name, together=False)
        again = with_empty_cache(core, overlap=overlap, **options)
        assert_oracle(again, name)
        cached = again.scheduler.counters.cached_tokens
        assert_oracle(again, name)  # every prompt is in the cache now; a mean takes none from there
        pooling = core.info.pooling
        assert pooling is not None
        assert (again.scheduler.counters.cached_tokens > cached) == (pooling.method == "last")


def test_preempted_prompts_are_counted_once(named: tuple[str, Core], monkeypatch: pytest.MonkeyPatch) -> None:
    name, whole = named
    core, rng = with_empty_cache(whole, **chunked(whole)), np.random.default_rng(0)

    def short_rank(rows: np.ndarray, need: np.ndarray) -> int | None:
        return 0 if len(rows) and rng.random() < 0.1 else None

    monkeypatch.setattr(core.scheduler._pages, "short_rank", short_rank)
    assert_oracle(core, name)
    assert core.scheduler.counters.preemptions > 0


def test_text_is_encoded_with_the_tokens_that_the_checkpoint_s_tokenizer_adds(tmp_path: Path) -> None:
    for name in ("qwen3-embedding", "llama-embedding-mean"):
        goldens = [case for case in cases(name) if case["input"] == "text"]
        with engine(name, tmp_path) as made:
            answers = made.encode([case["text"] for case in goldens])
            assert isinstance(answers, list)
            for case, got in zip(goldens, answers, strict=True):
                np.testing.assert_allclose(got["embedding"], case["embedding"], atol=1e-4)
                assert got["meta_info"]["prompt_tokens"] == len(case["ids"])


def test_the_native_api_makes_answers_of_vectors(tmp_path: Path) -> None:
    case = cases("qwen3-embedding")[1]
    with engine("qwen3-embedding", tmp_path) as made:
        got = made.encode(input_ids=case["ids"], dimensions=16)
        np.testing.assert_allclose(got["embedding"], case["embedding_by_dimensions"]["16"], atol=1e-4)
        for wrong, message in (({"dimensions": 97}, "dimensions is 97"), ({"input_ids": [[1], []]}, r"input_ids\[1\]")):
            with pytest.raises(InvalidParameter, match=message):
                made.encode(**({"input_ids": case["ids"]} | wrong))
        with pytest.raises(InvalidParameter, match="--task embed"):
            made.generate("Once")
        assert made.stats.compiles_after_ready == 0
    case = cases("qwen3-seqcls")[1]
    with engine("qwen3-seqcls", tmp_path) as made:
        got = made.encode(input_ids=case["ids"])
        np.testing.assert_allclose(got["probs"], case["probabilities"], atol=1e-4)
        assert got["label"] == ["negative", "neutral", "positive"][int(np.argmax(case["probabilities"]))]
        with pytest.raises(InvalidParameter, match="--task classify"):
            made.encode(input_ids=case["ids"], dimensions=1)


def test_other_checkpoints_make_vectors_of_the_last_state_when_asked(stories260k: Path, build: Build) -> None:
    core = build(stories260k, page_size=16, max_running_requests=4, chunked_prefill_size=32, is_embedding=True)
    pooling = core.info.pooling
    assert pooling is not None
    assert (pooling.kind, pooling.method, pooling.normalize) == ("embed", "last", True)
    prompts = [[1, 5, 9], [1, 5, 9, 30]]
    alone, together = vectors(core, prompts, together=False), vectors(core, prompts)
    np.testing.assert_allclose(alone, together, atol=1e-5)
    assert np.abs(alone[0] - alone[1]).max() > 0.1


@pytest.mark.parametrize("field", [{"is_causal": False}, {"use_bidirectional_attention": True}])
def test_attention_in_both_directions_is_refused(build: Build, tmp_path: Path, field: dict[str, bool]) -> None:
    folder = shutil.copytree(DATA / "embed" / "qwen3-seqcls", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | field), encoding="utf-8")
    with pytest.raises(ValueError, match="both directions"):
        build(folder)


def test_dummy_weights_have_a_random_head(build: Build) -> None:
    folder = DATA / "embed" / "qwen3-seqcls"
    core = build(folder, load_format="dummy", page_size=16, max_running_requests=2, chunked_prefill_size=32)
    [found] = vectors(core, [[1, 2, 3]])
    assert found.shape == (3,)
    assert np.abs(found).max() > 0


def test_prompts_of_adapters_and_of_the_model_itself_share_a_batch(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter, prompts = DATA / "lora" / "llama" / "r8-all", [[5, 9, 30, 7], [5, 9, 30, 7], [8, 9]]
    options = {"lora_paths": (f"one={adapter}",), "task": "embed", "tokenizer_path": str(DATA / "stories260k")}
    with engine(checkpoint("lora-llama"), tmp_path, **options) as made:
        mixed = made.encode(input_ids=prompts, lora_path=["one", None, "one"])
        alone = [
            made.encode(input_ids=ids, lora_path=name) for ids, name in zip(prompts, ("one", None, "one"), strict=True)
        ]
    assert isinstance(mixed, list)
    vectors = [np.array(each["embedding"]) for each in mixed]
    np.testing.assert_allclose(vectors, [each["embedding"] for each in alone], atol=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama-reward", {"task": "generate"}, "--task is generate; .*ForSequenceClassification"),
        ("qwen3-reranker", {"task": "classify"}, "--task is classify; .* has no labels"),
        (
            "qwen3-embedding",
            {"speculative_algorithm": "NGRAM"},
            "--speculative-algorithm cannot be had: .*--task embed",
        ),
        ("llama-embedding-mean", {"task": "score"}, "--task is score; .* has no output head"),
    ],
)
def test_tasks_that_a_checkpoint_cannot_do_are_refused(build: Build, name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(DATA / "embed" / name, **options)


def engine(name: str | Path, cache: Path, **options: Any) -> sgl_jax.Engine:
    return sgl_jax.Engine(
        model_path=str(DATA / "embed" / name),
        dtype="float32",
        device="cpu",
        max_running_requests=4,
        chunked_prefill_size=32,
        max_total_tokens=2048,
        compilation_cache_dir=str(cache),
        **options,
    )


@pytest.mark.parametrize(("pooling_type", "method"), [(1, "mean"), (3, "last")])
def test_a_gguf_file_says_how_its_vectors_are_made(
    tmp_path: Path, build: Build, pooling_type: int, method: str
) -> None:
    """Vectors of quantised weights have nearly the direction of the float ones'."""
    made = []
    for name, kind, quantization in (("a", F32, None), ("b", Q8_0, None), ("c", F32, "int8-weight-only")):
        path = tmp_path / f"{name}.gguf"
        metadata = {"llama.pooling_type": pooling_type}
        write_gguf(path, random_hf_tensors(), types={"_proj": kind}, metadata=metadata)
        core = build(path, Bucket(32, 4), page_size=16, quantization=quantization)
        pooling = core.info.pooling
        assert pooling is not None
        assert (pooling.kind, pooling.method, pooling.normalize) == ("embed", method, True)
        made.append([embedding(each, pooling) for each in vectors(core, [[1, 3, 5, 7], [9, 10]])])
    for others in made[1:]:
        for one, other in zip(made[0], others, strict=True):
            assert 0.99 < one @ other < 1 - 1e-7
