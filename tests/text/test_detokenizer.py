"""Text comes out as soon as it is certain: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sgl_jax.request import SamplingParams
from sgl_jax.text.detokenizer import Detokenizer, StopMatcher
from sgl_jax.text.tokenizer import Tokenizer, load_tokenizer

STORIES = load_tokenizer(str(Path(__file__).parents[1] / "data" / "stories260k"))
PROMPT = STORIES.encode("There was")


def detokenizer_of(prompt: list[int], tokenizer: Tokenizer = STORIES, **options) -> Detokenizer:
    return Detokenizer(tokenizer, prompt, SamplingParams(**options))


def pieces(tokenizer: Tokenizer, tokens: list[int], prompt: list[int] = PROMPT, **options) -> list[str]:
    detokenizer = detokenizer_of(prompt, tokenizer, **options)
    found = []
    for token in tokens:
        text, used = detokenizer.push([token])
        found.append(text)
        if detokenizer.matched is not None:
            assert used == 1
            return found
    return [*found, detokenizer.finish()]


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30))
def test_pieces_add_up_to_the_text(text: str) -> None:
    tokens = STORIES.encode(text, add_special_tokens=False)
    whole = STORIES.decode(PROMPT + tokens)[len(STORIES.decode(PROMPT)) :]
    assert "".join(pieces(STORIES, tokens)) == whole


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 2) | st.integers(259, 511), max_size=40))
@example([0] * 8 + [261])  # many skipped tokens before a word with a leading space
def test_one_by_one_is_as_all_at_once(tokens: list[int]) -> None:
    detokenizer = detokenizer_of(PROMPT)
    text, used = detokenizer.push(tokens)
    assert used == len(tokens)
    assert "".join(pieces(STORIES, tokens)) == text + detokenizer.finish()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 511), max_size=40))
def test_any_bytes_give_valid_text(tokens: list[int]) -> None:
    "".join(pieces(STORIES, tokens)).encode()


def in_batches(tokenizer: Tokenizer, tokens: list[int], size: int) -> str:
    detokenizer = detokenizer_of(PROMPT if tokenizer is STORIES else tokenizer.encode("The"), tokenizer)
    shown = [detokenizer.push(tokens[i : i + size])[0] for i in range(0, len(tokens), size)]
    return "".join(shown) + detokenizer.finish()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 16, 100])
def test_a_batch_of_tokens_may_end_inside_a_character(smollm2: Path, size: int) -> None:
    text = "今日は良い天気ですね。散歩に行きましょう😀👩‍👩‍👧 안녕하세요"
    for tokenizer in (STORIES, load_tokenizer(str(smollm2))):
        found = in_batches(tokenizer, tokenizer.encode(text, add_special_tokens=False), size)
        assert found.removeprefix(" ") == text


def test_text_cut_inside_a_character_is_the_same_streamed_or_not() -> None:
    tokens = STORIES.encode("今日は良い天気", add_special_tokens=False)[:-1]
    whole = in_batches(STORIES, tokens, len(tokens))
    assert whole == in_batches(STORIES, tokens, 1)
    assert whole.startswith(" 今日は良い天")


def test_a_character_of_four_tokens_comes_whole() -> None:
    tokens = STORIES.encode("🤗!", add_special_tokens=False)
    assert pieces(STORIES, tokens) == [" ", "", "", "", "🤗", "!", ""]


def test_an_unfinished_character_is_flushed_at_the_end() -> None:
    tokens = STORIES.encode("a🤗", add_special_tokens=False)[:-2]
    assert "".join(pieces(STORIES, tokens)).rstrip("\ufffd") == " a"


def test_endless_broken_bytes_do_not_hold_the_text_for_ever() -> None:
    broken = STORIES.encode("🤗", add_special_tokens=False)[-1]
    found = pieces(STORIES, [broken] * 40)
    assert any(found[:20])


def test_a_prompt_that_ends_inside_a_character_is_not_repeated() -> None:
    prompt = PROMPT + STORIES.encode("🤗", add_special_tokens=False)[:-1]
    tokens = STORIES.encode("upon a time", add_special_tokens=False)
    assert "".join(pieces(STORIES, tokens, prompt)) == " upon a time"


def test_a_byte_level_prompt_that_ends_inside_a_character_is_not_repeated(smollm2: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2))
    tokens = tokenizer.encode(" and then")
    assert "".join(pieces(tokenizer, tokens, [504, 4911, 8715, 314, 1535, 15107, 114])) == " and then"


@pytest.mark.parametrize("count", [1, 7, 8, 9, 17, 40])
@pytest.mark.parametrize("before", ["", "Once upon"])
def test_stray_bytes_double_nothing(before: str, count: int) -> None:
    broken = STORIES.encode("🤗", add_special_tokens=False)[-1]
    words = STORIES.encode(before, add_special_tokens=False)
    tokens = [*words, *[broken] * count, *STORIES.encode("a time", add_special_tokens=False)]
    found = "".join(pieces(STORIES, tokens))
    assert found == (" Once upon" if before else "") + "\ufffd" * count + " a time"


def test_byte_level_stray_bytes_double_nothing(smollm2: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2))
    words, more = tokenizer.encode(" secret phrase"), tokenizer.encode(" and then")
    for count in (1, 8, 9, 20):
        found = "".join(pieces(tokenizer, [*words, *[114] * count, *more], tokenizer.encode("The")))
        assert found.replace("\ufffd", "") == " secret phrase and then"


def test_special_tokens_are_shown_only_if_wanted() -> None:
    tokens = [403, 2, 407]
    assert "".join(pieces(STORIES, tokens)) == " Once upon"
    assert "".join(pieces(STORIES, tokens, skip_special_tokens=False)) == " Once</s> upon"


@pytest.mark.parametrize("stop", ["on a", "n", " upon", "time", "Once", "upon a time"])
def test_a_stop_string_never_shows_wherever_tokens_end(stop: str) -> None:
    tokens = STORIES.encode("Once upon a time", add_special_tokens=False)
    before = " Once upon a time".partition(stop)[0]
    found = pieces(STORIES, tokens, stop=[stop])
    assert "".join(found) == before
    kept = pieces(STORIES, tokens, stop=[stop], include_stop_str_in_output=True)
    assert "".join(kept) == before + stop


def test_special_tokens_that_a_reader_needs_are_shown_among_hidden_ones() -> None:
    once, upon = (STORIES.encode(word, add_special_tokens=False)[-1] for word in ("Once", "Once upon"))
    detokenizer = Detokenizer(STORIES, PROMPT, SamplingParams(), {2: "</s>"})
    assert [detokenizer.push([token])[0] for token in (once, 1, 2, upon)] == [" Once", "", "</s>", " upon"]


WORDS = [*STORIES.encode("Once upon", add_special_tokens=False), 2, *STORIES.encode("a time", add_special_tokens=False)]


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize(
    ("stop", "before"),
    [
        (["</s>"], " Once upon"),
        (["time", "</s>"], " Once upon"),
        (["upon</s>"], " Once "),
        (["</s> a"], " Once upon"),
        (["on</s> a t"], " Once up"),
        ([" upon</s>", "<s>"], " Once"),
    ],
)
def test_a_stop_string_with_a_special_token_ends_the_text_before_it(stop, before, skip_special_tokens) -> None:
    options = {"stop": stop, "skip_special_tokens": skip_special_tokens}
    assert "".join(pieces(STORIES, WORDS, **options)) == before
    detokenizer = detokenizer_of(PROMPT, **options)
    assert detokenizer.push(WORDS)[0] == before
    assert detokenizer.matched == max(stop, key=lambda text: "</s>" in text)
    assert "".join(pieces(STORIES, WORDS, include_stop_str_in_output=True, **options)) == before + detokenizer.matched


def test_special_tokens_that_no_stop_string_matches_stay_hidden() -> None:
    for stop in (["</s></s>"], ["</s>a"], ["x</s>"], ["</s> never"]):
        assert "".join(pieces(STORIES, WORDS, stop=stop)) == " Once upon a time"
    assert "".join(pieces(STORIES, [403, 2, 2, 407], stop=["</s></s>"])) == " Once"
    held = pieces(STORIES, WORDS, stop=["</s>"], min_tokens=WORDS.index(2) + 1)
    assert "".join(held) == " Once upon a time"


@settings(max_examples=100)
@given(st.lists(st.sampled_from(WORDS), max_size=20), st.sampled_from(["</s>", "</s> ", " a</s>"]))
def test_stop_strings_with_special_tokens_match_alike_shown_or_not(tokens: list[int], stop: str) -> None:
    hidden = "".join(pieces(STORIES, tokens, stop=[stop]))
    shown = "".join(pieces(STORIES, tokens, stop=[stop], skip_special_tokens=False))
    assert hidden.split() == shown.replace("</s>", "").split()


def test_what_looked_like_a_stop_string_comes_out_when_it_is_none() -> None:
    tokens = STORIES.encode("Once upon a time", add_special_tokens=False)
    assert pieces(STORIES, tokens, stop=["Once upon a girl"])[0] == " "
    assert "".join(pieces(STORIES, tokens, stop=["Once upon a girl"])) == " Once upon a time"
    assert "".join(pieces(STORIES, tokens, stop=["time and again"])) == " Once upon a time"


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    tokens = STORIES.encode("upon upon upon", add_special_tokens=False)
    total = len(tokens)
    found = "".join(pieces(STORIES, tokens, stop=["upon"], min_tokens=total - 1))
    assert found == STORIES.decode(PROMPT + tokens[:-1])[len("There was") :] + " "


def test_a_stop_string_that_ends_after_min_tokens_counts() -> None:
    tokens = STORIES.encode("upon a time", add_special_tokens=False)
    assert "".join(pieces(STORIES, tokens, stop=["upon a"], min_tokens=1)) == " "
    first = len(STORIES.encode("upon a", add_special_tokens=False))
    assert "".join(pieces(STORIES, tokens, stop=["upon a", "n"], min_tokens=first)) == " upon a time"


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_the_earliest_match_wins_however_the_text_is_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    matcher = StopMatcher(stops)
    shown, position = "", 0
    while position < len(text) and matcher.matched is None:
        step = data.draw(st.integers(1, 5))
        shown += matcher.push(text[position : position + step])
        position += step
    if matcher.matched is None:
        shown += matcher.flush()
    if not any(stop in text for stop in stops):
        assert shown == text
        assert matcher.matched is None
        return
    assert matcher.matched in stops
    assert not any(stop in shown for stop in stops)
    assert text.startswith(shown + str(matcher.matched))
