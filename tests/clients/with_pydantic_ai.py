from typing import Literal

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from served import BASE_URL, KEY, MODEL


class Weather(BaseModel):
    city: Literal["Oslo", "Paris"]
    day: Literal[1, 2]


@pytest.mark.parametrize("output", [NativeOutput(Weather), ToolOutput(Weather, strict=True)])
def test_an_agent_gives_an_object(output):
    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=BASE_URL, api_key=KEY))
    settings = {"temperature": 0, "parallel_tool_calls": False}
    found = Agent(model, output_type=output, model_settings=settings).run_sync("Hello")
    assert isinstance(found.output, Weather)
