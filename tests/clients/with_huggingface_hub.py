import asyncio

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import BadRequestError, HfHubHTTPError
from served import ANSWER, BASE_URL, CHAT_TOKENS, KEY, MESSAGES, MODEL

client = InferenceClient(base_url=BASE_URL, api_key=KEY)
ASKED = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}


def test_chat_and_its_stream():
    answer = client.chat_completion(**ASKED)
    assert answer.choices[0].message.content == ANSWER
    assert answer.usage.prompt_tokens == CHAT_TOKENS
    chunks = client.chat.completions.create(**ASKED, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER


def test_asynchronous_chat():
    async def ask() -> str:
        answer = await AsyncInferenceClient(base_url=BASE_URL, api_key=KEY).chat_completion(**ASKED)
        return answer.choices[0].message.content

    assert asyncio.run(ask()) == ANSWER


def test_log_probabilities_and_formats():
    answer = client.chat_completion(**ASKED, logprobs=True, top_logprobs=2)
    assert [one.token for one in answer.choices[0].logprobs.content[:2]] == ['"', "H"]
    schema = {"name": "a", "schema": {"enum": ["yes", "no"]}}
    asked = {"model": MODEL, "messages": MESSAGES, "response_format": {"type": "json_schema", "json_schema": schema}}
    assert client.chat_completion(**asked).choices[0].message.content in ('"yes"', '"no"')


def test_errors_have_their_types():
    with pytest.raises(BadRequestError, match="temperature"):
        client.chat_completion(**ASKED | {"temperature": -1})
    with pytest.raises(HfHubHTTPError, match="401"):
        InferenceClient(base_url=BASE_URL, api_key="wrong").chat_completion(**ASKED)
