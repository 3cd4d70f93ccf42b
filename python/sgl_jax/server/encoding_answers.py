"""Shapes of answers with embeddings, labels and scores, which msgspec encodes and /openapi.json describes."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType


class VectorUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class _List(msgspec.Struct, kw_only=True):
    id: str
    created: int
    model: str
    usage: VectorUsage
    object: Literal["list"] = "list"


class EmbeddingObject(msgspec.Struct):
    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingList(_List):
    data: list[EmbeddingObject]


class PooledObject(msgspec.Struct):
    index: int
    data: list[float] | str
    object: Literal["pooling"] = "pooling"


class PooledList(_List):
    data: list[PooledObject]


class LabelObject(msgspec.Struct):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class LabelList(_List):
    data: list[LabelObject]


class ScoreObject(msgspec.Struct):
    index: int
    score: float
    object: Literal["score"] = "score"


class ScoreList(_List):
    data: list[ScoreObject]


class LabelScores(msgspec.Struct):
    """Answer with probabilities of the tokens of `label_token_ids`, in their order, after each item."""

    scores: list[list[float]]
    model: str
    usage: VectorUsage
    object: Literal["scoring"] = "scoring"


class RankedDocument(msgspec.Struct):
    text: str


class RankedResult(msgspec.Struct):
    index: int  # the document's place in the request
    relevance_score: float
    document: RankedDocument | UnsetType = UNSET


class RankedList(msgspec.Struct):
    id: str
    model: str
    usage: VectorUsage
    results: list[RankedResult]  # the best first


class EncodedNumbers(msgspec.Struct):
    id: str
    prompt_tokens: int
    cached_tokens: int


class EncodeAnswer(msgspec.Struct):
    """Answer of /encode: an embedding, or logits and what follows from them."""

    meta_info: EncodedNumbers
    embedding: list[float] | UnsetType = UNSET
    logits: list[float] | UnsetType = UNSET
    probs: list[float] | UnsetType = UNSET
    labels: list[str] | UnsetType = UNSET
    label: str | UnsetType = UNSET
    score: float | UnsetType = UNSET
