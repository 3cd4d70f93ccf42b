from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel
from served import BASE_URL, CLOSING_BRACE, KEY, MESSAGES, MODEL


class Weather(BaseModel):
    city: Literal["Oslo", "Paris"]
    day: Literal[1, 2]


class Anything(BaseModel):
    city: str | None = None


def ask(mode, form, **more):
    client = instructor.from_openai(OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0), mode=mode)
    asked = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_retries": 0}
    bias = {CLOSING_BRACE: 100}  # instructor's schemas allow further keys, without end
    return client.chat.completions.create(response_model=form, logit_bias=bias, **asked, **more)


def test_an_answer_of_a_schema():
    assert isinstance(ask(instructor.Mode.JSON_SCHEMA, Weather), Weather)


def test_a_call_of_a_named_function():
    assert isinstance(ask(instructor.Mode.TOOLS, Anything, parallel_tool_calls=False), Anything)
