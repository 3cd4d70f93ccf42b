"""Flags about the task of a launch: every spelling, and what cannot be honoured."""

from __future__ import annotations

import pytest

from sgl_jax.settings.flag_parser import FlagError
from sgl_jax.settings.server_args import ServerArgs


def parse(*words: str, **environ: str) -> ServerArgs:
    return ServerArgs.from_cli(["--model-path", "m", *words], environ)


def test_the_task_in_every_spelling() -> None:
    assert (parse().task, parse().is_embedding) == (None, False)
    for task in ("generate", "embed", "classify", "score"):
        assert parse("--task", task).task == parse(SGL_JAX_TASK=task).task == task
    assert parse("--is-embedding").is_embedding
    assert parse("--is-embedding", "--task", "score").task == "score"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task reward", "--task is reward.*write classify"),
        ("--task embedding", "--task is embedding.*write embed"),
        ("--task encode", "--task is encode"),
        ("--is-embedding --task generate", "--is-embedding cannot be had with --task generate"),
        ("--task embed --speculative-algorithm NGRAM", "--speculative-algorithm cannot be had with --task embed"),
        ("--task score --speculative-algorithm NGRAM", "--speculative-algorithm cannot be had with --task score"),
        ("--is-embedding --speculative-algorithm NGRAM", "--speculative-algorithm cannot be had with --is-embedding"),
        (
            '--task embed --speculative-config {"method":"ngram"}',
            "--speculative-config cannot be had with --task embed",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(words: str, message: str) -> None:
    with pytest.raises(FlagError, match=message):
        parse(*words.split())


def test_drafts_are_taken_where_text_is_generated() -> None:
    assert parse("--task", "generate", "--speculative-algorithm", "NGRAM").speculation is not None
