"""Rebuilds a tokenizer from a GGUF file's metadata.

A GGUF names its pre-tokenizer instead of spelling it out; the definitions here are those of the models' own
tokenizer.json files. Pre-tokenizers we cannot rebuild exactly are refused. llama.cpp's `llama-vocab.cpp` is the source
for the flags' defaults.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from sgl_jax.models.errors import ModelError
from sgl_jax.models.gguf_file import GgufFile, read_gguf

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # tokenizer.ggml.token_type

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + _WORDS + r"|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + _WORDS + r"|\p{N}" + _REST
_LLAMA_CPP_DEFAULT = (  # one split after the other
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)


@dataclasses.dataclass(frozen=True)
class GgufTokenizer:
    """The tokenizer adds bos (and eos, where the file asks for it) by itself when special tokens are to be added."""

    tokenizer: Tokenizer
    bos_token: str | None
    eos_token: str | None
    add_bos: bool
    chat_template: str | None


@dataclasses.dataclass(frozen=True)
class _Pre:
    """How text is cut into words before merging."""

    split: Callable[[], pre_tokenizers.PreTokenizer]
    normalizer: Callable[[], Any] | None = None
    ignore_merges: bool = False  # a word that is a token stays whole, whatever the merges say
    add_bos: bool = False  # where the file does not say


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _by_regex(*patterns: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return lambda: pre_tokenizers.Sequence([*splits, to_bytes])


_PRE = {
    "gpt-2": _Pre(_gpt2),
    "smollm": _Pre(_digits_then_gpt2),
    "qwen2": _Pre(_by_regex(_QWEN2), normalizer=normalizers.NFC),
    "default": _Pre(_by_regex(*_LLAMA_CPP_DEFAULT)),
    "llama-bpe": _Pre(_by_regex(_LLAMA3), ignore_merges=True, add_bos=True),
}
_PRE["llama3"] = _PRE["llama-v3"] = _PRE["llama-bpe"]


def load_gguf_tokenizer(path: str | Path) -> GgufTokenizer:
    file = read_gguf(path)
    model = file.get("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer, default_bos = _byte_level(file)
    elif model == "llama":
        tokenizer, default_bos = _sentencepiece(file), True
    else:
        raise ModelError(
            f"{file.path} has a tokenizer of kind {model!r}; gpt2 (byte-level BPE) and llama (sentencepiece BPE) can be "
            "rebuilt from a GGUF; give the model's own tokenizer.json with --tokenizer-path"
        )
    _add_special_tokens(tokenizer, file)
    bos, eos = _token(file, "bos"), _token(file, "eos")
    add_bos = bool(file.get("tokenizer.ggml.add_bos_token", default_bos)) and bos is not None
    add_eos = bool(file.get("tokenizer.ggml.add_eos_token", False)) and eos is not None
    _frame(tokenizer, bos if add_bos else None, eos if add_eos else None)
    return GgufTokenizer(tokenizer, bos, eos, add_bos, file.get("tokenizer.chat_template"))


def _byte_level(file: GgufFile) -> tuple[Tokenizer, bool]:
    name = file.get("tokenizer.ggml.pre")
    pre = _PRE.get(name)
    if pre is None:
        raise ModelError(
            f"{file.path} {'names no pre-tokenizer' if name is None else f'uses the pre-tokenizer {name!r}'}; those that can be rebuilt are {', '.join(_PRE)}; "
            "give the model's own tokenizer.json with --tokenizer-path"
        )
    merges = [_pair(merge, file) for merge in _needed(file, "merges")]
    tokenizer = Tokenizer(BPE(_vocabulary(file), merges, fuse_unk=False, ignore_merges=pre.ignore_merges))
    if pre.normalizer is not None:
        tokenizer.normalizer = pre.normalizer()
    tokenizer.pre_tokenizer = pre.split()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _sentencepiece(file: GgufFile) -> Tokenizer:
    """Sentencepiece merges the adjacent pair whose joined token scores best; ranking all pairs by that score says the
    same as a merge list, as long as no two scores are equal."""
    vocabulary, kinds, scores = _vocabulary(file), _kinds(file), _needed(file, "scores")
    if odd := [t for t, i in vocabulary.items() if kinds[i] == _USER_DEFINED and "▁" in t]:
        raise ModelError(
            f"{file.path} has user-defined tokens with spaces ({odd[0]!r}), which cannot be matched exactly; "
            "give the model's own tokenizer.json with --tokenizer-path"
        )
    joined = [(scores[i], t) for t, i in vocabulary.items() if kinds[i] == _NORMAL and len(t) > 1]
    twice = [score for score, count in Counter(score for score, _ in joined).items() if count > 1]
    if twice:
        raise ModelError(
            f"{file.path} has sentencepiece tokens of equal score ({twice[0]}), so the order of merges is not known; "
            "give the model's own tokenizer.json with --tokenizer-path"
        )
    merges = []
    for _, token in sorted(joined, reverse=True):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        halves = [(a, b) for a, b in halves if a in vocabulary and b in vocabulary]
        merges += sorted(halves, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    unk = file.get("tokenizer.ggml.unknown_token_id", 0)
    unk_token = _needed(file, "tokens")[unk]
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    to_text: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        to_text.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = replace
    tokenizer.decoder = decoders.Sequence(to_text)
    return tokenizer


def _vocabulary(file: GgufFile) -> dict[str, int]:
    """Token -> id, without the fillers that only round the table up."""
    tokens, kinds = _needed(file, "tokens"), _kinds(file)
    return {token: i for i, token in enumerate(tokens) if kinds[i] != _UNUSED}


def _kinds(file: GgufFile) -> list[int]:
    return file.get("tokenizer.ggml.token_type") or [_NORMAL] * len(_needed(file, "tokens"))


def _add_special_tokens(tokenizer: Tokenizer, file: GgufFile) -> None:
    tokens, kinds = _needed(file, "tokens"), _kinds(file)
    added = [
        AddedToken(tokens[i], special=kind in (_CONTROL, _UNKNOWN), normalized=False)
        for i, kind in enumerate(kinds)
        if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)


def _frame(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Puts bos before a text and eos after it."""
    if bos is None and eos is None:
        return
    template = " ".join(part for part in (bos and f"{bos}:0", "$A:0", eos and f"{eos}:0") if part)
    ids = [(token, tokenizer.token_to_id(token)) for token in {bos, eos} if token is not None]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)


def _token(file: GgufFile, name: str) -> str | None:
    token_id = file.get(f"tokenizer.ggml.{name}_token_id")
    return None if token_id is None else _needed(file, "tokens")[token_id]


def _pair(merge: str, file: GgufFile) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise ModelError(f"{file.path} has the merge {merge!r}, which is not two tokens; give --tokenizer-path")
    return left, right


def _needed(file: GgufFile, name: str) -> list[Any]:
    values = file.get(f"tokenizer.ggml.{name}")
    if not values:
        raise ModelError(f"{file.path} has no tokenizer.ggml.{name}; give the tokenizer with --tokenizer-path")
    return values
