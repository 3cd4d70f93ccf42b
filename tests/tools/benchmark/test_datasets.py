from __future__ import annotations

import argparse
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from sgl_jax.settings.flag_parser import FlagError
from sgl_jax.text.tokenizer import Tokenizer, load_tokenizer
from sgl_jax.tools.benchmark.arguments import parse
from sgl_jax.tools.benchmark.datasets import load_prompts
from sgl_jax.tools.benchmark.datasets.source import TextSource
from sgl_jax.tools.benchmark.protocols import Prompt
from sgl_jax.tools.benchmark.terminal import BenchmarkError

DATASETS = Path(__file__).parents[2] / "data" / "datasets"


@pytest.fixture(scope="module")
def tokenizer(stories260k: Path) -> Tokenizer:
    return load_tokenizer(str(stories260k))


@pytest.fixture(scope="module")
def qwen3(tokenizers: Path) -> Tokenizer:
    return load_tokenizer(str(tokenizers / "qwen3"))


def flags(*words: object) -> argparse.Namespace:
    return parse("bench_serving", [str(word) for word in words])[0]


def load(tokenizer: Tokenizer | None, *words: object, seed: int = 1, vocab_size: int | None = None) -> list[Prompt]:
    return load_prompts(flags(*words), tokenizer, vocab_size, seed)


def shared(a: list[int], b: list[int]) -> int:
    """How many tokens two prompts begin with together."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


RANDOM = ("--dataset-name", "random", "--num-prompts")


# --- random -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 3, 17, 250])
def test_random_text_has_exactly_the_length_the_server_counts(tokenizer: Tokenizer, length: int) -> None:
    prompts = load(tokenizer, *RANDOM, 25, "--random-input-len", length, "--random-range-ratio", 1)
    assert [prompt.prompt_len for prompt in prompts] == [length] * 25
    assert [len(tokenizer.encode(prompt.prompt)) for prompt in prompts] == [length] * 25


def test_random_text_is_exact_for_a_big_vocabulary_and_longer_than_the_source(qwen3: Tokenizer) -> None:
    prompts = load(qwen3, *RANDOM, 2, "--random-input-len", 70_000, "--random-range-ratio", 1)
    assert [len(qwen3.encode(prompt.prompt)) for prompt in prompts] == [70_000, 70_000]
    prompts = load(qwen3, *RANDOM, 50, "--random-input-len", 60)
    assert [len(qwen3.encode(prompt.prompt)) for prompt in prompts] == [prompt.prompt_len for prompt in prompts]


def test_random_prompts_share_no_prefix_worth_a_page(qwen3: Tokenizer) -> None:
    prompts = load(qwen3, *RANDOM, 200, "--random-input-len", 64, "--random-range-ratio", 1)
    ids = sorted(qwen3.encode(prompt.prompt) for prompt in prompts)
    assert max(shared(a, b) for a, b in pairwise(ids)) < 8


def test_lengths_are_drawn_between_ratio_and_most_and_reach_both_ends(tokenizer: Tokenizer) -> None:
    words = (*RANDOM, 400, "--random-input", 20, "--random-output", 10, "--random-range-ratio", 0.5)
    prompts = load(tokenizer, *words)
    assert {prompt.prompt_len for prompt in prompts} == set(range(10, 21))
    assert {prompt.output_len for prompt in prompts} == set(range(5, 11))


def test_ratio_0_draws_from_the_shortest_text_on(tokenizer: Tokenizer) -> None:
    prompts = load(tokenizer, *RANDOM, 200, "--random-input", 5, "--random-output", 3)
    assert {prompt.prompt_len for prompt in prompts} == {2, 3, 4, 5}  # BOS and a text of a token at least
    assert {prompt.output_len for prompt in prompts} == {1, 2, 3}


def test_the_seed_says_it_all(tokenizer: Tokenizer) -> None:
    for name in ("random", "random-ids", "generated-shared-prefix"):
        words = ("--dataset-name", name, "--num-prompts", 6, "--random-input-len", 30, "--gsp-num-groups", 3)
        words += ("--gsp-prompts-per-group", 2, "--gsp-system-prompt-len", 20, "--gsp-question-len", 10)
        assert load(tokenizer, *words) == load(tokenizer, *words)
        assert load(tokenizer, *words) != load(tokenizer, *words, seed=2)


def test_another_text_can_be_the_source(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one two three four five six seven eight nine ten " * 5)
    prompts = load(tokenizer, *RANDOM, 5, "--dataset-path", path, "--random-input-len", 12, "--random-range-ratio", 1)
    assert len(prompts) == 5
    assert all(str(prompt.prompt) in path.read_text() for prompt in prompts)


def test_a_beginning_longer_than_the_prompt_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BenchmarkError, match="a prompt of 8 tokens cannot be made: what stands around its text has"):
        TextSource(tokenizer, np.random.default_rng(0)).piece(8, "once upon a time there was much more of it")


def test_a_text_too_short_for_other_prompts_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one two three")
    with pytest.raises(
        BenchmarkError, match=r"no other piece of exactly \d+ tokens for this tokenizer; lower --num-prompts"
    ):
        load(tokenizer, *RANDOM, 4, "--dataset-path", path, "--random-input-len", 6)


# --- token ids --------------------------------------------------------------------------------------------------------


def test_random_ids_are_none_of_the_added_tokens(tokenizer: Tokenizer) -> None:
    prompts = load(
        tokenizer, "--dataset-name", "random-ids", "--num-prompts", 40, "--random-input", 200, "--random-range-ratio", 1
    )
    assert {len(prompt.prompt) for prompt in prompts} == {200}
    drawn = {token for prompt in prompts for token in prompt.prompt}
    assert drawn == set(range(3, 512))  # <unk>, <s> and </s> are 0, 1 and 2


def test_ids_of_the_model_are_not_drawn_beyond_the_tokenizer(tokenizer: Tokenizer) -> None:
    words = ("--dataset-name", "random-ids", "--num-prompts", 10, "--random-input", 400, "--random-range-ratio", 1)
    drawn = {token for prompt in load(tokenizer, *words, vocab_size=300) for token in prompt.prompt}
    assert drawn == set(range(3, 300))
    drawn = {token for prompt in load(tokenizer, *words, vocab_size=1000) for token in prompt.prompt}
    assert max(drawn) < 512


# --- shared prefixes --------------------------------------------------------------------------------------------------


def test_a_group_shares_its_system_prompt_and_nothing_else(tokenizer: Tokenizer) -> None:
    words = ("--gsp-num-groups", 3, "--gsp-prompts-per-group", 4, "--gsp-output-len", 7)
    words += ("--gsp-system-prompt-len", 40, "--gsp-question-len", 20)
    prompts = load(tokenizer, "--dataset-name", "generated-shared-prefix", *words)
    assert [(prompt.prompt_len, prompt.output_len) for prompt in prompts] == [(60, 7)] * 12
    ids = [tokenizer.encode(str(prompt.prompt)) for prompt in prompts]
    assert {len(each) for each in ids} == {60}
    groups: dict[tuple[int, ...], int] = {}
    for each in ids:
        groups[tuple(each[:39])] = groups.get(tuple(each[:39]), 0) + 1
    assert sorted(groups.values()) == [4, 4, 4]
    assert max(shared(a, b) for a, b in pairwise(sorted(ids))) < 50
    order = [list(groups).index(tuple(each[:39])) for each in ids]
    assert order != sorted(order), "the groups are mixed"


def test_num_prompts_limits_the_groups(tokenizer: Tokenizer) -> None:
    words = ("--dataset-name", "generated-shared-prefix", "--gsp-num-groups", 2, "--gsp-prompts-per-group", 3)
    words += ("--gsp-system-prompt-len", 20, "--gsp-question-len", 10)
    assert len(load(tokenizer, *words)) == 6
    assert load(tokenizer, *words, "--num-prompts", 4) == load(tokenizer, *words)[:4]


# --- conversations ----------------------------------------------------------------------------------------------------


def turns(*texts: str) -> dict:
    names = ("human", "gpt")
    return {"conversations": [{"from": names[i % 2], "value": text} for i, text in enumerate(texts)]}


def write(path: Path, entries: list) -> Path:
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in entries))
    return path


def sharegpt_file(tmp_path: Path, *entries: object) -> Path:
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(entries))
    return path


def test_sharegpt_takes_the_first_question_and_its_answers_length(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = sharegpt_file(
        tmp_path,
        turns("Once upon a time", "there was a little girl", "and then?", "she slept"),
        {"conversations": [{"from": "gpt", "value": "no question"}]},
        {"conversations": []},
        {
            "conversations": [
                {"from": "system", "value": "x"},
                *turns("Who was there?", "The little cat was")["conversations"],
            ]
        },
    )
    prompts = load(tokenizer, "--dataset-name", "sharegpt", "--dataset-path", path)
    assert sorted((str(p.prompt), p.prompt_len, p.output_len) for p in prompts) == [
        (
            "Once upon a time",
            len(tokenizer.encode("Once upon a time")),
            len(tokenizer.encode("there was a little girl")) - 1,
        ),
        ("Who was there?", len(tokenizer.encode("Who was there?")), len(tokenizer.encode("The little cat was")) - 1),
    ]


def test_sharegpt_leaves_out_what_published_results_leave_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def text(num_tokens: int) -> str:
        return TextSource(tokenizer, np.random.default_rng(0)).piece(num_tokens)

    kept = [(4, 4), (1024, 500), (5, 2043)]
    left_out = [(3, 50), (50, 3), (1025, 4), (1024, 1025)]
    path = sharegpt_file(tmp_path, *(turns(text(n), text(out + 1)) for n, out in kept + left_out))
    words = ("--dataset-name", "sharegpt", "--dataset-path", path)
    found = [(p.prompt_len, p.output_len) for p in load(tokenizer, *words)]
    assert sorted(found) == sorted(kept)
    found = [(p.prompt_len, p.output_len) for p in load(tokenizer, *words, "--sharegpt-context-len", 1029)]
    assert sorted(found) == [(4, 4), (1025, 4)]
    found = [(p.prompt_len, p.output_len) for p in load(tokenizer, *words, "--sharegpt-output-len", 9)]
    assert sorted(found) == [(4, 9), (5, 9), (50, 9), (1024, 9), (1024, 9)]


def test_sharegpt_real_conversations(qwen3: Tokenizer) -> None:
    path = DATASETS / "sharegpt.json"
    words = ("--dataset-name", "sharegpt", "--dataset-path", path)
    prompts = load(qwen3, *words, "--num-prompts", 30)
    assert len(prompts) == 30
    assert prompts == load(qwen3, *words, "--num-prompts", 30)
    assert [p.prompt_len for p in prompts] == [len(qwen3.encode(str(p.prompt))) for p in prompts]
    assert all(p.prompt_len >= 4 and p.output_len >= 4 and p.prompt_len + p.output_len <= 2048 for p in prompts)
    assert prompts != load(qwen3, *words, "--num-prompts", 30, seed=2)


def test_custom_lines_keep_their_order(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = [{"prompt": "Once upon a time", "output_len": 5}, "", {"prompt": [5, 6, 7], "output_len": 6, "id": "x"}]
    path = write(tmp_path / "custom.jsonl", lines)
    words = ("--dataset-name", "custom", "--dataset-path", path)
    prompts = load(tokenizer, *words)
    num_tokens = len(tokenizer.encode("Once upon a time"))
    assert prompts == [Prompt("Once upon a time", num_tokens, 5), Prompt([5, 6, 7], 3, 6)]
    assert load(tokenizer, *words, "--num-prompts", 1) == prompts[:1]
    assert {p.output_len for p in load(tokenizer, *words, "--sharegpt-output-len", 3)} == {3}
    assert load(tokenizer, *words, "--sharegpt-context-len", 9) == prompts[1:]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{oops", "custom.jsonl line 2 is not JSON of prompt, output_len: JSON is malformed"),
        ({"text": "x"}, "custom.jsonl line 2 is not JSON of prompt, output_len: .* missing required field `prompt`"),
        ("[1]", "custom.jsonl line 2 is not JSON of prompt, output_len: Expected `object`, got `array`"),
        ({"prompt": "", "output_len": 1}, "custom.jsonl line 2 is not .*length >= 1 - at `$.prompt`"),
        ({"prompt": [], "output_len": 1}, "custom.jsonl line 2 is not .*length >= 1 - at `$.prompt`"),
        ({"prompt": ["a"]}, "custom.jsonl line 2 is not .*Expected `int`, got `str` - at `$.prompt"),
        ({"prompt": "x", "output_len": 0}, "custom.jsonl line 2 is not .*Expected `int` >= 1 - at `$.output_len`"),
        ({"prompt": "x"}, 'custom.jsonl line 2: no "output_len" says how much to generate; give --sharegpt-output-len'),
    ],
)
def test_a_bad_line_is_named(tokenizer: Tokenizer, tmp_path: Path, line: object, said: str) -> None:
    path = write(tmp_path / "custom.jsonl", [{"prompt": "fine", "output_len": 1}, line])
    with pytest.raises(BenchmarkError, match=said.replace("$", "[$]")):
        load(tokenizer, "--dataset-name", "custom", "--dataset-path", path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no", "x.json is not a list; JSON lines are --dataset-name custom: "),
        ("{}", "x.json is not a list; .*: Expected `array`, got `object`"),
        ('[{"conversations": [{"from": "human", "value": 1}]}]', "entry 0 is not .*got `int`"),
        ("[[]]", "entry 0 is not .*: Expected `object`, got `array`"),
        ("[]", "nothing in it can be sent"),
    ],
)
def test_a_file_that_is_not_sharegpts_is_refused(tokenizer: Tokenizer, tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(BenchmarkError, match=said):
        load(tokenizer, "--dataset-name", "sharegpt", "--dataset-path", path)


# --- traces -----------------------------------------------------------------------------------------------------------


def mooncake_line(timestamp: int, input_length: int, output_length: int, hash_ids: list[int]) -> dict:
    return {"timestamp": timestamp, "input_length": input_length, "output_length": output_length, "hash_ids": hash_ids}


def test_equal_hash_ids_are_equal_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(
        tmp_path / "trace.jsonl",
        [
            mooncake_line(1000, 1100, 5, [46, 47, 48]),
            mooncake_line(4000, 600, 7, [46, 60]),
            mooncake_line(2500, 1536, 6, [46, 47, 49]),
        ],
    )
    prompts = load(tokenizer, "--dataset-name", "mooncake", "--dataset-path", path, "--mooncake-slowdown-factor", 2)
    expected = [(1100, 5, 0.0), (1536, 6, 3.0), (600, 7, 6.0)]
    assert [(p.prompt_len, p.output_len, p.arrival_s) for p in prompts] == expected
    first, second, third = (p.prompt for p in prompts)
    assert [len(first), len(second), len(third)] == [1100, 1536, 600]
    assert (shared(first, second), shared(first, third)) == (1024, 512)
    assert load(tokenizer, "--dataset-name", "mooncake", "--dataset-path", path, seed=2)[0].prompt != first


def test_a_real_trace_has_the_sharing_it_says() -> None:
    words = ("--dataset-name", "mooncake", "--dataset-path", DATASETS / "mooncake" / "conversation_trace.jsonl")
    prompts = load(None, *words, "--num-prompts", 60, vocab_size=50_000)
    with (DATASETS / "mooncake" / "conversation_trace.jsonl").open() as file:
        lines = [json.loads(next(file)) for _ in range(60)]
    lines.sort(key=lambda line: line["timestamp"])
    assert [p.prompt_len for p in prompts] == [line["input_length"] for line in lines]
    assert [p.output_len for p in prompts] == [line["output_length"] for line in lines]
    assert [p.arrival_s for p in prompts] == [line["timestamp"] / 1000 for line in lines]
    by_id: dict[int, list[int]] = {}
    for prompt, line in zip(prompts, lines, strict=True):
        for i, hash_id in enumerate(line["hash_ids"]):
            block = prompt.prompt[512 * i : 512 * (i + 1)]
            known = by_id.setdefault(hash_id, block)
            n = min(len(known), len(block))
            assert known[:n] == block[:n]
    blocks = {tuple(block[:8]) for block in by_id.values()}
    assert len(blocks) == len(by_id), "different ids, different tokens"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({}, "line 1 is not JSON of timestamp, input_length, output_length, hash_ids: .* missing required field"),
        (mooncake_line(0, 513, 1, [1]), "line 1: 513 tokens in blocks of 512, but 1 hash_ids"),
        (mooncake_line(0, 5, 0, [1]), "line 1 is not .*Expected `int` >= 1 - at `[$].output_length`"),
    ],
)
def test_a_bad_line_of_a_trace_is_named(tmp_path: Path, line: dict, said: str) -> None:
    path = write(tmp_path / "trace", [line])
    with pytest.raises(BenchmarkError, match=said):
        load(None, "--dataset-name", "mooncake", "--dataset-path", path, vocab_size=1000)


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--num-prompts", 0), "--num-prompts: '0' is not a whole number from 1 on"),
        (("--random-range-ratio", 1.5), "--random-range-ratio: '1.5' is not a number between 0 and 1"),
        (("--gsp-output-len", 0), "--gsp-output-len: '0' is not a whole number from 1 on"),
        (("--mooncake-slowdown-factor", 0), "--mooncake-slowdown-factor: '0' is not a number above 0"),
        (("--mooncake-slowdown-factor", "inf"), "--mooncake-slowdown-factor: 'inf' is not a number above 0"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(words: tuple, said: str) -> None:
    with pytest.raises(FlagError, match=re.escape(said)):
        flags(*words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--dataset-name", "sharegpt"), "--dataset-name sharegpt needs --dataset-path; nothing is downloaded"),
        (
            ("--dataset-name", "sharegpt", "--dataset-path", "/none"),
            "--dataset-path is /none; it cannot be read: No such file",
        ),
        (("--random-input", 1, "--random-range-ratio", 1), "a prompt of 1 tokens cannot be made: what stands around"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tokenizer: Tokenizer, words: tuple, said: str) -> None:
    with pytest.raises(BenchmarkError, match=said):
        load(tokenizer, *words)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(
        BenchmarkError, match="--dataset-name is random, whose tokens must be counted; give --tokenizer"
    ):
        load(None, vocab_size=1000)


def test_a_data_set_smaller_than_asked_for_is_said(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "custom.jsonl", [{"prompt": "fine", "output_len": 1}])
    assert len(load(tokenizer, "--dataset-name", "custom", "--dataset-path", path, "--num-prompts", 5)) == 1
    assert "--num-prompts is 5; the data set has 1" in caplog.text
