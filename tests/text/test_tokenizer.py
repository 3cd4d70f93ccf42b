"""Tokenizers are loaded from every form, and give the text and bytes of single tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sgl_jax.text.chat_template import TemplateError
from sgl_jax.text.tokenizer import Tokenizer, TokenizerError, load_tokenizer


@pytest.fixture(scope="module")
def stories(stories260k: Path) -> Tokenizer:
    return load_tokenizer(str(stories260k))


@pytest.fixture(scope="module")
def qwen(tokenizers: Path) -> Tokenizer:
    return load_tokenizer(str(tokenizers / "qwen3"))


def test_encode_and_decode(stories: Tokenizer) -> None:
    ids = stories.encode("Once upon a time")
    assert ids == [1, 403, 407, 261, 378]
    assert stories.encode("Once upon a time", add_special_tokens=False) == ids[1:]
    assert stories.decode(ids) == "Once upon a time"
    assert stories.decode(ids, skip_special_tokens=False).startswith("<s>")
    assert (stories.bos_token_id, stories.eos_token_id, stories.vocab_size) == (1, 2, 512)


def test_golden_prompts(stories: Tokenizer, golden: Path) -> None:
    for case in json.loads((golden / "stories260k.json").read_text())["cases"]:
        assert stories.encode(case["prompt"]) == case["prompt_ids"]


def test_single_tokens_keep_their_space_and_bytes(stories: Tokenizer) -> None:
    ids = stories.encode("a é 🤗", add_special_tokens=False)
    assert b"".join(stories.token_bytes(token) for token in ids) == " a é 🤗".encode()
    assert stories.token_text(407) == " upon"
    assert stories.token_text(1) == "<s>"
    lone = stories.encode("🤗", add_special_tokens=False)[-1]
    assert stories.token_text(lone) == "\\x97"


def test_byte_level_tokens_add_up_to_the_text(qwen: Tokenizer) -> None:
    text = "Grüße, 世界! 🤗\n\tdone  "
    ids = qwen.encode(text)
    assert b"".join(qwen.token_bytes(token) for token in ids) == text.encode()
    assert qwen.decode(ids) == text


def test_a_lone_surrogate_is_refused(stories: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="surrogate"):
        stories.encode("a\ud800")


def test_no_chat_template_is_said_clearly(stories: Tokenizer) -> None:
    with pytest.raises(TemplateError, match="--chat-template"):
        stories.chat_template()


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(TokenizerError, match=r"/nowhere/template.jinja"):
        load_tokenizer(str(tmp_path), chat_template="/nowhere/template.jinja")


@pytest.fixture
def folder(tmp_path: Path, stories260k: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(stories260k / name, tmp_path)
    return tmp_path


def config(folder: Path, **values: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rendered(folder: Path, name: str = "default", override: str | None = None) -> str:
    return load_tokenizer(str(folder), override).chat_template(name).render([{"role": "user", "content": "Hi"}])


def test_where_a_chat_template_is_found(folder: Path) -> None:
    config(folder, chat_template="config {{ eos_token }}")
    assert rendered(folder) == "config </s>"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert rendered(folder) == "json"
    (folder / "chat_template.jinja").write_text("jinja")
    assert rendered(folder) == "jinja"
    assert rendered(folder, override="{{ 'mine' }}") == "mine"
    (folder / "own.txt").write_text("from a file")
    assert rendered(folder, override=str(folder / "own.txt")) == "from a file"


def test_named_templates(folder: Path) -> None:
    entries = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    config(folder, chat_template=entries)
    assert rendered(folder) == "plain"
    assert rendered(folder, "tool_use") == "tools"
    assert rendered(folder, "absent") == "plain"


def test_special_tokens_written_out_or_only_in_the_model_config(folder: Path) -> None:
    config(folder, bos_token={"content": "<s>", "special": True}, eos_token=None)
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_bos_is_added_where_only_the_config_asks_for_it(folder: Path) -> None:
    parts = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(parts | {"post_processor": None}))
    assert load_tokenizer(str(folder)).encode("Once") == [1, 403]
    config(folder, add_bos_token=None)
    assert load_tokenizer(str(folder)).encode("Once") == [403]


def test_llama_classes_can_switch_bos_off(folder: Path) -> None:
    config(folder, add_bos_token=False)
    assert load_tokenizer(str(folder)).encode("Once") == [1, 403]
    config(folder, tokenizer_class="LlamaTokenizerFast")
    assert load_tokenizer(str(folder)).encode("Once") == [403]
