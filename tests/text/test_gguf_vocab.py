"""Tokenizers rebuilt from GGUF metadata cut text as the models' own tokenizers do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer

from sgl_jax.models.model_errors import ModelError
from sgl_jax.text.gguf_vocab import load_gguf_tokenizer
from sgl_jax.text.tokenizer import TokenizerError, load_tokenizer

ODD_TEXT = [
    "",
    "The year 2024 had 366 days, 8,784 hours.",
    "  two spaces,\ttabs\t\t and \n\n newlines \r\n end  ",
    "🙂👩‍👩‍👧‍👦 «Größe» 你好 ٣٤ नमस्ते",
    "e\u0301 is not \u00e9; zero\u200bwidth; \x00 control",
    "don't we'll I'VE 'tis",
    "x=1;y+=2**3 // $foo->bar() ``` {} [] <tag/>",
    "                    twenty spaces",
]


def write_vocab(path: Path, metadata: dict) -> Path:
    writer = GGUFWriter(path, "llama")
    for key, value in metadata.items():
        key = f"tokenizer.{key}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_of(tokenizer_json: Path, path: Path, **metadata) -> Path:
    """Write the vocabulary as llama.cpp's converter would."""
    spec = json.loads(tokenizer_json.read_text())
    tokens = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    merges = [" ".join(pair) for pair in spec["model"]["merges"]]
    kinds = [1] * len(tokens)
    for added in spec["added_tokens"]:
        tokens.append(added["content"])
        kinds.append(3 if added["special"] else 4)
    tokens.append("[PAD9]")
    kinds.append(5)
    return write_vocab(
        path, {"ggml.model": "gpt2", "ggml.tokens": tokens, "ggml.token_type": kinds, "ggml.merges": merges, **metadata}
    )


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_qwen2_pre_tokenizer_equals_the_published_tokenizer(tokenizers, tmp_path, name):
    source = tokenizers / name / "tokenizer.json"
    rebuilt = load_gguf_tokenizer(
        gguf_of(source, tmp_path / "v.gguf", **{"ggml.pre": "qwen2", "ggml.eos_token_id": 2000})
    )
    published = Tokenizer.from_file(str(source))
    for text in [*ODD_TEXT, "<|im_start|>user\nhi 12<|im_end|><tool_call>x</tool_call>"]:
        ids = rebuilt.backend.encode(text).ids
        assert ids == published.encode(text).ids, text
        for skip in (True, False):
            assert rebuilt.backend.decode(ids, skip_special_tokens=skip) == published.decode(
                ids, skip_special_tokens=skip
            )
    assert rebuilt.special_tokens == {"eos_token": "<|endoftext|>"}
    assert rebuilt.backend.token_to_id("[PAD9]") is None


def byte_tokens() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("smollm", "ab 123 c", ["ab", "Ġ", "1", "2", "3", "Ġc"]),
        ("gpt-2", "ab 123 c's", ["ab", "Ġ123", "Ġc", "'s"]),
        ("llama-bpe", "ab 12345 c'S\n\nx", ["ab", "Ġ", "123", "45", "Ġc", "'S", "ĊĊ", "x"]),
        ("qwen2", "ab 123 (c\n", ["ab", "Ġ", "1", "2", "3", "Ġ(", "c", "Ċ"]),
        ("default", "ab 12345, c", ["ab", "Ġ", "123", "45", ",", "Ġc"]),
    ],
)
def test_pre_tokenizers(tmp_path, pre, text, words):
    vocabulary = {"ggml.model": "gpt2", "ggml.tokens": byte_tokens(), "ggml.merges": ["a b"], "ggml.pre": pre}
    vocabulary["ggml.tokens"] = [*byte_tokens(), "ab"]
    tokenizer = load_gguf_tokenizer(write_vocab(tmp_path / "v.gguf", vocabulary)).backend
    assert [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == words
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_bos_and_eos_frame_the_text_when_the_file_says_so(tmp_path):
    tokens = [*byte_tokens(), "<s>", "</s>"]
    base = {
        "ggml.model": "gpt2",
        "ggml.tokens": tokens,
        "ggml.token_type": [1] * 256 + [3, 3],
        "ggml.merges": ["a b"],
        "ggml.bos_token_id": 256,
        "ggml.eos_token_id": 257,
        "chat_template": "{{ messages }}",
    }
    base["ggml.tokens"] = [*tokens, "ab"]
    base["ggml.token_type"] = [*base["ggml.token_type"], 1]

    def framed(**flags) -> list[int]:
        found = load_gguf_tokenizer(write_vocab(tmp_path / "v.gguf", base | flags))
        assert found.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
        assert found.chat_template == "{{ messages }}"
        assert found.backend.encode("ab", add_special_tokens=False).ids == [258]
        return found.backend.encode("ab").ids

    assert framed(**{"ggml.pre": "gpt-2"}) == [258]
    assert framed(**{"ggml.pre": "llama-bpe"}) == [256, 258]  # the default of Llama 3
    assert framed(**{"ggml.pre": "llama-bpe", "ggml.add_bos_token": False}) == [258]
    both = {"ggml.pre": "gpt-2", "ggml.add_bos_token": True, "ggml.add_eos_token": True}
    assert framed(**both) == [256, 258, 257]


@pytest.mark.parametrize(
    ("more", "ids", "ends"),
    [
        (["<|im_end|>", "<|endoftext|>", "<x>"], {"eos": 257}, [257, 256]),
        (["<|end|>", "<|return|>", "<|call|>"], {"eos": 257}, [257, 258]),  # harmony: <|end|> ends a part of an answer
        (["<a>", "<b>", "<c>"], {"eos": 256, "eot": 257, "eom": 258}, [256, 257, 258]),
        (["<a>", "<end_of_turn>", "<c>"], {}, [257]),
    ],
)
def test_tokens_that_end_an_answer_are_those_of_llama_cpp(tmp_path, more, ids, ends):
    vocabulary = {"ggml.model": "gpt2", "ggml.tokens": [*byte_tokens(), *more], "ggml.merges": ["a b"]}
    vocabulary["ggml.tokens"].append("ab")
    vocabulary |= {f"ggml.{name}_token_id": i for name, i in ids.items()} | {"ggml.pre": "gpt-2"}
    tokenizer = load_tokenizer(str(write_vocab(tmp_path / "v.gguf", vocabulary)))
    assert sorted(tokenizer.end_ids) == sorted(ends)
    named = [token for token in tokenizer.end_ids if more[token - 256].startswith("<|") or "end" in more[token - 256]]
    assert all(tokenizer.encode(more[token - 256]) == [token] for token in named)


def test_an_id_beyond_the_vocabulary_is_refused_with_its_name(tmp_path):
    vocabulary = {"ggml.model": "gpt2", "ggml.tokens": byte_tokens(), "ggml.merges": ["a b"], "ggml.eos_token_id": 999}
    path = write_vocab(tmp_path / "v.gguf", vocabulary | {"ggml.pre": "gpt-2", "ggml.tokens": [*byte_tokens(), "ab"]})
    with pytest.raises(TokenizerError, match=r"v\.gguf.*eos_token_id 999.* 257"):
        load_tokenizer(str(path))


def test_sentencepiece_merges_come_from_the_scores(stories260k, tmp_path):
    spec = json.loads((stories260k / "tokenizer.json").read_text())
    tokens = [token for token, _ in sorted(spec["model"]["vocab"].items(), key=lambda item: item[1])]
    ranks = {}
    for rank, pair in enumerate(spec["model"]["merges"]):
        ranks.setdefault("".join(pair if isinstance(pair, list) else pair.split(" ")), rank)
    kinds = [2, 3, 3] + [6 if re.fullmatch(r"<0x..>", token) else 1 for token in tokens[3:]]
    scores = np.array([-float(ranks.get(token, 1e6)) for token in tokens])
    metadata = {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.token_type": kinds,
        "ggml.scores": scores.tolist(),
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
    }
    rebuilt = load_gguf_tokenizer(write_vocab(tmp_path / "v.gguf", metadata))
    published = Tokenizer.from_file(str(stories260k / "tokenizer.json"))
    assert rebuilt.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    for text in [*ODD_TEXT, "Once upon a time, there was a big dog who", "</s> after"]:
        ids = rebuilt.backend.encode(text).ids
        assert ids == published.encode(text).ids, text
        assert rebuilt.backend.decode(ids) == published.decode(ids)

    merged = [i for i, token in enumerate(tokens) if token in ranks]
    tied = scores.copy()
    tied[merged[0]] = tied[merged[1]]
    with pytest.raises(ModelError, match="equal score"):
        load_gguf_tokenizer(write_vocab(tmp_path / "tied.gguf", metadata | {"ggml.scores": tied.tolist()}))


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"ggml.model": "gpt2", "ggml.tokens": ["a"], "ggml.pre": "tekken"}, "'tekken'.* smollm"),
        ({"ggml.model": "gpt2", "ggml.tokens": ["a"]}, "pre-tokenizer"),
        ({"ggml.model": "t5", "ggml.tokens": ["a"]}, "'t5'"),
        ({"ggml.model": "gpt2", "ggml.pre": "gpt-2"}, "tokenizer.ggml.merges"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused(tmp_path, metadata, said):
    with pytest.raises(ModelError, match=said):
        load_gguf_tokenizer(write_vocab(tmp_path / "v.gguf", metadata))


def test_smollm2_gives_the_golden_prompt_ids(smollm2, golden):
    found = load_gguf_tokenizer(smollm2)
    assert found.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert "<|im_start|>assistant" in (found.chat_template or "")
    stored = json.loads((golden / "smollm2-135m-instruct.json").read_text())
    for case in stored["cases"]:
        ids = found.backend.encode(case["prompt"]).ids
        assert ids == case["prompt_ids"], case["name"]
        assert found.backend.decode(ids, skip_special_tokens=False) == case["prompt"]


def test_smollm2_round_trips_odd_text(smollm2):
    tokenizer = load_gguf_tokenizer(smollm2).backend
    for text in ODD_TEXT:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode("a 2024").ids] == ["a", "Ġ", "2", "0", "2", "4"]
