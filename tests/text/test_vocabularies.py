"""Tokenizers are built from vocabularies without tokenizer.json: tiktoken, sentencepiece, and those transformers converts.

The expected ids are those of tiktoken and sentencepiece, run on the same vocabularies.
"""

from __future__ import annotations

import base64
import itertools
import json
import struct
import sys
import types
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_jax.models.model_errors import ModelError
from sgl_jax.text.bpe import BYTE_OF_CHAR, merges_of
from sgl_jax.text.byte_ranks import load_tiktoken
from sgl_jax.text.chat_template import ChatTemplate
from sgl_jax.text.sentencepiece_file import load_sentencepiece
from sgl_jax.text.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from sgl_jax.tools.benchmark.datasets.source import bundled_text

USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def qwen1(tokenizers: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The vocabulary of `qwen2.5` as a file of tiktoken."""
    folder = tmp_path_factory.mktemp("qwen1")
    vocab = json.loads((tokenizers / "qwen2.5" / "tokenizer.json").read_text())["model"]["vocab"]
    spelled = sorted(vocab, key=vocab.get)
    write_ranks(folder / "qwen.tiktoken", [bytes(BYTE_OF_CHAR[char] for char in token) for token in spelled])
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def sentencepiece(tokenizers: Path) -> Tokenizer:
    return load_tokenizer(str(tokenizers / "sentencepiece"))


@pytest.fixture(scope="module")
def expected(golden: Path) -> dict:
    return json.loads((golden / "tokenizers.json").read_text())


def test_qwen1_encodes_as_tiktoken(qwen1: Tokenizer, expected: dict) -> None:
    assert [qwen1.encode(text) for text in expected["texts"]] == expected["tiktoken"]["ids"]


def test_a_model_of_sentencepiece_encodes_as_the_library(sentencepiece: Tokenizer, expected: dict) -> None:
    assert [sentencepiece.encode(text) for text in expected["texts"]] == expected["sentencepiece"]["ids"]
    for text, ids in zip(expected["texts"], expected["sentencepiece"]["ids"], strict=True):
        assert sentencepiece.decode(ids) == text


def test_qwen1_is_qwen25_for_text(qwen1: Tokenizer, tokenizers: Path) -> None:
    """Both have one vocabulary; the later one comes as tokenizer.json."""
    later = load_tokenizer(str(tokenizers / "qwen2.5"))
    prose = bundled_text()
    assert qwen1.encode(prose) == later.encode(prose)
    assert qwen1.decode(qwen1.encode(prose)) == prose


def test_qwen1_special_tokens_and_template(qwen1: Tokenizer) -> None:
    assert (qwen1.vocab_size, qwen1.eos_token_id, qwen1.bos_token_id) == (2208, 2000, None)
    text = qwen1.chat_template().render(USER)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert [i for i in qwen1.encode(text) if i > 2000] == [2001, 2002, 2001, 2002, 2001]
    assert qwen1.token_bytes(2207) == b"<|extra_204|>"


def test_sentencepiece_special_tokens(sentencepiece: Tokenizer) -> None:
    assert (sentencepiece.vocab_size, sentencepiece.bos_token_id, sentencepiece.eos_token_id) == (1000, 1, 2)
    ids = sentencepiece.encode("a é")
    assert b"".join(sentencepiece.token_bytes(token) for token in ids) == " a é".encode()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("abc", min_size=2, max_size=5), unique=True, max_size=12), st.text("abc", max_size=12))
def test_merges_join_as_ranks_do(tokens: list[str], text: str) -> None:
    ranks = {token: rank for rank, token in enumerate(["a", "b", "c", *tokens])}
    parts = list(text)
    while True:  # tiktoken's rule
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not pairs:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    model = tokenizers.Tokenizer(tokenizers.models.BPE(ranks, merges_of(ranks)))
    assert model.encode(text).tokens == parts


def write_ranks(path: Path, tokens: list[bytes]) -> Path:
    path.write_bytes(b"\n".join(base64.b64encode(token) + b" %d" % i for i, token in enumerate(tokens)))
    return path


def test_tiktoken_files_that_cannot_be_read(tmp_path: Path) -> None:
    every = [bytes([i]) for i in range(256)]
    assert load_tiktoken(write_ranks(tmp_path / "qwen.tiktoken", every)).backend.encode("é").ids == [0xC3, 0xA9]
    with pytest.raises(ModelError, match=r"other\.tiktoken.* qwen\.tiktoken"):
        load_tiktoken(write_ranks(tmp_path / "other.tiktoken", every))
    with pytest.raises(ModelError, match=r"qwen.tiktoken.* 1 .*256"):
        load_tiktoken(write_ranks(tmp_path / "qwen.tiktoken", every[:-1]))
    (tmp_path / "qwen.tiktoken").write_text("IQ== 0\nnot base64 1\n")
    with pytest.raises(ModelError, match="line 2"):
        load_tiktoken(tmp_path / "qwen.tiktoken")


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return (
            bytes([number << 3 & 127 | 128 * (number > 15)])
            + (bytes([number >> 4]) if number > 15 else b"")
            + bytes([value])
        )
    return bytes([number << 3 | 2, len(value)]) + value


def sentencepiece_model(kind: int, pieces: list[tuple[str, float, int]], prefix: int = 1) -> bytes:
    body = b""
    for text, score, piece_kind in pieces:
        body += field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + field(3, piece_kind))
    return body + field(2, field(3, kind)) + field(3, field(3, prefix) + field(4, 0))


UNIGRAM = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("▁", -2.0, 1), ("a", -3.0, 1), ("b", -3.0, 1)]


def test_unigram_takes_the_likeliest_pieces(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model(1, [*UNIGRAM, ("ab", -4.0, 1), ("▁a", -4.5, 1), ("<x>", 0.0, 4)]))
    found = load_sentencepiece(path)
    assert found.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert found.backend.encode("ab").tokens == ["▁", "ab"]  # -6, not -7.5
    assert found.backend.encode("a ab").tokens == ["▁a", "▁", "ab"]
    assert found.backend.encode("a<x>b").tokens == ["▁a", "<x>", "b"]
    assert found.backend.decode([7, 3, 6]) == "a ab"


def test_sentencepiece_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    for content, message in [
        (b"IQ== 0\n", "tokenizer.model.*sentencepiece"),
        (b"", "tokenizer.model.*pieces"),
        (sentencepiece_model(3, UNIGRAM), "words or characters"),
        (sentencepiece_model(2, [*UNIGRAM, ("ab", -4.0, 1), ("ba", -4.0, 1)]), "equal score"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ModelError, match=message):
            load_sentencepiece(path)
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer(str(tmp_path))


def test_llama_classes_put_bos_before_a_sentencepiece_text(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(1, UNIGRAM))
    assert load_tokenizer(str(tmp_path)).encode("a") == [3, 4]
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert load_tokenizer(str(tmp_path)).encode("a") == [1, 3, 4]


def test_transformers_is_the_last_resort(tmp_path: Path, stories260k: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json.* transformers"):
        load_tokenizer(str(tmp_path))

    class AutoTokenizer:
        @staticmethod
        def from_pretrained(folder: str, trust_remote_code: bool) -> types.SimpleNamespace:
            assert (folder, trust_remote_code) == (str(tmp_path), False)
            return types.SimpleNamespace(
                backend_tokenizer=tokenizers.Tokenizer.from_file(str(stories260k / "tokenizer.json"))
            )

    library = types.ModuleType("transformers")
    library.__dict__["AutoTokenizer"] = AutoTokenizer
    monkeypatch.setitem(sys.modules, "transformers", library)
    assert load_tokenizer(str(tmp_path)).encode("Once", add_special_tokens=False) == [403]


@pytest.mark.parametrize("name", ["chatml", "gemma", "llama-3", "qwen"])
def test_bundled_templates_by_name(stories260k: Path, name: str) -> None:
    begin, end, start = {
        "chatml": ("<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n"),
        "gemma": ("<s><start_of_turn>user\n", "<end_of_turn>\n", "<start_of_turn>model\n"),
        "llama-3": (
            "<s><|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        "qwen": (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
            "<|im_end|>\n",
            "<|im_start|>assistant\n",
        ),
    }[name]
    template: ChatTemplate = load_tokenizer(str(stories260k), chat_template=name).chat_template()
    assert template.render(USER) == f"{begin}Hi{end}{start}"
    assert template.render(USER, add_generation_prompt=False) == f"{begin}Hi{end}"


def test_a_name_that_is_no_template_lists_those_there_are(stories260k: Path) -> None:
    with pytest.raises(TokenizerError, match=r"vicuna.* chatml, gemma, llama-3, qwen$"):
        load_tokenizer(str(stories260k), chat_template="vicuna")
