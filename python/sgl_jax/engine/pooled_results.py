"""Answers made of a pooling launch's raw vectors: embeddings, probabilities of labels, and scores of relevance."""

import numbers

import numpy as np

from sgl_jax.engine.pooling_info import PoolingInfo
from sgl_jax.request import InvalidParameter


def embedding(vector: np.ndarray, pooling: PoolingInfo, dimensions: int | None = None) -> np.ndarray:
    """Return the first `dimensions` values, None for all, divided by their length if the checkpoint's embeddings are.
    Raises InvalidParameter, naming `dimensions`, if the vector has fewer."""
    check_dimensions(pooling, dimensions)
    found = vector[:dimensions]
    if not pooling.normalize:
        return found
    return found / np.maximum(np.linalg.norm(found), np.float32(1e-12))


def check_dimensions(pooling: PoolingInfo, dimensions: int | None) -> None:
    """Raise InvalidParameter unless `dimensions` is a number of values that vectors have; None stands for all."""
    if dimensions is not None and (isinstance(dimensions, bool) or not isinstance(dimensions, numbers.Integral)):
        raise InvalidParameter("dimensions", f"dimensions is {dimensions!r:.80}; it must be a whole number")
    if dimensions is not None and not 1 <= dimensions <= pooling.size:
        text = "{dimensions} is {value}; it must be between 1 and {size}"
        raise InvalidParameter("dimensions", text, value=dimensions, size=pooling.size)


def probabilities(logits: np.ndarray, pooling: PoolingInfo) -> np.ndarray:
    """Return the probability of each label: of a single one, or of several that may hold together, by a sigmoid, of
    others by a softmax. Logits of a launch that makes none of them stay as they are."""
    match pooling.activation:
        case "sigmoid":
            return np.exp(-np.logaddexp(np.float32(0), -logits))
        case "softmax":
            powers = np.exp(logits - logits.max())
            return powers / powers.sum()
        case _:
            return logits


def relevance(logits: np.ndarray, pooling: PoolingInfo) -> float:
    """Return the score of a reranker: the probability of "yes" against "no", or that of a classifier's single label. Raises
    what check_scores raises."""
    check_scores(pooling)
    return float(probabilities(logits, pooling)[-1])


def check_scores(pooling: PoolingInfo) -> None:
    """Raise InvalidParameter, naming `model`, unless the launch's vectors are scores of relevance."""
    if pooling.kind != "score" and (pooling.kind != "classify" or pooling.size != 1):
        reason = f"it makes {pooling.size} values (--task {pooling.kind}), and a score is one"
        raise InvalidParameter("model", f"the launch scores no documents: {reason}; start a reranker")
