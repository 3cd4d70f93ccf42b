"""Requests for embeddings, labels and scores. Unknown fields, and known ones that are not supported, are refused by
name."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from sgl_jax.server.bodies import Body, CacheKey, TokenId, limited, limits, null_fields, off_fields, with_fields
from sgl_jax.server.openai_types import Message, TemplateFields

MOST_INPUTS = 2048  # OpenAI's
MOST_LABELS = 1024

Name = Annotated[str, Field(min_length=1)]
Priority = Annotated[int, limits("priority")]
Texts = str | Annotated[list[str], Field(min_length=1)]


class VectorFields(Body):
    """Fields that all requests for vectors share."""

    model: str | None = Field(None, description="the served model, an adapter, or MODEL:ADAPTER; may be left out")
    cache_salt: CacheKey | None = Field(None, description="requests share cached prefixes only within one salt")
    priority: Priority | None = Field(
        None, description="greater ones are served first, with --schedule-policy priority"
    )
    # accepted, but without effect on the answer
    user: str | None = None
    metadata: Annotated[dict[str, str], BeforeValidator(limited)] | None = None


class InputFields(VectorFields, TemplateFields):
    """Either `input` or `messages`, which the model's chat template writes as one text."""

    input: str | list[str] | list[TokenId] | list[list[TokenId]] | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    rid: Name | None = Field(None, description="a name for /abort_request; of several inputs rid_0, rid_1, …")
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = Field(
        None, description="longer inputs are cut to so many tokens; -1: to the context's length"
    )
    truncation_side: Literal["left", "right"] | None = Field(None, description="where they are cut; right if not set")
    use_activation: bool | None = Field(None, description="false: values as the model gives them")


@with_fields(off_fields("EmbeddingRequest"), null_fields("request_id embed_dtype endianness"))
class EmbeddingRequest(InputFields):
    dimensions: int | None = Field(None, description="so many values, from the first on; then their length is made 1")
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: of float32, little-endian")
    normalize: bool | None = Field(None, description="another name for use_activation")
    prompt_name: Name | None = Field(None, description="text that the checkpoint puts before an input: query")


@with_fields(off_fields("ClassifyRequest"), null_fields("request_id"))
class ClassifyRequest(InputFields):
    pass


@with_fields(off_fields("PoolingRequest"), null_fields("request_id embed_dtype endianness"))
class PoolingRequest(InputFields):
    dimensions: int | None = Field(None, description="so many values of an embedding, from the first on")
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: of float32, little-endian")
    task: Literal["embed", "classify", "score"] | None = Field(None, description="that of the launch, if set")


class RankedText(Body):
    text: str


@with_fields(off_fields("RerankRequest"), null_fields("request_id max_tokens_per_doc max_chunks_per_doc rank_fields"))
class RerankRequest(VectorFields):
    query: str
    documents: Annotated[list[str | RankedText], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=0)] | None = Field(None, description="only so many, the best; all if not set, or 0")
    return_documents: bool | None = Field(None, description="true if not set")
    instruction: str | None = Field(None, description="what makes a document relevant, where the model reads it")
    instruct: str | None = Field(None, description="another name for instruction")
    use_activation: bool | None = Field(None, description="false: logits instead of probabilities")


@with_fields(off_fields("ScoreRequest"), null_fields("request_id"))
class ScoreRequest(VectorFields):
    """Two sides, under one name each. The first one may be a single text, for all of the second. With label_token_ids,
    where text is generated: query and items, of text or of ids."""

    text_1: Texts | None = None
    queries: Texts | None = None
    data_1: Texts | None = None
    text_2: Texts | None = None
    documents: Texts | None = None
    items: Texts | Annotated[list[list[TokenId]], Field(min_length=1)] | None = None
    data_2: Texts | None = None
    instruction: str | None = Field(None, description="what makes a text relevant, where the model reads it")
    use_activation: bool | None = Field(None, description="false: logits instead of probabilities")
    query: str | list[TokenId] | None = Field(None, description="what comes before each item")
    label_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MOST_LABELS)] | None = Field(
        None, description="tokens whose probabilities are wanted"
    )
    apply_softmax: bool | None = Field(None, description="true: their probabilities among themselves")
    item_first: bool | None = Field(None, description="true: the query comes behind each item")


@with_fields(off_fields("EncodeBody"), null_fields("sampling_params"))
class EncodeBody(Body):
    """Either `text` or `input_ids`, one or a list."""

    text: str | list[str] | None = None
    input_ids: list[TokenId] | list[list[TokenId]] | None = None
    rid: Name | list[Name] | None = None
    dimensions: int | None = None
    priority: Priority | None = None
    lora_path: Name | list[Name | None] | None = Field(None, description="names of adapters; null is the model itself")
