"""Tokens that the files beside a vocabulary add to it.

They get the ids that transformers 5 gives them: a token that the vocabulary lacks takes the next free one.
"""

from typing import Any

from tokenizers import AddedToken, Tokenizer

from sgl_jax.models.folder_files import JsonFile, reading

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


def add_tokens(backend: Tokenizer, config: JsonFile) -> dict[str, Any]:
    """Add the tokens of a folder, whose tokenizer_config.json is given. Return the special ones by name, and those
    without a name as additional_special_tokens. Raises ModelError."""
    listed = config.get("added_tokens_decoder", dict)
    with reading(config.path):
        named, extra = _special(config)
        others, more = _special(JsonFile(config.path.with_name("special_tokens_map.json")))
        if listed is None:  # a folder of older form, where the other file rules
            named, extra = named | others, more or extra
            added = _older_form(backend, config, {token.content for token in (*named.values(), *extra)})
        else:
            named = others | named
            by_id = sorted((int(number), value) for number, value in listed.items())
            added = [_token(config, "added_tokens_decoder", value, special=False) for _, value in by_id]
        contents = {token.content for token in named.values()}
        for token in added:
            token.special = token.special or token.content in contents
        known = {token.content for token in (*backend.get_added_tokens_decoder().values(), *added)}
        in_order = {name: named[name] for name in _NAMES if name in named} | named
        backend.add_tokens([*added, *(token for token in (*in_order.values(), *extra) if token.content not in known)])
    found: dict[str, Any] = {name: token.content for name, token in named.items()}
    return found | ({"additional_special_tokens": [token.content for token in extra]} if extra else {})


def _special(file: JsonFile) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """Return the special tokens of a file by name, and those without a name."""
    extra = file.get("extra_special_tokens", list, dict) or file.get("additional_special_tokens", list) or []
    fields = {
        name: value
        for name, value in file.fields.items()
        if name in _NAMES or (name.endswith("_token") and isinstance(value, str))
    }
    if isinstance(extra, dict):
        fields, extra = fields | extra, []
    named = {name: _token(file, name, value, special=True) for name, value in fields.items() if value is not None}
    return named, [_token(file, "additional_special_tokens", value, special=True) for value in extra]


def _older_form(backend: Tokenizer, config: JsonFile, special: set[str]) -> list[AddedToken]:
    """Return the tokens of added_tokens.json that the vocabulary does not have as added ones, in the order of ids."""
    file = JsonFile(config.path.with_name("added_tokens.json"))
    with reading(file.path):
        by_id = sorted((int(number), token) for token, number in file.fields.items())
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        new = [token for _, token in by_id if token not in known]
        return [AddedToken(token, special=token in special, normalized=token not in special) for token in new]


def _token(file: JsonFile, name: str, value: object, special: bool) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=special, normalized=not special)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise file.wrong(name, value, "a token, or an object with its content")
    flags = {"special": special} | {flag: bool(value[flag]) for flag in _FLAGS if flag in value}
    return AddedToken(value["content"], **{"normalized": not flags["special"], **flags})
