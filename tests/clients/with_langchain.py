import asyncio
from typing import Literal

import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel
from served import ANSWER, BASE_URL, CHAT_TOKENS, COMPLETION, KEY, MODEL, PROMPT, UP_TO_SAID


def chat(**parameters) -> ChatOpenAI:
    parameters = {"model": MODEL, "api_key": KEY, "max_tokens": 12, "temperature": 0} | parameters
    return ChatOpenAI(base_url=BASE_URL, max_retries=0, **parameters)


def completions(**parameters) -> OpenAI:
    parameters = {"max_tokens": 12, "temperature": 0} | parameters
    return OpenAI(base_url=BASE_URL, model=MODEL, api_key=KEY, max_retries=0, **parameters)


def test_chat():
    answer = chat().invoke("Hello")
    assert answer.content == ANSWER
    assert (answer.usage_metadata["input_tokens"], answer.usage_metadata["output_tokens"]) == (CHAT_TOKENS, 12)
    assert answer.response_metadata["finish_reason"] == "length"


def test_chat_streams_the_same():
    chunks = list(chat(stream_usage=True).stream("Hello"))
    assert "".join(chunk.content for chunk in chunks) == ANSWER
    assert sum(chunks[1:], chunks[0]).usage_metadata["output_tokens"] == 12


def test_batches_and_asynchronous_calls():
    assert [one.content for one in chat().batch(["Hello"] * 3)] == [ANSWER] * 3
    assert asyncio.run(chat().ainvoke("Hello")).content == ANSWER


def test_chat_stops_and_gives_log_probabilities():
    answer = chat(logprobs=True, top_logprobs=2).invoke("Hello", stop=[" said"])
    assert answer.content == UP_TO_SAID
    assert [one["token"] for one in answer.response_metadata["logprobs"]["content"][:2]] == ['"', "H"]


def test_completions():
    assert completions().invoke(PROMPT) == COMPLETION
    assert "".join(completions().stream(PROMPT)) == COMPLETION
    assert completions().invoke(PROMPT, stop=[" named"]) == ", there was a little girl"
    result = completions(logprobs=2, batch_size=2).generate([PROMPT] * 2)
    assert [one[0].text for one in result.generations] == [COMPLETION] * 2
    assert result.llm_output["token_usage"]["completion_tokens"] == 24


def test_errors_have_their_types():
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat(temperature=-1).invoke("Hello")
    with pytest.raises(ContextOverflowError):
        chat().invoke("long " * 600)
    with pytest.raises(openai.AuthenticationError):
        chat(api_key="wrong").invoke("Hello")
    with pytest.raises(openai.NotFoundError, match="unheard-of"):
        chat(model="unheard-of").invoke("Hello")


def test_a_time_limit_ends_the_request():
    with pytest.raises(openai.APITimeoutError):
        chat(timeout=0.001, max_tokens=400).invoke("Hello")


class Weather(BaseModel):
    """Tell the weather."""

    city: Literal["Oslo", "Paris"]
    day: Literal[1, 2]


def test_bound_tools_are_called():
    model = chat(max_tokens=None).bind_tools([Weather], tool_choice="any", strict=True, parallel_tool_calls=False)
    [call] = model.invoke("Hello").tool_calls
    assert (call["name"], Weather(**call["args"]).city in ("Oslo", "Paris")) == ("Weather", True)
    chunks = list(model.stream("Hello"))
    [streamed] = sum(chunks[1:], chunks[0]).tool_calls
    assert streamed["args"] == call["args"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(method):
    model = chat(max_tokens=None).with_structured_output(Weather, method=method, strict=True)
    assert isinstance(model.invoke("Hello"), Weather)
