"""Builds a tokenizer from a tiktoken vocabulary: one line for each token, its bytes in base64 and its rank.

The file has neither the pattern that cuts text into words nor the special tokens; both are known by the file's name.
"""

import base64
import binascii
from pathlib import Path

from tokenizers import normalizers

from sgl_jax.models.model_errors import ModelError
from sgl_jax.text.bpe import QWEN2_WORDS, bpe_of_ranks
from sgl_jax.text.chat_template import bundled_templates
from sgl_jax.text.vocabulary import Vocabulary

_QWEN1 = "qwen.tiktoken"
# tokenization_qwen.py, which comes with the models. Their ids follow those of the file.
_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]


def load_tiktoken(path: Path) -> Vocabulary:
    """Build the vocabulary. Raises ModelError for a file of another name, or with missing or misplaced ranks."""
    if path.name != _QWEN1:
        raise ModelError(
            f"{path} is a tiktoken vocabulary, which does not say how it cuts text into words; known is {_QWEN1}; "
            "give the model's tokenizer.json with --tokenizer-path"
        )
    tokenizer = bpe_of_ranks(_read(path), {}, QWEN2_WORDS)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(_SPECIAL_TOKENS)
    return Vocabulary(tokenizer, {"eos_token": "<|endoftext|>"}, bundled_templates()["qwen"])


def _read(path: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ModelError(f"{path}, line {number}: not a token in base64 and its rank") from error
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ModelError(f"{path} has no token for {len(missing)} of the 256 bytes, {missing[0]} among them")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ModelError(f"{path}: the ranks are not 0 to {len(ranks) - 1}; is the file whole?")
    return ranks
