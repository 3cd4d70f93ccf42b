"""Rebuilds a tokenizer from a GGUF file's metadata.

A GGUF names its pre-tokenizer instead of spelling it out; the definitions here are those of the models' own
tokenizer.json files. Pre-tokenizers we cannot rebuild exactly are refused. llama.cpp's `llama-vocab.cpp` is the source
for the flags' defaults.
"""

import dataclasses
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from sgl_jax.models.gguf_file import GgufFile, read_gguf
from sgl_jax.models.model_errors import ModelError
from sgl_jax.text.bpe import LLAMA3_WORDS, QWEN2_WORDS, by_regex
from sgl_jax.text.sentencepiece_bpe import Kind, Pieces, decode_spaces, sentencepiece_bpe
from sgl_jax.text.vocabulary import Vocabulary, present

_INSTEAD = "give the model's own tokenizer.json with --tokenizer-path"
_LLAMA_CPP_DEFAULT = (  # each splits what the one before left
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)

# Tokens that llama.cpp lets end an answer wherever a vocabulary has them, since many files name one of several as eos.
_ENDS = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
]


@dataclasses.dataclass(frozen=True)
class _Pre:
    """Way to cut text into words before merging."""

    split: pre_tokenizers.PreTokenizer
    normalizer: normalizers.Normalizer | None = None
    ignore_merges: bool = False  # a word that is a token stays whole, whatever the merges say
    add_bos: bool = False  # where the file does not say


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_LLAMA3 = _Pre(by_regex(LLAMA3_WORDS), ignore_merges=True, add_bos=True)
_PRE = {
    "gpt-2": _Pre(_GPT2),
    "smollm": _Pre(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2])),
    "qwen2": _Pre(by_regex(QWEN2_WORDS), normalizer=normalizers.NFC()),
    "default": _Pre(by_regex(*_LLAMA_CPP_DEFAULT)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}


def load_gguf_tokenizer(path: str | Path) -> Vocabulary:
    """Rebuild a GGUF file's tokenizer. Raises ModelError where that is not possible exactly."""
    file = read_gguf(path)
    model = file.get("tokenizer.ggml.model", str)
    if model == "gpt2":
        tokenizer, default_bos = _byte_level(file)
    elif model == "llama":
        tokenizer, default_bos = _sentencepiece(file), True
    else:
        raise ModelError(
            f"{file.path} has a tokenizer of kind {model!r}; gpt2 (byte-level BPE) and llama (sentencepiece BPE) can be "
            f"rebuilt from a GGUF; {_INSTEAD}"
        )
    _add_special_tokens(tokenizer, file)
    bos, eos = _token(file, "bos"), _token(file, "eos")
    wants_bos = file.get("tokenizer.ggml.add_bos_token", int)
    add_bos = default_bos if wants_bos is None else bool(wants_bos)
    add_eos = bool(file.get("tokenizer.ggml.add_eos_token", int))
    _frame(tokenizer, bos if add_bos else None, eos if add_eos else None)
    named, template = present(bos_token=bos, eos_token=eos), file.get("tokenizer.chat_template", str)
    return Vocabulary(tokenizer, named, template, ends=_ends(tokenizer, file))


def _ends(tokenizer: Tokenizer, file: GgufFile) -> tuple[str, ...]:
    """Return the tokens that end an answer, beside eos. In harmony's format <|end|> ends a part of one only."""
    found = {token for token in _ENDS if tokenizer.token_to_id(token) is not None}
    if {"<|return|>", "<|call|>"} <= found:
        found.discard("<|end|>")
    return tuple(sorted(found | set(present(eot=_token(file, "eot"), eom=_token(file, "eom")).values())))


def _byte_level(file: GgufFile) -> tuple[Tokenizer, bool]:
    name = file.get("tokenizer.ggml.pre", str)
    if (pre := _PRE.get(name or "")) is None:
        used = "names no pre-tokenizer" if name is None else f"uses the pre-tokenizer {name!r}"
        raise ModelError(f"{file.path} {used}; those that can be rebuilt are {', '.join(_PRE)}; {_INSTEAD}")
    merges = [_pair(merge, file) for merge in _needed(file, "merges")]
    tokens, kinds = _needed(file, "tokens"), _kinds(file)
    vocabulary = {token: i for i, token in enumerate(tokens) if kinds[i] != Kind.UNUSED}  # UNUSED: fillers
    tokenizer = Tokenizer(BPE(vocabulary, merges, fuse_unk=False, ignore_merges=pre.ignore_merges))
    if pre.normalizer is not None:
        tokenizer.normalizer = pre.normalizer
    tokenizer.pre_tokenizer = pre.split
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _sentencepiece(file: GgufFile) -> Tokenizer:
    texts, kinds, unk = _needed(file, "tokens"), _kinds(file), file.get("tokenizer.ggml.unknown_token_id", int) or 0
    if odd := [text for text, kind in zip(texts, kinds, strict=True) if kind == Kind.USER_DEFINED and "▁" in text]:
        why = "which cannot be matched exactly"
        raise ModelError(f"{file.path} has user-defined tokens with spaces ({odd[0]!r}), {why}; {_INSTEAD}")
    pieces = Pieces(texts, kinds, _needed(file, "scores"), texts[unk], byte_fallback=True)
    tokenizer = sentencepiece_bpe(pieces, str(file.path))
    prefix = file.get("tokenizer.ggml.add_space_prefix", int) != 0
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    decode_spaces(tokenizer, prefix=prefix)
    return tokenizer


def _kinds(file: GgufFile) -> list[int]:
    return file.get("tokenizer.ggml.token_type", list) or [Kind.NORMAL] * len(_needed(file, "tokens"))


def _add_special_tokens(tokenizer: Tokenizer, file: GgufFile) -> None:
    marks = (Kind.CONTROL, Kind.UNKNOWN)
    kinds = zip(_needed(file, "tokens"), _kinds(file), strict=False)
    specials = ((token, kind in marks or token in _ENDS, kind) for token, kind in kinds)
    added = [(token, special) for token, special, kind in specials if special or kind == Kind.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in added])


def _frame(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Put bos before a text and eos after it, where they are not None."""
    if bos is None and eos is None:
        return
    template = " ".join(part for part in (bos and f"{bos}:0", "$A:0", eos and f"{eos}:0") if part)
    ids = [(token, tokenizer.token_to_id(token)) for token in {bos, eos} if token is not None]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)


def _token(file: GgufFile, name: str) -> str | None:
    token_id = file.get(f"tokenizer.ggml.{name}_token_id", int)
    tokens = _needed(file, "tokens")
    if token_id is not None and not 0 <= token_id < len(tokens):
        raise ModelError(f"{file.path} has tokenizer.ggml.{name}_token_id {token_id}; it has {len(tokens)} tokens")
    return None if token_id is None else tokens[token_id]


def _pair(merge: str, file: GgufFile) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise ModelError(f"{file.path} has the merge {merge!r}, which is not two tokens; give --tokenizer-path")
    return left, right


def _needed(file: GgufFile, name: str) -> list[Any]:
    if not (values := file.get(f"tokenizer.ggml.{name}", list)):
        raise ModelError(f"{file.path} has no tokenizer.ggml.{name}; give the tokenizer with --tokenizer-path")
    return values
