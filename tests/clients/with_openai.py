from typing import Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel
from served import BASE_URL, CLOSING_BRACE, KEY, MESSAGES, MODEL


class Weather(BaseModel):
    """Tell the weather."""

    city: Literal["Oslo", "Paris"]
    day: Literal[1, 2]


client = OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
asked = {"model": MODEL, "messages": MESSAGES, "temperature": 0}
STRICT = openai.pydantic_function_tool(Weather)
FREE = {"type": "function", "function": {"name": "news", "parameters": {"type": "object"}}}
NEWS = {"type": "function", "function": {"name": "news"}}


def test_parse_gives_the_object():
    choice = client.chat.completions.parse(**asked, response_format=Weather).choices[0]
    assert isinstance(choice.message.parsed, Weather)
    assert choice.finish_reason == "stop"


def test_a_stream_gives_the_same_object():
    whole = client.chat.completions.parse(**asked, response_format=Weather).choices[0].message
    with client.chat.completions.stream(**asked, response_format=Weather) as stream:
        events = list(stream)
        assert stream.get_final_completion().choices[0].message.parsed == whole.parsed
    assert [event.parsed for event in events if event.type == "content.done"] == [whole.parsed]


def test_a_required_call_has_parsed_arguments():
    required = {"tools": [STRICT], "tool_choice": "required", "parallel_tool_calls": False}
    choice = client.chat.completions.parse(**asked, **required).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    [call] = choice.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    with client.chat.completions.stream(**asked, **required) as stream:
        [streamed] = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.parsed_arguments == call.function.parsed_arguments


@pytest.mark.parametrize(
    "choice", [NEWS, {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NEWS]}}]
)
def test_a_named_function_is_called(choice):
    some = {"tools": [STRICT, FREE], "tool_choice": choice, "parallel_tool_calls": False}
    answer = client.chat.completions.create(**asked, **some, logit_bias={CLOSING_BRACE: 100}).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert [(call.function.name, call.function.arguments) for call in answer.message.tool_calls] == [("news", "{}")]


def test_a_form_leaves_tools_callable():
    answer = client.chat.completions.parse(**asked, tools=[STRICT], response_format=Weather, parallel_tool_calls=False)
    message = answer.choices[0].message
    [found] = [message.parsed] if message.parsed else [call.function.parsed_arguments for call in message.tool_calls]
    assert isinstance(found, Weather)


def test_what_cannot_be_enforced_is_told():
    with pytest.raises(openai.BadRequestError, match="reasoning_effort"):
        client.chat.completions.create(**asked, reasoning_effort="low")


def test_a_response_and_its_stream():
    asked = {"model": MODEL, "input": "Hello", "temperature": 0, "max_output_tokens": 12}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        events = list(stream)
    final = events[-1].response  # the library's get_final_response knows no response that was cut
    assert final.status == "incomplete"
    assert final.output_text == whole.output_text
    assert [event.sequence_number for event in events if hasattr(event, "sequence_number")][:3] == [0, 1, 2]
    assert client.responses.retrieve(whole.id).output_text == whole.output_text


def test_a_response_of_a_schema():
    response = client.responses.parse(model=MODEL, input="Hello", temperature=0, text_format=Weather)
    assert isinstance(response.output_parsed, Weather)
