"""Structured output of a real engine against a slow reference, in every setting.

The reference asks for one token at a time, with a logit bias that takes every token away which the grammar does not allow.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jsonschema_rs
import numpy as np
import pytest
from exact import ALL_PROMPTS, TOLERANCE, Build, with_empty_cache

from sgl_jax.constrained.grammar import compile_grammar
from sgl_jax.constrained.token_tree import TokenTree, token_tree
from sgl_jax.engine import grammar_compiles
from sgl_jax.engine.core import Core
from sgl_jax.request import SamplingParams
from sgl_jax.runtime.runner import ModelRunner
from sgl_jax.text.tokenizer import Tokenizer, load_tokenizer
from simulated import Client

VOCAB, EOS, MAX_TOKENS = 512, 2, 40
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
        "more": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "tags", "more"],
    "additionalProperties": False,
}
# Names of SamplingParams; the empty grammar stands between the others, since they share steps.
ASKED: list[dict] = [
    {"json_schema": json.dumps(PERSON)},
    {},
    {"regex": "(once|twice|[a-f]{3,9}) [0-9]{1,4}"},
    {"ebnf": 'root ::= "the " ("cat " | "dog ")+ "ran"'},
    {"json_schema": '{"enum": [1, 22, 333]}'},
    {"json_schema": '{"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}'},
]
PROMPTS = np.random.default_rng(0).integers(3, VOCAB, (len(ASKED), 20)).tolist()


@pytest.fixture(scope="module")
def tokenizer(stories260k: Path) -> Tokenizer:
    return load_tokenizer(str(stories260k))


@pytest.fixture(scope="module")
def start(build: Build, stories260k: Path) -> Callable[..., Core]:
    started: list[Core] = []

    def start(**options) -> Core:
        launch = {"page_size": 4, "context_length": 256} | options
        if options:
            return build(stories260k, ALL_PROMPTS, **launch)
        if not started:
            started.append(build(stories260k, ALL_PROMPTS, **launch))
        return started[0]

    return start


@pytest.fixture(scope="module")
def reference(start, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the tokens of greedy answers to PROMPTS."""
    client, keys, tree = (
        Client(with_empty_cache(start())),
        iter(range(10**6, 10**7)),
        token_tree(tokenizer, VOCAB, [EOS]),
    )
    answers = []
    for prompt, asked in zip(PROMPTS, ASKED, strict=True):
        grammar = SamplingParams(**asked).grammar
        matcher = compile_grammar(tree, grammar).matcher() if grammar else None
        tokens: list[int] = []
        while len(tokens) < MAX_TOKENS and tokens[-1:] != [EOS]:
            bias = {}
            if matcher is not None:
                allowed = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")[:VOCAB]
                bias = dict.fromkeys(np.flatnonzero(allowed == 0).tolist(), -100.0)
            client.submit(key := next(keys), [*prompt, *tokens], temperature=0.0, max_tokens=1, logit_bias=bias)
            client.run()
            tokens += client.answers[key].tokens
            if matcher is not None and tokens[-1] != EOS:
                matcher.advance(tokens[-1:])
        answers.append(tokens)
    return answers


def ask(core: Core, **params) -> dict[int, list[int]]:
    """Send all requests at once and return their tokens by index."""
    client = Client(core)
    for i, (prompt, asked) in enumerate(zip(PROMPTS, ASKED, strict=True)):
        client.submit(i, prompt, max_tokens=MAX_TOKENS, **asked, **params)
    client.run()
    return client.tokens


@pytest.mark.parametrize("overlap", [True, False])
def test_greedy_tokens_are_those_of_the_reference(start, reference: list[list[int]], overlap: bool) -> None:
    core = with_empty_cache(start(), overlap=overlap)
    for _ in range(2):  # the second turn finds the prefixes of the first
        assert [*ask(core, temperature=0.0).values()] == reference
    assert core.runner.compiles_after_ready == 0


@pytest.mark.parametrize(
    "options",
    [
        {"max_total_tokens": 100, "context_length": 96},  # one request fits for certain: rows are preempted
        {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 4},
        {"disable_radix_cache": True, "attention_backend": "native"},
    ],
    ids=["preempted", "drafts", "native, without prefixes"],
)
def test_tokens_are_the_same_in_every_setting(start, reference: list[list[int]], options: dict) -> None:
    core = start(**options)
    assert [*ask(core, temperature=0.0).values()] == reference
    sampled = {"temperature": 1.0, "seed": 5, "frequency_penalty": 0.3, "min_tokens": 3, "logit_bias": {300: 2.0}}
    assert ask(core, **sampled) == ask(with_empty_cache(start(), overlap=False), **sampled)
    assert (core.scheduler.counters.preemptions > 0) == ("max_total_tokens" in options)


def test_sampled_answers_are_valid_and_end(start, tokenizer: Tokenizer) -> None:
    """An untrained mind: at a temperature of 10 nearly all tokens are alike."""
    client, schema = Client(with_empty_cache(start())), jsonschema_rs.validator_for(PERSON)
    for key in range(100, 400):
        params = {"temperature": 10.0, "seed": key, "json_schema": json.dumps(PERSON)}
        client.submit(key, PROMPTS[key % 3], max_tokens=200, **params)
    client.run(max_steps=20_000)
    for key in range(100, 400):
        answer = client.answers[key]
        assert answer.tokens[-1] == EOS, tokenizer.decode(answer.tokens)
        text = b"".join(map(tokenizer.token_bytes, answer.tokens[:-1])).decode()
        assert schema.is_valid(json.loads(text)), text


def test_logprobs_are_the_models_own(start) -> None:
    """The first token of an answer has the logprob that it has without a grammar."""
    client = Client(with_empty_cache(start()))
    client.submit(1, PROMPTS[0], temperature=0.0, max_tokens=1, logprobs=20)
    client.submit(2, PROMPTS[0], temperature=0.0, max_tokens=1, logprobs=20, regex="[0-9]+")
    client.run()
    [free], [bound] = client.answers[1].logprobs, client.answers[2].logprobs
    assert client.tokens[1] != client.tokens[2]
    assert bound.top_ids == free.top_ids
    assert bound.top_logprobs == pytest.approx(
        free.top_logprobs, abs=TOLERANCE
    )  # one was computed behind a cached prefix
    assert bound.logprob < min(free.top_logprobs)


def test_a_seed_gives_the_same_answer_among_others(start) -> None:
    sampled = {"temperature": 1.0, "seed": 9}
    together = ask(with_empty_cache(start()), **sampled)
    alone = {}
    for i, (prompt, asked) in enumerate(zip(PROMPTS, ASKED, strict=True)):
        client = Client(with_empty_cache(start()))
        client.submit(i, prompt, max_tokens=MAX_TOKENS, **asked, **sampled)
        client.run()
        alone |= client.tokens
    assert together == alone


def test_a_core_is_ready_when_its_vocabulary_is_which_it_reads_beside_the_weights(
    build: Build, stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, said, start_runner = threading.Event(), list[str](), ModelRunner.start

    def start_it(*args) -> None:
        start_runner(*args)
        started.set()

    def make_tree(*args) -> TokenTree:
        said.append("beside the weights" if not started.is_set() else "behind them")
        started.wait(60)
        time.sleep(0.2)
        said.append("read")
        return token_tree(*args)

    monkeypatch.setattr(ModelRunner, "start", start_it)
    monkeypatch.setattr(grammar_compiles, "token_tree", make_tree)
    build(stories260k, ALL_PROMPTS, page_size=4, context_length=256)
    assert said == ["beside the weights", "read"]


def test_a_launch_without_grammars_has_no_room_for_masks(start, reference: list[list[int]]) -> None:
    core = start(grammar_backend="none")
    assert not core.info.takes_grammars
    assert "load mask" in {program.name for program in start().runner.programs}
    assert "load mask" not in {program.name for program in core.runner.programs}
    client = Client(core)
    client.submit(1, PROMPTS[1], max_tokens=MAX_TOKENS, temperature=0.0)
    client.run()
    assert client.tokens[1] == reference[1]
