"""Messages about vectors that a launch makes in place of tokens."""

from typing import Literal

import msgspec


class PoolingInfo(msgspec.Struct, frozen=True):
    """Description of the vectors that a pooling launch makes.

    The engine's vector is raw: for `embed` the pooled hidden state after the final norm, for `classify` the logits of
    the labels, for `score` the logits of two tokens, that of "no" first. engine/pooled_results.py makes answers of it.
    """

    kind: Literal["embed", "classify", "score"]
    size: int  # values of a vector
    method: Literal["last", "mean"] = "last"  # the last token's hidden state, or the mean over all tokens
    normalize: bool = False  # an embedding is to be divided by its length
    labels: list[str] = []  # names of the values, for classify and score
    activation: Literal["none", "sigmoid", "softmax"] = "none"  # makes probabilities of logits
    prompts: dict[str, str] = {}  # texts that the checkpoint puts before an input, by name: "query"


class Pooled(msgspec.Struct, frozen=True, array_like=True):
    """Vector of a request that finishes in the same step."""

    key: int
    vector: bytes  # f32[size], little-endian
