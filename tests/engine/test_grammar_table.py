"""Grammars on the API side: whether and how often the engine is asked to compile one."""

from __future__ import annotations

import asyncio

import pytest

from messages import says
from sgl_jax.engine.generation import GenerationRequest
from sgl_jax.engine.grammar_table import GrammarTable
from sgl_jax.request import InvalidParameter, SamplingParams


class Engine:
    def __init__(self) -> None:
        self.asked: list[str] = []

    async def __call__(self, command, answer) -> int:
        self.asked.append(command(1).text)
        await asyncio.sleep(0)
        if "bad" in self.asked[-1]:
            raise InvalidParameter("regex", "it has {braces}")
        return 0


def request(regex: str) -> GenerationRequest:
    return GenerationRequest([1], SamplingParams(regex=regex), names={"regex": "guided_regex"})


def test_requests_with_one_grammar_share_a_call_and_the_answer_is_kept() -> None:
    async def run() -> list[str]:
        engine = Engine()
        table = GrammarTable(engine)
        await asyncio.gather(*(table.prepare([request("a")], enabled=True) for _ in range(3)))
        await table.prepare([request("a"), GenerationRequest([1], SamplingParams())], enabled=True)
        assert table.num_calls == 0
        return engine.asked

    assert asyncio.run(run()) == ["a"]


@pytest.mark.parametrize(
    ("enabled", "message"), [(True, "guided_regex … it has {braces}"), (False, "guided_regex … --grammar-backend")]
)
def test_a_refusal_has_the_users_name_and_is_not_kept(enabled: bool, message: str) -> None:
    async def run() -> list[str]:
        engine = Engine()
        table = GrammarTable(engine)
        for _ in range(2):
            with pytest.raises(InvalidParameter) as refused:
                await table.prepare([request("bad")], enabled)
            assert refused.value.param == "guided_regex"
            assert says(str(refused.value), message)
        return engine.asked

    assert asyncio.run(run()) == ["bad"] * (2 * enabled)
