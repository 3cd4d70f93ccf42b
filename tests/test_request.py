"""What a request may ask: the limits, each named."""

from __future__ import annotations

import pytest

from sgl_jax.request import InvalidParameter, SamplingParams


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
        ("max_tokens", 0),
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


def test_the_edges_are_allowed():
    SamplingParams(
        temperature=1e4, repetition_penalty=1e-3, top_k=2**31 - 1, min_p=1.0, seed=-(2**63), logit_bias={99: -100.0}
    ).validate(vocab_size=100)
