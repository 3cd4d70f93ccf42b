import asyncio
from typing import Literal

import openai
import pytest
from llama_index.core import PromptTemplate
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel
from served import ANSWER, BASE_URL, CHAT_TOKENS, COMPLETION, KEY, MODEL, PROMPT

HELLO = [ChatMessage(role="user", content="Hello")]


def model(**options) -> OpenAILike:
    options = {"is_chat_model": True, "api_key": KEY, "max_tokens": 12, "temperature": 0} | options
    return OpenAILike(model=MODEL, api_base=BASE_URL, context_window=512, max_retries=0, **options)


def test_chat_and_its_stream():
    answer = model().chat(HELLO)
    assert answer.message.content == ANSWER
    assert answer.raw.usage.prompt_tokens == CHAT_TOKENS
    assert "".join(chunk.delta or "" for chunk in model().stream_chat(HELLO)) == ANSWER
    assert asyncio.run(model().achat(HELLO)).message.content == ANSWER


def test_completion_and_its_stream():
    plain = model(is_chat_model=False)
    assert plain.complete(PROMPT).text == COMPLETION
    assert "".join(chunk.delta for chunk in plain.stream_complete(PROMPT)) == COMPLETION


def test_errors_have_their_types():
    with pytest.raises(openai.BadRequestError, match="top_p"):
        model(additional_kwargs={"top_p": 2}).chat(HELLO)
    with pytest.raises(openai.AuthenticationError):
        model(api_key="wrong").chat(HELLO)


class Weather(BaseModel):
    """Tell the weather."""

    city: Literal["Oslo", "Paris"]
    day: Literal[1, 2]


def test_tools_are_called():
    def weather(city: Literal["Oslo", "Paris"], day: Literal[1, 2]) -> str:
        """Tell the weather."""
        return f"{city} {day}"

    tool = FunctionTool.from_defaults(weather)
    calling = model(is_function_calling_model=True, max_tokens=None, strict=True)
    answer = calling.chat_with_tools([tool], user_msg="Hello", tool_required=True)
    [call] = calling.get_tool_calls_from_response(answer)
    assert (call.tool_name, call.tool_kwargs["city"] in ("Oslo", "Paris")) == ("weather", True)


def test_structured_output():
    calling = model(is_function_calling_model=True, max_tokens=None, should_use_structured_outputs=True)
    assert isinstance(calling.structured_predict(Weather, PromptTemplate("Hello")), Weather)
