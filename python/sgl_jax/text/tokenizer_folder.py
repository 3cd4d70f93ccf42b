"""Reads a tokenizer from a folder of Hugging Face's form: vocabulary, added tokens, settings and chat templates."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers

from sgl_jax.models.folder_files import JsonFile, read_text, reading
from sgl_jax.models.model_errors import ModelError
from sgl_jax.text.added_tokens import add_tokens
from sgl_jax.text.byte_ranks import TOK_JSON, load_tiktoken, load_tok_json
from sgl_jax.text.from_transformers import load_with_transformers
from sgl_jax.text.sentencepiece_file import load_sentencepiece
from sgl_jax.text.vocabulary import Vocabulary

_VOCABULARIES = ("tokenizer.json", TOK_JSON, "*.tiktoken", "tokenizer.model", "vocab.*", "merges.txt")
_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
FILES = (*_VOCABULARIES, *_CONFIGS, "chat_template.*", "additional_chat_templates/*.jinja")


def load_folder(place: Path) -> Vocabulary:
    """Read the folder. Raises ModelError, which names the file, where that is not possible."""
    config = JsonFile(place / "tokenizer_config.json")
    named = config.fields.get("tokenizer_class")
    kind = str(named)
    found = _vocabulary(place, prefix_once=kind.startswith("Llama") and config.get("legacy", bool) is not True)
    backend = found.backend
    backend.no_truncation()
    backend.no_padding()
    own_size = backend.get_vocab_size()
    special: dict[str, Any] = found.special_tokens | add_tokens(backend, config)
    for name in [name for name in ("bos_token", "eos_token") if name not in special]:
        token = JsonFile(place / "config.json").get(f"{name}_id", int, list)  # an id, or several
        first = next(iter(token), None) if isinstance(token, list) else token
        if isinstance(first, int) and first >= 0 and (piece := backend.id_to_token(first)) is not None:
            special[name] = piece
    add_bos, bos = config.get("add_bos_token", bool), backend.token_to_id(special.get("bos_token", ""))
    if add_bos is False and not kind.startswith("Llama"):
        add_bos = None  # only the Llama classes let this field overrule tokenizer.json
    has_bos = found.is_sentencepiece and bos is not None and bos < own_size
    if add_bos is None and has_bos and kind.startswith(("Llama", "Gemma", "CodeLlama")):
        add_bos = True  # the default of these classes; the vocabulary itself does not say
    templates = _templates(place, config)
    default = templates.pop("default", found.chat_template)
    return dataclasses.replace(
        found,
        special_tokens=special,
        chat_template=default,
        named_templates=templates,
        add_bos=add_bos,
        class_name=named if isinstance(named, str) else None,
    )


def _vocabulary(place: Path, prefix_once: bool) -> Vocabulary:
    """Read tokenizer.json, or build a tokenizer from the first of the other forms that the folder has."""
    readers: dict[str, Callable[[Path], Vocabulary]] = {
        "tokenizer.json": lambda path: Vocabulary(tokenizers.Tokenizer.from_file(str(path))),
        TOK_JSON: load_tok_json,
        "*.tiktoken": load_tiktoken,
        "tokenizer.model": lambda path: load_sentencepiece(path, prefix_once),
    }
    for pattern, read in readers.items():
        for path in sorted(place.glob(pattern))[:1]:
            with reading(path):
                return read(path)
    if not any((place / name).is_file() for name in ("tokenizer_config.json", "vocab.json", "vocab.txt")):
        raise ModelError(
            f"{place} has no tokenizer.json, {TOK_JSON}, *.tiktoken or tokenizer.model; "
            "give a directory that has one with --tokenizer-path"
        )
    return Vocabulary(load_with_transformers(place))


def _templates(place: Path, config: JsonFile) -> dict[str, Any]:
    """Return templates by name: chat_template.jinja, else chat_template.json, else tokenizer_config.json, and those in
    additional_chat_templates. One that cannot be read refuses when it is rendered, unless it is the default one."""
    found: dict[str, Any] = {}
    for path in sorted(place.glob("additional_chat_templates/*.jinja")):
        try:
            found[path.stem] = read_text(path)
        except (ModelError, OSError) as error:
            found[path.stem] = f"{{{{ raise_exception({json.dumps(str(error))}) }}}}"
    if (path := place / "chat_template.jinja").is_file():
        return found | {"default": read_text(path)}
    for file in (JsonFile(place / "chat_template.json"), config):
        if given := file.get("chat_template", str, dict, list):
            with reading(file.path):
                if isinstance(given, list):
                    given = {entry["name"]: entry["template"] for entry in given}
                named = given if isinstance(given, dict) else {"default": given}
            if not isinstance(named.get("default", ""), str):
                raise file.wrong("chat_template", named["default"], "a template's text")
            return found | named
    return found
