"""Answers made of raw vectors."""

from __future__ import annotations

import numpy as np
import pytest

from sgl_jax.engine.messages import PoolingInfo
from sgl_jax.engine.pooled_results import embedding, probabilities, relevance
from sgl_jax.request import InvalidParameter

VECTOR = np.array([3, 4, 12], np.float32)


def test_a_vector_is_cut_before_it_is_normalised() -> None:
    info = PoolingInfo("embed", 3, normalize=True)
    np.testing.assert_allclose(embedding(VECTOR, info), VECTOR / 13, rtol=1e-6)
    np.testing.assert_allclose(embedding(VECTOR, info, 2), [0.6, 0.8], rtol=1e-6)
    assert embedding(VECTOR, PoolingInfo("embed", 3), 2).tolist() == [3, 4]
    assert embedding(np.zeros(3, np.float32), info).tolist() == [0, 0, 0]
    for dimensions in (0, 4):
        with pytest.raises(InvalidParameter, match=f"dimensions is {dimensions}; it must be between 1 and 3"):
            embedding(VECTOR, info, dimensions)


def test_logits_become_probabilities_without_overflow() -> None:
    labels = PoolingInfo("classify", 3, activation="softmax")
    np.testing.assert_allclose(probabilities(np.array([0, 0, 1000], np.float32), labels), [0, 0, 1])
    several = PoolingInfo("classify", 3, activation="sigmoid")
    logits = np.array([-1000, 0, 1000], np.float32)
    with np.errstate(over="raise"):
        np.testing.assert_allclose(probabilities(logits, several), [0, 0.5, 1])
    assert probabilities(logits, PoolingInfo("classify", 3)) is logits


def test_relevance_is_the_last_probability_of_a_reranker_and_no_other_launch_has_one() -> None:
    yes = relevance(np.array([1, 3], np.float32), PoolingInfo("score", 2, activation="softmax"))
    one = relevance(np.array([2], np.float32), PoolingInfo("classify", 1, activation="sigmoid"))
    assert yes == pytest.approx(1 / (1 + np.exp(-2))) == pytest.approx(one)
    for other in (PoolingInfo("classify", 3, activation="softmax"), PoolingInfo("embed", 1)):
        with pytest.raises(InvalidParameter, match=f"--task {other.kind}") as error:
            relevance(np.zeros(other.size, np.float32), other)
        assert error.value.param == "model"
