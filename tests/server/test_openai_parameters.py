"""Every parameter of OpenAI's schemas, as the official client's types list them: taken, or refused by its name."""

from __future__ import annotations

import httpx
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
NEEDED = {
    CHAT: {"model": "stories", "messages": [{"role": "user", "content": "a"}]},
    COMPLETIONS: {"model": "stories", "prompt": "a"},
}
SCHEMAS = {CHAT: chat_create_params, COMPLETIONS: completion_create_params}
PARAMETERS = [
    (path, name)
    for path, schema in SCHEMAS.items()
    for name in [*schema.CompletionCreateParamsBase.__annotations__, "stream"]
    if name not in NEEDED[path]
]
# Values that ask for nothing which changes the output; clients send them.
NEUTRAL = {
    "user": "u",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "safety_identifier": "u",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "parallel_tool_calls": True,
    "modalities": ["text"],
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
    "logprobs": False,
    "top_logprobs": 0,
    "max_tokens": 3,
    "max_completion_tokens": 3,
}


@pytest.mark.parametrize(("path", "name"), PARAMETERS)
def test_null_is_as_good_as_nothing(http: httpx.Client, path: str, name: str) -> None:
    answer = http.post(path, json=NEEDED[path] | {name: None})
    assert answer.status_code == 200, answer.text


def test_all_nulls_together_are_nothing(http: httpx.Client) -> None:
    for path, needed in NEEDED.items():
        body = needed | {name: None for at, name in PARAMETERS if at == path}
        assert http.post(path, json=body).status_code == 200


def test_values_that_change_no_output_are_taken_together(http: httpx.Client) -> None:
    answer = http.post(CHAT, json=NEEDED[CHAT] | NEUTRAL)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(("path", "name"), PARAMETERS)
def test_a_value_of_no_type_is_refused_by_name(http: httpx.Client, path: str, name: str) -> None:
    answer = http.post(path, json=NEEDED[path] | {name: [["?"]]})
    assert (answer.status_code, answer.json()["error"]["param"].partition("[")[0]) == (400, name)
