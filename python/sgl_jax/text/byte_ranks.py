"""Builds byte-level BPE tokenizers from files of tokens with ranks: Qwen's qwen.tiktoken and Grok-2's tokenizer.tok.json.

The first has neither the pattern that cuts text into words nor the special tokens; both are known by the file's name.
Sources: tokenization_qwen.py, which comes with the models; github.com/sgl-project/sglang,
python/sglang/srt/tokenizer/tiktoken_tokenizer.py.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from sgl_jax.models.model_errors import ModelError
from sgl_jax.text.bpe import CHAR_OF_BYTE, QWEN2_WORDS, by_regex, merges_of
from sgl_jax.text.chat_template import bundled_templates
from sgl_jax.text.vocabulary import Vocabulary

TIKTOKEN, TOK_JSON = "qwen.tiktoken", "tokenizer.tok.json"
_QWEN1_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
_EOS = "<|eos|>"  # Grok-2's, as all below
_SPLITS = {"V1": QWEN2_WORDS}  # by the value of the file's field word_split
# Special tokens that are found in texts. Others are spelled with regular tokens there.
_NUMBERED = {f"<|reserved_{i}|>" for i in range(3, 128)} | {f"<|control{i}|>" for i in range(1, 705)}
_ALLOWED = {"<|pad|>", "<|separator|>", _EOS} | _NUMBERED
_TEMPLATE = """\
{%- set names = {'system': 'System', 'user': 'Human', 'assistant': 'Assistant'} -%}
{%- for message in messages if message.role in names -%}
{%- set text = message.content if message.role == 'assistant' else message.content | trim -%}
{{- names[message.role] + ': ' + text + '<|separator|>\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"""  # where the folder has none of its own


def load_tiktoken(path: Path) -> Vocabulary:
    """Build the vocabulary from one line for each token: its bytes in base64, and its rank, which is its id. The ids of
    special tokens follow. Raises ModelError for a file of another name, or with missing or misplaced ranks."""
    if path.name != TIKTOKEN:
        raise ModelError(
            f"{path} is a tiktoken vocabulary, which does not say how it cuts text into words; known is {TIKTOKEN}; "
            "give the model's tokenizer.json with --tokenizer-path"
        )
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ModelError(f"{path}, line {number}: not a token in base64 and its rank") from error
    tokenizer = _of_ranks(ranks, {}, QWEN2_WORDS, path)
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ModelError(f"{path}: the ranks are not 0 to {len(ranks) - 1}; is the file whole?")
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(_QWEN1_SPECIAL)
    return Vocabulary(tokenizer, {"eos_token": "<|endoftext|>"}, bundled_templates()["qwen"])


def load_tok_json(path: Path) -> Vocabulary:
    """Build the vocabulary. Raises ModelError where that is not possible exactly."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored.get("word_split") not in _SPLITS:
        raise ModelError(f"{path} has word_split={stored.get('word_split')!r}; known are {', '.join(_SPLITS)}")
    regular = {bytes(token["bytes"]): int(token["token"]) for token in stored["regular_tokens"]}
    special = {bytes(token["bytes"]): int(token["token"]) for token in stored["special_tokens"]}
    size = stored.get("vocab_size", len(regular) + len(special))
    if len(regular | special) != size or len({*regular.values(), *special.values()}) != size:
        raise ModelError(
            f"{path} has {len(regular)} regular and {len(special)} special tokens, some twice or too few: "
            f"its vocab_size is {size}"
        )
    tokenizer = _of_ranks(regular, special, stored.get("pat_str") or _SPLITS[stored["word_split"]], path)
    allowed = _ALLOWED | {bytes(spelled).decode() for spelled in stored.get("default_allowed_special", ())}
    tokenizer.add_special_tokens([token for token in map(bytes.decode, special) if token in allowed])
    return Vocabulary(tokenizer, {"eos_token": _EOS}, _TEMPLATE)


def _of_ranks(ranks: Mapping[bytes, int], special: Mapping[bytes, int], words: str, path: Path) -> Tokenizer:
    """Return a tokenizer that merges as tiktoken does: first the neighbours that make the token of lowest rank.

    A rank is the token's id, too. The pattern `words` cuts text into words; a word that is a token stays whole.
    `special` tokens have ids but are never made by merging. Raises ModelError unless each byte is a token.
    """
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ModelError(f"{path} has no token for {len(missing)} of the 256 bytes, {missing[0]} among them")
    spelled = {"".join(CHAR_OF_BYTE[byte] for byte in token): i for token, i in {**ranks, **special}.items()}
    of_ranks = {"".join(CHAR_OF_BYTE[byte] for byte in token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(BPE(spelled, merges_of(of_ranks), ignore_merges=True))
    tokenizer.pre_tokenizer = by_regex(words)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
