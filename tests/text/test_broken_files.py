"""Damaged files of a tokenizer are refused with an error that names the file, and the field where one is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from messages import says
from sgl_jax.text.tokenizer import TokenizerError, load_tokenizer

DATA = Path(__file__).parents[1] / "data"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
PLAIN = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "added_tokens.json": "{}",
}
FILES = (
    "tokenizer.json",
    "tokenizer.tok.json",
    "qwen.tiktoken",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def folder_with(tmp_path: Path, name: str) -> Path:
    """A folder whose tokenizer reads the file of that name."""
    shutil.rmtree(tmp_path, ignore_errors=True)
    tmp_path.mkdir()
    if name not in ("tokenizer.tok.json", "qwen.tiktoken", "tokenizer.model"):
        shutil.copy(DATA / "stories260k" / "tokenizer.json", tmp_path)
    if name == "tokenizer.model":
        shutil.copy(DATA / "tokenizers" / "sentencepiece" / name, tmp_path)
    return tmp_path / name


@pytest.mark.parametrize("name", FILES)
def test_a_git_lfs_pointer_is_called_one(tmp_path: Path, name: str) -> None:
    path = folder_with(tmp_path / "x", name)
    path.write_bytes(POINTER)
    with pytest.raises(TokenizerError) as refused:
        load_tokenizer(str(path.parent))
    assert says(str(refused.value), f"{path} … Git LFS pointer … git lfs pull")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff\xfe{}", b"[" * 100_000, b'{"a": "\x00"}'])
@pytest.mark.parametrize("name", FILES[:-1])
def test_content_that_is_none_is_refused_by_the_files_name(tmp_path: Path, name: str, content: bytes) -> None:
    path = folder_with(tmp_path / "x", name)
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=name):
        load_tokenizer(str(path.parent))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("tokenizer_config.json", "eos_token", ["</s>"]),
        ("tokenizer_config.json", "bos_token", {"lstrip": True}),
        ("tokenizer_config.json", "added_tokens_decoder", [1]),
        ("tokenizer_config.json", "added_tokens_decoder", {"1": 7}),
        ("tokenizer_config.json", "additional_special_tokens", "<a>"),
        ("tokenizer_config.json", "extra_special_tokens", 3),
        ("tokenizer_config.json", "add_bos_token", "yes"),
        ("tokenizer_config.json", "chat_template", 5),
        ("tokenizer_config.json", "chat_template", {"default": 5}),
        ("special_tokens_map.json", "pad_token", 0),
        ("chat_template.json", "chat_template", True),
    ],
)
def test_a_field_of_another_kind_is_named_with_its_value(tmp_path: Path, name: str, field: str, value: object) -> None:
    path = folder_with(tmp_path / "x", name)
    path.write_text(json.dumps({field: value}))
    with pytest.raises(TokenizerError) as refused:
        load_tokenizer(str(path.parent))
    shown = value["1"] if field == "added_tokens_decoder" and isinstance(value, dict) else value
    shown = 5 if value == {"default": 5} else shown
    assert says(str(refused.value), f"{path} … {field} … {shown!r} … must be")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in list(inner)[:6]:
        yield from places(each, (*path, key))


def refusal(path: Path, text: str) -> str:
    """The error of loading the file and encoding a text, or else its name."""
    try:
        load_tokenizer(str(path.parent)).encode(text)
    except TokenizerError as error:
        return str(error)
    return path.name


CONFIG = json.loads((DATA / "stories260k" / "tokenizer_config.json").read_text()) | {
    "additional_special_tokens": ["<a>", {"content": "<b>", "lstrip": True}],
    "chat_template": [{"name": "default", "template": "x"}, {"name": "rag", "template": "y"}],
}
VOCABULARY = json.loads((DATA / "stories260k" / "tokenizer.json").read_text())
ODD = st.sampled_from([None, True, -1, 2**70, 1.5, "", "x", "\ud800", [], {}, [None], {"content": 1}, {"type": "BPE"}])


@settings(max_examples=100)
@given(st.data())
def test_values_that_fuzz_changed_load_or_are_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    name, content = data.draw(st.sampled_from([("tokenizer_config.json", CONFIG), ("tokenizer.json", VOCABULARY)]))
    changed = json.loads(json.dumps(content))
    *outer, last = data.draw(st.sampled_from(list(places(content))))
    inner = changed
    for key in outer:
        inner = inner[key]
    inner[last] = data.draw(ODD)
    path = folder_with(tmp_path_factory.mktemp("fuzz") / "x", name)
    path.write_text(json.dumps(changed))
    assert name in refusal(path, "Once <a> upon")


@settings(max_examples=100)
@given(st.sampled_from(["tokenizer.model", "qwen.tiktoken", "tokenizer.json"]), st.data())
def test_bytes_that_fuzz_changed_load_or_are_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    path = folder_with(tmp_path_factory.mktemp("fuzz") / "x", name)
    whole = bytearray(path.read_bytes()) if path.exists() else bytearray(b"IQ== 0\nIg== 1\n")
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, min(len(whole) - 1, 20_000)))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.sampled_from([None, len(whole) // 2, 10]))])
    assert name in refusal(path, "the king")
