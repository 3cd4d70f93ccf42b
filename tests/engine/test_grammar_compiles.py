"""Grammars on the engine's side: calls are answered, and a grammar that fails ends the requests that need it."""

from __future__ import annotations

import itertools

import pytest

from fakes.fake_grammars import FakeGrammars
from sgl_jax.engine.core import Core
from sgl_jax.engine.grammar_compiles import Grammars
from sgl_jax.engine.messages import CompileGrammar, GrammarCompiled, Refused
from sgl_jax.request import FinishReason
from simulated import Client, make_core

VOCAB = 64


def core_with(looks: int = 2, seconds: float = 30.0, **options) -> Core:
    return core_over(FakeGrammars(VOCAB, looks), seconds, **options)


def core_over(compiler: FakeGrammars, seconds: float = 30.0, most_kept: int = 128, **options) -> Core:
    return make_core(vocab_size=VOCAB, eos=0, grammars=Grammars(compiler, seconds, most_kept), **options)


def test_calls_are_answered_in_the_order_in_which_grammars_are_compiled() -> None:
    client = Client(core_with())
    client.core.handle(CompileGrammar(1, "regex", "good"))
    client.core.handle(CompileGrammar(2, "regex", "bad"))
    client.run()
    assert client.said == [GrammarCompiled(1), Refused(2, "it is bad", "regex")]


def test_a_grammar_that_takes_too_long_is_refused() -> None:
    compiler = FakeGrammars(VOCAB, looks=10**9)
    client = Client(core_over(compiler, seconds=5.0))
    client.core.handle(CompileGrammar(1, "ebnf", "slow"))
    client.submit(2, [1, 2], ebnf="slow")
    client.step()
    [slow] = compiler.compiled
    slow.seconds = 5.0
    client.run()
    [refused] = client.said
    assert isinstance(refused, Refused)
    assert (refused.call, refused.param) == (1, "ebnf")
    assert "5 seconds" in refused.message
    reason = client.answers[2].reason
    assert reason is not None
    assert "5 seconds" in str(reason.message)


def test_grammars_of_live_requests_are_compiled_once_however_many_they_are() -> None:
    compiler = FakeGrammars(VOCAB)
    client = Client(core_over(compiler, most_kept=1, rows=1))
    for key, text in enumerate("abcdab"):
        client.submit(key, [1, 2], regex=text, max_tokens=3)
    client.run()
    assert sorted(each.text for each in compiler.compiled) == list("abcd")
    for answer in client.answers.values():
        answer.check(VOCAB)


def test_grammars_that_failed_push_out_none_that_is_kept() -> None:
    compiler = FakeGrammars(VOCAB)
    client = Client(core_over(compiler, most_kept=1))
    for call, text in enumerate(["good", *["bad"] * 3, "good"]):
        client.core.handle(CompileGrammar(call, "regex", text))
        client.run()
    assert [each.text for each in compiler.compiled] == ["good", "bad", "bad", "bad"]


@pytest.mark.parametrize("overlap", [True, False])
def test_an_error_of_a_matcher_ends_its_request_and_no_other(overlap: bool) -> None:
    client = Client(core_with(overlap=overlap))
    client.submit(1, [1, 2], regex="fails after 3", max_tokens=20)
    client.submit(2, [1, 2], regex="good", max_tokens=20)
    client.submit(3, [1, 2], max_tokens=20, ignore_eos=True)
    client.submit(4, [1, 2], regex="bad", max_tokens=20)
    client.run()
    reasons = {key: answer.reason for key, answer in client.answers.items()}
    assert reasons[1] == FinishReason("abort", message="the grammar of the request failed: it is too complex")
    assert len(client.tokens[1]) in (3, 4)
    assert reasons[4] == FinishReason("abort", message="the grammar of the request failed: it is bad")
    for key in (2, 3):
        client.answers[key].check(VOCAB)


def test_rows_without_a_grammar_run_in_every_step_and_those_with_one_in_every_other() -> None:
    core = core_with(looks=0)
    client = Client(core)
    client.submit(1, [1, 2], ignore_eos=True, max_tokens=12)
    client.submit(2, [3, 4], regex="good", min_tokens=6, max_tokens=12)
    client.run()
    [free, bound] = ([i for i, plan in enumerate(core.runner.plans) if key in plan.keys] for key in (1, 2))
    assert free == list(range(12))
    assert bound == [1, 3, 5, 7, 9, 11, *bound[6:]]  # behind the step in which its grammar is compiled


def test_rows_with_grammars_that_were_admitted_apart_come_to_share_their_steps() -> None:
    core = core_with(looks=0)
    client = Client(core)
    client.submit(1, [1, 2], regex="good", min_tokens=20, max_tokens=24)
    for _ in range(3):
        client.step()
    client.submit(2, [3, 4], regex="b", min_tokens=20, max_tokens=24)
    client.run()
    sizes = [len(plan.keys) for plan in core.runner.plans]
    assert sizes.count(2) >= 15


def test_a_mask_is_loaded_only_when_it_has_changed() -> None:
    core = core_with(looks=0)
    client = Client(core)
    client.submit(1, [1, 2], regex="good", min_tokens=10, max_tokens=10)
    client.submit(2, [1, 2], max_tokens=10, ignore_eos=True)
    client.run()
    rows = [load.row for plan in core.runner.plans for load in plan.loads if load.mask is not None]
    assert len(rows) == len(client.tokens[1])
    assert len(set(rows)) == 1


def test_no_row_waits_twice_for_others_that_come_in_every_step() -> None:
    core = core_with(looks=0, rows=12)
    client = Client(core)
    client.submit(0, [1, 2], regex="good", min_tokens=40, max_tokens=40)
    for key in range(1, 12):
        client.step()
        client.submit(key, [key, 4], regex="good", min_tokens=40, max_tokens=40)
    runs = [i for i, plan in enumerate(core.runner.plans) if 0 in plan.keys]
    assert max(after - before for before, after in itertools.pairwise(runs)) <= 3
    assert len(runs) >= 4


@pytest.mark.parametrize("overlap", [True, False])
def test_tokens_are_sent_before_the_masks_behind_them_are_computed(overlap: bool) -> None:
    client = Client(core_with(looks=0, overlap=overlap))
    client.submit(1, [1, 2], regex="good", min_tokens=20, max_tokens=20)
    while client.core.busy:
        num_sent = len(client.tokens[1])
        client.step()
        assert client.core.scheduler.grammars.num_masks <= 1 + num_sent
    assert client.core.scheduler.grammars.num_masks == len(client.tokens[1]) == 20


def test_compiles_and_masks_are_counted() -> None:
    client = Client(core_with())
    client.submit(1, [1, 2], regex="good", min_tokens=5, max_tokens=5)
    client.run()
    stats = client.stats[-1]
    assert (stats.grammars_compiled, stats.grammar_masks) == (1, 5)
    assert stats.grammar_mask_seconds > 0
