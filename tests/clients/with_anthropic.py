import anthropic
import pytest
from served import ANSWER, KEY, MESSAGES, MODEL, URL

client = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)
asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "extra_body": {"temperature": 0}}
TOOL = {
    "name": "weather",
    "strict": True,
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Paris"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def test_a_message():
    message = client.messages.create(**asked)
    assert [block.text for block in message.content] == [ANSWER]
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 12)


def test_a_stream_gives_the_same_message():
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == ANSWER
        final = stream.get_final_message()
    assert [block.text for block in final.content] == [block.text for block in whole.content]
    assert final.stop_reason == whole.stop_reason
    usage, other = final.usage, whole.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == other.input_tokens + other.cache_read_input_tokens
    assert usage.output_tokens == other.output_tokens


def test_a_forced_call_has_an_input_of_the_schema():
    forced = asked | {"tools": [TOOL], "max_tokens": 100}
    choice = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    with client.messages.stream(**forced, tool_choice=choice) as stream:
        events = [event.type for event in stream]
        message = stream.get_final_message()
    assert message.stop_reason == "tool_use"
    (call,) = [block for block in message.content if block.type == "tool_use"]
    assert call.input["city"] in ("Oslo", "Paris")
    assert "input_json" in events


def test_counted_tokens_are_those_of_a_message():
    tools = [TOOL | {"strict": False}]
    counted = client.messages.count_tokens(model=MODEL, messages=MESSAGES, tools=tools)
    usage = client.messages.create(**asked, tools=tools).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_beta_calls_of_an_agent():
    system = [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}]
    message = client.beta.messages.create(**asked, system=system, betas=["a"], thinking={"type": "adaptive"})
    assert message.stop_reason == "max_tokens"


def test_errors_are_those_of_the_library():
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**(asked | {"model": "other"}))
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(**(asked | {"max_tokens": 0}))
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=URL, api_key="wrong", max_retries=0).messages.create(**asked)
