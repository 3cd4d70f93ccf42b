"""Loads a tokenizer from a Hugging Face directory or hub id (tokenizer.json, else a vocabulary), or a GGUF file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from sgl_jax.models.model_errors import ModelError
from sgl_jax.settings.hub import HUGGING_FACE, Downloads, HubError, local_path
from sgl_jax.text import tok_json
from sgl_jax.text.bpe import BYTE_OF_CHAR, CHAR_OF_BYTE
from sgl_jax.text.chat_template import ChatTemplate, TemplateError, bundled_templates
from sgl_jax.text.vocabulary import Vocabulary

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_VOCABULARIES = (
    "tokenizer.json",
    tok_json.NAME,
    "*.tiktoken",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
_FILES = (*_VOCABULARIES, *_CONFIGS, "chat_template.*", "additional_chat_templates/*.jinja")


class TokenizerError(ValueError):
    """A tokenizer cannot be loaded, or a text cannot be encoded."""


class Tokenizer:
    """Converts text to token ids and back; holds the model's chat templates, too."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        add_bos: bool | None = None,  # None: as the backend's own post-processor does
        chat_templates: dict[str, ChatTemplate] | None = None,
    ):
        self.backend = backend
        self.bos_token, self.eos_token = bos_token, eos_token
        self.bos_token_id = None if bos_token is None else backend.token_to_id(bos_token)
        self.eos_token_id = None if eos_token is None else backend.token_to_id(eos_token)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self._add_bos = add_bos
        self._templates = chat_templates or {}
        self._added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
        self._kind = _piece_kind(backend)
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return a text's ids. Raises TokenizerError for a text that is not valid Unicode."""
        try:
            # Only the batch call lets other threads run meanwhile.
            ids = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except (TypeError, UnicodeEncodeError) as error:  # a lone surrogate has no UTF-8 form
            raise TokenizerError("the text has a lone surrogate, which is not valid Unicode") from error
        if add_special_tokens and self._add_bos is not None and self.bos_token_id is not None:
            starts_with_bos = ids[:1] == [self.bos_token_id]
            if self._add_bos and not starts_with_bos:
                return [self.bos_token_id, *ids]
            if not self._add_bos and starts_with_bos and not text.startswith(str(self.bos_token)):
                return ids[1:]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token. A character may need several tokens."""
        if token not in self._bytes:
            self._bytes[token] = self._piece_bytes(token)
        return self._bytes[token]

    def token_text(self, token: int) -> str:
        """Return the token as text, with bytes that are no UTF-8 on their own as \\xNN."""
        return self.token_bytes(token).decode("utf-8", errors="backslashreplace")

    def _piece_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self.backend.id_to_token(token)
        if piece is None:
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
        return token in self._added

    def chat_template(self, name: str = "default") -> ChatTemplate:
        """Return the template of a name ("tool_use"), or the default one. Raises TemplateError if there is none."""
        template = self._templates.get(name) or self._templates.get("default")
        if template is None:
            raise TemplateError(
                "this model has no chat template; give one with --chat-template or use /v1/completions with a plain prompt"
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
        return _load(path, _read_override(chat_template), downloads)
    except (OSError, ModelError, HubError) as error:
        raise TokenizerError(str(error).strip().partition("\n")[0]) from error


def _load(path: str, override: str | None, downloads: Downloads) -> Tokenizer:
    if path.startswith("config:"):
        return _of_bytes(override)
    place = local_path(path, _FILES, downloads)
    if place.suffix == ".gguf":
        return _from_gguf(place, override)
    if place.name == tok_json.NAME:
        place = place.parent
    ours = any((place / name).is_file() for name in ("tokenizer.json", tok_json.NAME))
    if not ours and (ggufs := sorted(place.glob("*.gguf"))):
        return _from_gguf(ggufs[0], override)
    return _from_directory(place, override)


def _read_override(chat_template: str | None) -> str | None:
    if chat_template is None or "{%" in chat_template or "{{" in chat_template:
        return chat_template
    place, ours = Path(chat_template).expanduser(), bundled_templates()
    if not place.is_file() and chat_template not in ours:
        raise TokenizerError(f"--chat-template {chat_template}: no such file, and no name of {', '.join(sorted(ours))}")
    return place.read_text(encoding="utf-8") if place.is_file() else ours[chat_template]


def _tokenizer(
    backend: tokenizers.Tokenizer, special: dict[str, Any], sources: dict[str, str], add_bos: bool | None = None
) -> Tokenizer:
    """Make the tokenizer and compile its templates, which see the special tokens by name."""
    return Tokenizer(
        backend,
        bos_token=special.get("bos_token"),
        eos_token=special.get("eos_token"),
        add_bos=add_bos,
        chat_templates={name: ChatTemplate(source, special) for name, source in sources.items()},
    )


def _of_bytes(override: str | None) -> Tokenizer:
    """Make a tokenizer for a config without a model: a text's tokens are its bytes; tokens above have no text."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({char: byte for byte, char in CHAR_OF_BYTE.items()}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return _tokenizer(backend, {}, {"default": override or bundled_templates()["chatml"]})


def _from_gguf(path: Path, override: str | None) -> Tokenizer:
    from sgl_jax.text.gguf_vocab import load_gguf_tokenizer

    found = load_gguf_tokenizer(path)
    source = override or found.chat_template
    return _tokenizer(found.backend, found.special_tokens, {"default": source} if source else {})


def _vocabulary(place: Path) -> Vocabulary:
    """Read tokenizer.json, or build a tokenizer from the first of the other forms that the folder has."""
    if (place / "tokenizer.json").is_file():
        return Vocabulary(tokenizers.Tokenizer.from_file(str(place / "tokenizer.json")))
    if (place / tok_json.NAME).is_file():
        return tok_json.load_tok_json(place / tok_json.NAME)
    if ranks := sorted(place.glob("*.tiktoken")):
        from sgl_jax.text.tiktoken_file import load_tiktoken

        return load_tiktoken(ranks[0])
    if (place / "tokenizer.model").is_file():
        from sgl_jax.text.sentencepiece_file import load_sentencepiece

        return load_sentencepiece(place / "tokenizer.model")
    if not any((place / name).is_file() for name in ("tokenizer_config.json", "vocab.json", "vocab.txt")):
        raise TokenizerError(
            f"{place} has no tokenizer.json, {tok_json.NAME}, *.tiktoken or tokenizer.model; "
            "give a directory that has one with --tokenizer-path"
        )
    from sgl_jax.text.from_transformers import load_with_transformers

    return Vocabulary(load_with_transformers(place))


def _from_directory(place: Path, override: str | None) -> Tokenizer:
    found = _vocabulary(place)
    backend = found.backend
    backend.no_truncation()
    backend.no_padding()
    config = _read_json(place / "tokenizer_config.json")
    special = found.special_tokens | _special_tokens(_read_json(place / "special_tokens_map.json") | config)
    for name in [name for name in ("bos_token", "eos_token") if name not in special]:
        token = _read_json(place / "config.json").get(f"{name}_id")  # an id, or several
        first = next(iter(token), None) if isinstance(token, list) else token
        if first is not None and (piece := backend.id_to_token(first)) is not None:
            special[name] = piece
    sources = {"default": override} if override else _template_sources(place, config)
    if "default" not in sources and found.chat_template is not None:
        sources["default"] = found.chat_template
    add_bos, kind = config.get("add_bos_token"), str(config.get("tokenizer_class"))
    if add_bos is False and not kind.startswith("Llama"):
        add_bos = None  # only the Llama classes let this field overrule tokenizer.json
    if add_bos is None and found.is_sentencepiece and kind.startswith(("Llama", "Gemma", "CodeLlama")):
        add_bos = True  # the default of these classes; the vocabulary itself does not say
    return _tokenizer(backend, special, sources, add_bos)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _special_tokens(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _SPECIAL_NAMES:
        token = config.get(name)
        if isinstance(token, dict):  # an AddedToken written out
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    more = config.get("additional_special_tokens")
    if isinstance(more, list):
        found["additional_special_tokens"] = [t["content"] if isinstance(t, dict) else t for t in more]
    return found


def _template_sources(place: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return templates by name: chat_template.jinja, else chat_template.json, else tokenizer_config.json."""
    extra = {p.stem: p.read_text(encoding="utf-8") for p in sorted(place.glob("additional_chat_templates/*.jinja"))}
    if (place / "chat_template.jinja").is_file():
        return extra | {"default": (place / "chat_template.jinja").read_text(encoding="utf-8")}
    template = _read_json(place / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):
        return extra | {entry["name"]: entry["template"] for entry in template}
    return extra | ({"default": template} if template else {})
