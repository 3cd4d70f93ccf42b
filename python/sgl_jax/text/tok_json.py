"""Reads Grok-2's tokenizer.tok.json: byte-level BPE as tokens with ranks, and special tokens.

Source of the format: github.com/sgl-project/sglang, python/sglang/srt/tokenizer/tiktoken_tokenizer.py.
"""

import json
from pathlib import Path

from sgl_jax.models.model_errors import ModelError
from sgl_jax.text.bpe import QWEN2_WORDS, bpe_of_ranks
from sgl_jax.text.vocabulary import Vocabulary

NAME = "tokenizer.tok.json"
EOS = "<|eos|>"

CHAT_TEMPLATE = """\
{%- set names = {'system': 'System', 'user': 'Human', 'assistant': 'Assistant'} -%}
{%- for message in messages if message.role in names -%}
{%- set text = message.content if message.role == 'assistant' else message.content | trim -%}
{{- names[message.role] + ': ' + text + '<|separator|>\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"""  # where the folder has none of its own

_SPLITS = {"V1": QWEN2_WORDS}  # by the value of the file's field word_split
# Special tokens that are found in texts. Others are spelled with regular tokens there.
_NUMBERED = {f"<|reserved_{i}|>" for i in range(3, 128)} | {f"<|control{i}|>" for i in range(1, 705)}
_ALLOWED = {"<|pad|>", "<|separator|>", EOS} | _NUMBERED


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
    if missing := [byte for byte in range(256) if bytes([byte]) not in regular]:
        raise ModelError(f"the vocabulary has no token for the byte {missing[0]}, which every byte-level one has")
    tokenizer = bpe_of_ranks(regular, special, stored.get("pat_str") or _SPLITS[stored["word_split"]])
    allowed = _ALLOWED | {bytes(spelled).decode() for spelled in stored.get("default_allowed_special", ())}
    tokenizer.add_special_tokens([token for token in map(bytes.decode, special) if token in allowed])
    return Vocabulary(tokenizer, {"eos_token": EOS}, CHAT_TEMPLATE)
