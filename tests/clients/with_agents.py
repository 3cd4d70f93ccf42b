"""OpenAI's agents: a loop over calls, their results and an answer of a schema."""

from typing import Literal

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI
from pydantic import BaseModel
from served import BASE_URL, CLOSING_BRACE, KEY, MODEL


class Weather(BaseModel):
    city: Literal["Oslo", "Paris"]
    day: Literal[1, 2]


def agent(**parameters) -> Agent:
    set_tracing_disabled(True)
    model = OpenAIChatCompletionsModel(MODEL, AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0))
    return Agent(name="teller", model=model, **parameters)


def test_an_answer_of_a_schema():
    found = Runner.run_sync(agent(output_type=Weather, model_settings=ModelSettings(temperature=0)), "Hello")
    assert isinstance(found.final_output, Weather)


def test_a_call_its_result_and_an_answer():
    called = []

    @function_tool
    def today(city: str = "Oslo") -> str:
        called.append(city)
        return "sunny"

    bias = {"logit_bias": {CLOSING_BRACE: 100}}
    settings = ModelSettings(
        temperature=0, tool_choice="required", parallel_tool_calls=False, max_tokens=60, extra_body=bias
    )
    found = Runner.run_sync(agent(tools=[today], model_settings=settings), "Hello")
    assert called == ["Oslo"]
    assert [item.type for item in found.new_items][:2] == ["tool_call_item", "tool_call_output_item"]
    assert found.final_output
