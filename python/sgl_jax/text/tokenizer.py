"""Loads a tokenizer from a Hugging Face directory or hub id (tokenizer.json, else a vocabulary), or a GGUF file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

from sgl_jax.models.folder_files import read_text, reading
from sgl_jax.models.model_errors import ModelError
from sgl_jax.settings.hub import HUGGING_FACE, Downloads, HubError, local_path
from sgl_jax.text import tokenizer_folder
from sgl_jax.text.bpe import BYTE_OF_CHAR, CHAR_OF_BYTE
from sgl_jax.text.byte_ranks import TOK_JSON
from sgl_jax.text.chat_template import ChatTemplate, TemplateError, bundled_templates
from sgl_jax.text.vocabulary import Vocabulary

_PIECE = 100_000  # characters
_USUAL = 8  # characters per token that no ordinary text has on average


class TokenizerError(ValueError):
    """A tokenizer cannot be loaded, or a text cannot be encoded."""


class TextTooLong(TokenizerError):
    """A text has more tokens than it may have."""


class Tokenizer:
    """Converts text to token ids and back; holds the model's chat templates, too."""

    def __init__(self, found: Vocabulary, chat_template: str | None = None):
        """Take what a reader found; `chat_template` replaces the model's own ones."""
        self.backend = backend = found.backend
        special = found.special_tokens
        self.bos_token, self.eos_token = special.get("bos_token"), special.get("eos_token")
        self.bos_token_id = None if self.bos_token is None else backend.token_to_id(self.bos_token)
        self.eos_token_id = None if self.eos_token is None else backend.token_to_id(self.eos_token)
        ends = [self.eos_token_id, *map(backend.token_to_id, found.ends)]
        self.end_ids = tuple(dict.fromkeys(token for token in ends if token is not None))  # each ends an answer
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.longest_token = max(map(len, backend.get_vocab()), default=1)  # in characters
        self._add_bos = found.add_bos
        self.class_name = found.class_name
        self.special_names: Mapping[str, str | list[str]] = special  # the tokens by name: "pad_token"
        default = chat_template or found.chat_template
        sources = {} if chat_template else dict(found.named_templates)
        sources |= {"default": default} if default else {}
        self._templates = {name: ChatTemplate(source, special) for name, source in sources.items()}
        added = backend.get_added_tokens_decoder()
        self.added_tokens = {i: token.content for i, token in added.items()}
        self.special = {i: token.content for i, token in added.items() if token.special}
        self._kind = _piece_kind(backend)
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Return a text's ids. Raises TokenizerError for a text that is not valid Unicode.

        Raises TextTooLong instead of encoding all of a text that plainly has more than `max_tokens`; one with a few
        more is encoded.
        """
        if max_tokens is not None:
            self._check_length(text, max_tokens)
        ids = self._encode(text, add_special_tokens)
        return self._with_bos(ids, text) if add_special_tokens else ids

    def _with_bos(self, ids: list[int], text: str) -> list[int]:
        """Return a text's ids with a BOS, or without one, as the model's class has it."""
        if self._add_bos is not None and self.bos_token_id is not None:
            starts_with_bos = ids[:1] == [self.bos_token_id]
            if self._add_bos and not starts_with_bos:
                return [self.bos_token_id, *ids]
            if not self._add_bos and starts_with_bos and not text.startswith(str(self.bos_token)):
                return ids[1:]
        return ids

    def encode_pair(self, text: str, other: str) -> list[int]:
        """Return the ids of two texts that the model reads together, as tokenizer.json joins them, with the BOS of
        `encode`."""
        return self._with_bos(self.backend.encode_batch_fast([(text, other)])[0].ids, text)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            # Only the batch calls of encoding and decoding let other threads run meanwhile.
            return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except (TypeError, UnicodeEncodeError) as error:  # a lone surrogate has no UTF-8 form
            raise TokenizerError("the text has a lone surrogate, which is not valid Unicode") from error

    def _check_length(self, text: str, max_tokens: int) -> None:
        """Compare the characters with those that so many tokens can have, and then count the tokens piece by piece as
        long as they fit. A cut between pieces changes the count a little, hence the factor of 2."""
        limit = self.most_characters(max_tokens)
        if len(text) > limit:
            held = f"{max_tokens} tokens hold {limit} at most, {self.longest_token} each"
            raise TextTooLong(f"at least {len(text)} characters; {held}")
        count = 0
        for at in range(0, len(text) if len(text) > _USUAL * max_tokens else 0, _PIECE):
            count += len(self._encode(text[at : at + _PIECE], add_special_tokens=False))
            if count > 2 * max_tokens:
                raise TextTooLong(f"more than {2 * max_tokens} tokens; the limit is {max_tokens}")

    def most_characters(self, num_tokens: int) -> int:
        """Return how many characters so many tokens can have. (A normalizer may shorten a text, which is not counted.)"""
        return num_tokens * self.longest_token

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0]

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token. A character may need several tokens."""
        if token not in self._bytes:
            self._bytes[token] = self._piece_bytes(token)
        return self._bytes[token]

    def token_text(self, token: int) -> str:
        """Return the token as text, with bytes that are no UTF-8 on their own as \\xNN."""
        return self.token_bytes(token).decode("utf-8", errors="backslashreplace")

    def _piece_bytes(self, token: int) -> bytes:
        if token in self.added_tokens:
            return self.added_tokens[token].encode()
        if (piece := self.backend.id_to_token(token)) is None:
            return b""
        if self._kind == "bytes":
            return bytes(BYTE_OF_CHAR[c] for c in piece if c in BYTE_OF_CHAR)
        if self._kind == "sentencepiece":
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
            return piece.replace("▁", " ").encode()
        return self.backend.decode([token], skip_special_tokens=False).encode()

    def is_added(self, token: int) -> bool:
        """Return whether the token stands beside the vocabulary's pieces, as special tokens do."""
        return token in self.added_tokens

    def template_source(self) -> str | None:
        """Return the text of the default chat template; None: there is none."""
        found = self._templates.get("default")
        return None if found is None else found.source

    def chat_template(self, name: str = "default") -> ChatTemplate:
        """Return the template of a name ("tool_use"), or else the default one. Raises TemplateError if there is none."""
        if (template := self._templates.get(name) or self._templates.get("default")) is None:
            others = f" (it has {', '.join(self._templates)}, but no default)" if self._templates else ""
            raise TemplateError(
                f"this model has no chat template{others}; give one with --chat-template or use /v1/completions with a "
                "plain prompt"
            )
        return template


def _piece_kind(backend: tokenizers.Tokenizer) -> str:
    """Say how pieces of the vocabulary spell bytes: "bytes" (byte-level BPE), "sentencepiece" or "other"."""
    state = b"" if backend.decoder is None else backend.decoder.__getstate__()
    if b"ByteLevel" in state:
        return "bytes"
    if "▁".encode() in state or b"\\u2581" in state or b"Metaspace" in state or b"ByteFallback" in state:
        return "sentencepiece"
    return "other"


def load_tokenizer(path: str, chat_template: str | None = None, downloads: Downloads = HUGGING_FACE) -> Tokenizer:
    """Load from a directory with tokenizer.json or a vocabulary, a .gguf file, or a hub id. The tokens of config:NAME
    are bytes.

    `chat_template` replaces the model's own: a file, the name of one of ours, or the template itself. Raises
    TokenizerError, with a line for the user, when there is no tokenizer or it cannot be read.
    """
    try:
        if (override := _read_override(chat_template)) is not None:
            ChatTemplate(override).check()
        return _load(path, override, downloads)
    except (OSError, ModelError, HubError, TemplateError) as error:
        raise TokenizerError(str(error).strip().partition("\n")[0]) from error


def _load(path: str, override: str | None, downloads: Downloads) -> Tokenizer:
    if path.startswith("config:"):
        return _of_bytes(override)
    place = local_path(path, tokenizer_folder.FILES, downloads)
    if place.name == TOK_JSON:
        place = place.parent
    ours = any((place / name).is_file() for name in ("tokenizer.json", TOK_JSON))
    if place.suffix != ".gguf" and not ours:
        place = next(iter(sorted(place.glob("*.gguf"))), place)
    if place.suffix != ".gguf":
        return Tokenizer(tokenizer_folder.load_folder(place), override)
    from sgl_jax.text.gguf_vocab import load_gguf_tokenizer

    with reading(place):
        return Tokenizer(load_gguf_tokenizer(place), override)


def _read_override(chat_template: str | None) -> str | None:
    if chat_template is None or "{%" in chat_template or "{{" in chat_template:
        return chat_template
    place, ours = Path(chat_template).expanduser(), bundled_templates()
    if not place.is_file() and chat_template not in ours:
        raise TokenizerError(f"--chat-template {chat_template}: no such file, and no name of {', '.join(sorted(ours))}")
    return read_text(place) if place.is_file() else ours[chat_template]


def _of_bytes(override: str | None) -> Tokenizer:
    """Make a tokenizer for a config without a model: a text's tokens are its bytes; tokens above have no text."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({char: byte for byte, char in CHAR_OF_BYTE.items()}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(Vocabulary(backend), override or bundled_templates()["chatml"])
