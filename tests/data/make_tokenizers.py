"""Make tests/data/tokenizers and golden/tokenizers.json: small vocabularies, and the ids that their own libraries give.

It needs packages that the project does not, in an environment of their own, and the published files of two tokenizers;
README.md beside this file has the command.
"""

import argparse
import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import sentencepiece
import tiktoken
from tokenizers.pre_tokenizers import ByteLevel

DATA = Path(__file__).parent
TOKENIZERS = DATA / "tokenizers"
BOOK = DATA.parents[1] / "python" / "sgl_jax" / "tools" / "benchmark" / "data" / "war_and_peace.txt"
SIZE = 2000  # tokens that are kept of a published vocabulary
PIECES = 1000  # in the sentencepiece model, which is trained here
TEXTS = (
    "Hello world, don't DON'T 12345",
    "Grüße, 世界! 🤗\n\tdone  ",
    "  two  spaces \n\n x\u3000½ ﬁ",
    "def f(x):\n    return x ** 2\n",
    "e\u0301 <|im_start|>",
    'CHAPTER I\n\n"Well, Prince, so Genoa and Lucca are now just family estates of the Buonapartes."',
)


def cut(published: Path, folder: Path) -> dict[str, Any]:
    """Keep the first tokens of a byte-level tokenizer.json and the merges that make them; the added tokens follow."""
    spec = json.loads((published / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = {token: i for token, i in spec["model"]["vocab"].items() if i < SIZE}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in spec["model"]["merges"]]
    spec["model"]["vocab"] = vocab
    spec["model"]["merges"] = [pair for pair in pairs if "".join(pair) in vocab and set(pair) <= set(vocab)]
    for i, added in enumerate(spec["added_tokens"]):
        added["id"] = SIZE + i
    config = json.loads((published / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["added_tokens_decoder"] = {
        str(SIZE + i): added for i, added in enumerate(config["added_tokens_decoder"].values())
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return spec


def tiktoken_ids(spec: dict[str, Any]) -> list[list[int]]:
    """The ids of the same vocabulary as Qwen 1 reads it: text in NFC, pieces joined by rank."""
    byte_of = {char: byte for byte, char in zip(*byte_alphabet(), strict=True)}
    ranks = {bytes(byte_of[char] for char in token): rank for token, rank in spec["model"]["vocab"].items()}
    split = spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    special = {"<|endoftext|>": SIZE, "<|im_start|>": SIZE + 1, "<|im_end|>": SIZE + 2}
    encoding = tiktoken.Encoding("qwen", pat_str=split, mergeable_ranks=ranks, special_tokens=special)
    return [encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all") for text in TEXTS]


def byte_alphabet() -> tuple[list[int], list[str]]:
    """Bytes, and the characters by which byte-level vocabularies spell them: printable ones are themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    chars = [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(rest))]
    assert sorted(chars) == sorted(ByteLevel.alphabet())
    return [*plain, *rest], chars


def train_sentencepiece(folder: Path) -> None:
    """A model with the settings of Grok-1's: BPE, fallback to bytes, single digits, pieces of line ends and spaces."""
    folder.mkdir(parents=True, exist_ok=True)
    own = [char * n for char, most in (("\n", 10), ("\t", 4)) for n in range(1, most + 1)]
    own += [" " * n for n in range(2, 17)] + list("0123456789") + ["<|separator|>"]
    sentencepiece.SentencePieceTrainer.train(
        input=str(BOOK),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=PIECES,
        character_coverage=0.9995,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=own,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[BOS]",
        eos_piece="[EOS]",
        unk_piece="[UNK]",
        num_threads=1,
    )
    (folder / "tokenizer.vocab").unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("published", type=Path, help="folder with qwen2.5/ and qwen3/, as published")
    published = parser.parse_args().published
    shutil.rmtree(TOKENIZERS, ignore_errors=True)
    spec = cut(published / "qwen2.5", TOKENIZERS / "qwen2.5")
    cut(published / "qwen3", TOKENIZERS / "qwen3")
    train_sentencepiece(TOKENIZERS / "sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZERS / "sentencepiece" / "tokenizer.model"))
    golden = {
        "texts": TEXTS,
        "tiktoken": {"version": tiktoken.__version__, "ids": tiktoken_ids(spec)},
        "sentencepiece": {"version": sentencepiece.__version__, "ids": [model.encode(text) for text in TEXTS]},
    }
    (DATA / "golden" / "tokenizers.json").write_text(json.dumps(golden) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
