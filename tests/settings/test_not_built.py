"""One table says what is not built: flags, hints, request bodies and documentation follow it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pydantic
import pytest

from sgl_jax.server.bodies import Body, feature_of, off_fields, with_fields
from sgl_jax.server.encoding_bodies import (
    ClassifyRequest,
    EmbeddingRequest,
    EncodeBody,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
)
from sgl_jax.server.native_api import GenerateRequest, NativeSamplingParams
from sgl_jax.server.openai_types import ChatCompletionRequest, CompletionRequest, Message
from sgl_jax.settings.flag_parser import said_of
from sgl_jax.settings.foreign_flags import elsewhere
from sgl_jax.settings.not_built import NOT_BUILT, Feature
from sgl_jax.settings.server_args import FLAGS

OF_TEXT = (GenerateRequest, NativeSamplingParams, ChatCompletionRequest, CompletionRequest, Message)
OF_VECTORS = (EmbeddingRequest, ClassifyRequest, PoolingRequest, RerankRequest, ScoreRequest, EncodeBody)
BODIES = {body.__name__: body for body in (*OF_TEXT, *OF_VECTORS)}


def without(name: str) -> tuple[Feature, ...]:
    found = tuple(feature for feature in NOT_BUILT if feature.name != name)
    assert len(found) == len(NOT_BUILT) - 1
    return found


def pages(features: tuple[Feature, ...]) -> str:
    return runpy.run_path(str(Path(__file__).parents[2] / "docs" / "generate.py"))["coming_from"](features)


def test_a_row_taken_out_opens_the_door_for_flags_fields_bodies_and_documentation() -> None:
    opened = without("images, audio and video are")
    for features, closed in ((NOT_BUILT, True), (opened, False)):
        assert ("--multimodal" in elsewhere(features)) == closed
        assert (feature_of("messages[0].image_url", features) is not None) == closed
        assert ("image_data" in off_fields("GenerateRequest", features)) == closed
        assert ("modalities" in off_fields("ChatCompletionRequest", features)) == closed
        assert ("| images, audio and video |" in pages(features)) == closed

    @with_fields(off_fields("GenerateRequest", opened))
    class Opened(Body):
        image_data: str | None = None

    assert Opened.model_validate({"image_data": "a"}).image_data == "a"
    with pytest.raises(pydantic.ValidationError):
        GenerateRequest.model_validate({"image_data": "a"})


def test_fields_that_bodies_declare_themselves_ask_for_no_feature_of_the_table() -> None:
    for name, body in BODIES.items():
        assert off_fields(name).keys() <= body.model_fields.keys()
        closed = {field for field, about in body.model_fields.items() if about.annotation is type(None)}
        assert [field for field in closed - off_fields(name).keys() if feature_of(field)] == []


def test_the_table_names_no_body_and_no_field_in_vain() -> None:
    for feature in NOT_BUILT:
        for body, fields in [*feature.null.items(), *feature.off.items()]:
            assert body in BODIES
            assert set(fields.split()) <= set(feature.fields.split()), feature.name


def test_no_flag_of_ours_belongs_to_a_feature_that_is_not_built() -> None:
    closed = flag_patterns(NOT_BUILT)
    assert [option for flag in FLAGS for option in flag.options if said_of(option, closed)] == []
    assert said_of("--speculative-dflash-block-size", closed)


def flag_patterns(features: tuple[Feature, ...]) -> dict[str, str]:
    return {pattern: feature.name for feature in features for pattern in feature.flags.split()}
