"""Tests of sampling parameters: limits, types, and errors that name the parameter."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Annotated

import numpy as np
import pydantic
import pytest

from sgl_jax.engine.generation import DuplicateRequestId
from sgl_jax.engine.native_params import sampling_params
from sgl_jax.request import PARAMETERS, About, Api, InvalidParameter, SamplingParams, parameters_of
from sgl_jax.server.bodies import Body, native_params, openai_params, sampling_fields, with_fields
from sgl_jax.step_plan import Param


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 1e39),
        ("temperature", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-46),
        ("repetition_penalty", 1e39),
        ("min_tokens", 10**400),
        ("top_k", 2**64),
        ("top_k", -2),
        ("top_p", 0.0),
        ("min_p", 1.5),
        ("max_tokens", -1),
        ("seed", 2**64),
        ("logprobs", 21),
        ("logit_bias", {100: 1.0}),
        ("logit_bias", {1: 101.0}),
        ("stop_token_ids", (100,)),
        ("stop", "abc"),
        ("stop", ("",)),
        ("stream_interval", 0),
    ],
)
def test_a_value_the_device_could_not_honour_is_refused_by_name(param, value):
    with pytest.raises(InvalidParameter) as refused:
        SamplingParams(**{param: value}).validate(vocab_size=100)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("param", "value"),
    [
        *((each.name, None) for each in PARAMETERS if each.default is not None and each.kind is not bool),
        *((each.name, 1.5) for each in PARAMETERS if each.kind is int),
        ("temperature", "1"),
        ("logit_bias", [1]),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", {1: None}),
        ("logit_bias", "abc"),
        ("stop", ""),
        ("stop", (1,)),
        ("stop_token_ids", ("1",)),
        ("stop_token_ids", 1),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(param, value):
    """Parameters made in this process reach the engine unconverted: nothing else checks their types."""
    with pytest.raises(InvalidParameter, match=rf"^{param}\b.* must be ") as refused:
        SamplingParams(**{param: value}).validate(vocab_size=100)
    assert refused.value.param == param


@pytest.mark.parametrize(("value", "got"), [({"a": 1}, "str"), ({1: "a"}, "str"), ({1.5: 1}, "float")])
def test_a_dictionary_that_cannot_be_converted_is_refused_by_name(value, got):
    with pytest.raises(InvalidParameter, match=rf"^logit_bias\b.* `{got}`$") as refused:
        sampling_params({"logit_bias": value})
    assert refused.value.param == "logit_bias"


def test_numpy_numbers_and_lists_are_taken():
    ids = np.array([3, 4], np.int32)
    bias = {np.int64(1): np.float32(2)}
    SamplingParams(stop_token_ids=ids, stop=["a"], logit_bias=bias, top_k=np.int32(3)).validate(vocab_size=100)


def test_the_edges_are_allowed():
    SamplingParams(
        temperature=1e4, repetition_penalty=1e-3, top_k=2**31 - 1, min_p=1.0, seed=-(2**63), logit_bias={99: -100.0}
    ).validate(vocab_size=100)


def test_the_limits_are_compared_once() -> None:
    """A request body's fields have the same limits, so numbers from a body are not compared again."""
    SamplingParams(temperature=-1.0).validate(vocab_size=100, in_range=True)
    with pytest.raises(InvalidParameter):
        SamplingParams(stop_token_ids=(100,)).validate(vocab_size=100, in_range=True)


class Warm(SamplingParams, frozen=True, kw_only=True):
    """SamplingParams with one more parameter, which nothing else knows of."""

    warmth: Annotated[float, About("how friendly", 0.0, 9.0, native="warmth heat")] = 0.5


ONE_MORE = parameters_of(Warm)


def test_one_declaration_makes_a_parameter() -> None:
    with pytest.raises(InvalidParameter, match=r"^warmth .*9\.5.* 0\.0 .*9\.0"):
        Warm(warmth=9.5).validate(vocab_size=100)
    Warm(warmth=9.0).validate(vocab_size=100)

    given = sampling_params({"heat": 2, "seed": 1}, Warm)
    assert (given.params, given.default_max_tokens) == (Warm(warmth=2.0, seed=1), 128)
    heat = sampling_params({"heat": 10}, Warm)
    with pytest.raises(InvalidParameter, match=r"^warmth .*10\.0.* 0\.0 .*9\.0") as refused:
        heat.params.validate(vocab_size=100)
    named = refused.value.named(heat.names)
    assert (str(named), named.param) == (str(refused.value).replace("warmth", "heat"), "heat")
    with pytest.raises(InvalidParameter, match="heat and warmth"):
        sampling_params({"warmth": 1, "heat": 1}, Warm)

    table = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "generate.py"))["sampling_table"]
    assert "| `warmth` | same, `heat` | same | 0.5 | how friendly; between 0.0 and 9.0 |" in table(ONE_MORE)


@pytest.mark.parametrize("api", ["native", "openai"])
def test_one_declaration_makes_a_field_of_a_body(api: Api) -> None:
    @with_fields(sampling_fields(api, ONE_MORE))
    class Asked(Body):
        """Request body with the sampling fields of the API."""

    read = {"native": lambda body: native_params(body, Warm), "openai": lambda body: openai_params(body, {}, {}, Warm)}
    given = read[api](Asked.model_validate({"warmth": 2}))
    assert given.params.warmth == 2.0
    assert given.in_range
    with pytest.raises(pydantic.ValidationError, match="9"):
        Asked.model_validate({"warmth": 10})
    with pytest.raises(pydantic.ValidationError, match="valid number"):
        Asked.model_validate({"warmth": "2"})
    assert ("heat" in Asked.model_fields) == (api == "native")
    assert Asked.model_json_schema()["properties"]["warmth"]["description"] == "how friendly"


def test_an_error_is_told_in_the_users_words_and_its_values_are_left_alone() -> None:
    text = "{min_tokens} is {value}, above {max_tokens} {limit}"
    error = InvalidParameter("min_tokens", text, value="max_tokens {max_tokens} ", limit=3)
    assert str(error) == "min_tokens is max_tokens {max_tokens} , above max_tokens 3"
    named = error.named({"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "value": "x"})
    assert (str(named), named.param) == (
        "min_new_tokens is max_tokens {max_tokens} , above max_new_tokens 3",
        "min_new_tokens",
    )
    plain = DuplicateRequestId("rid", "request id max_tokens {max_tokens}")
    assert str(plain.named({"max_tokens": "max_new_tokens"})) == str(plain)
    assert isinstance(plain.named({}), DuplicateRequestId)


def test_every_device_column_but_adapter_and_flags_has_its_parameter() -> None:
    columns = [each.about.column for each in PARAMETERS if each.about.column]
    assert sorted([*columns, "ADAPTER", "FLAGS"]) == sorted(column.name for column in Param)
