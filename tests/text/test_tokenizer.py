"""Tokenizers are loaded from every form, and give the text and bytes of single tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from messages import says
from sgl_jax.text.chat_template import TemplateError
from sgl_jax.text.tokenizer import TextTooLong, Tokenizer, TokenizerError, load_tokenizer


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


def test_templates_as_an_object_and_in_files(folder: Path) -> None:
    config(folder, chat_template={"default": "plain", "tool_use": "tools"})
    assert [rendered(folder, name) for name in ("default", "tool_use", "absent")] == ["plain", "tools", "plain"]
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("with documents")
    assert [rendered(folder, name) for name in ("default", "tool_use", "rag")] == ["plain", "tools", "with documents"]
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": {"default": "json"}}))
    assert rendered(folder) == "json"
    config(folder, chat_template={"tool_use": "tools"})
    (folder / "chat_template.json").unlink()
    with pytest.raises(TemplateError, match=r"rag, tool_use.*--chat-template"):
        rendered(folder)


def test_a_broken_template_refuses_when_it_is_asked_for(folder: Path) -> None:
    config(folder, chat_template={"default": "plain", "syntax": "{% never %}", "kind": 5})
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "latin.jinja").write_bytes(b"\xff")
    (folder / "additional_chat_templates" / "lfs.jinja").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert rendered(folder) == "plain"
    for name, message in (
        ("syntax", "never"),
        ("kind", "compile"),
        ("latin", "latin.jinja"),
        ("lfs", "Git LFS pointer"),
    ):
        with pytest.raises(TemplateError, match=message):
            rendered(folder, name)
    config(folder, chat_template="{% never %}")
    assert load_tokenizer(str(folder)).encode("Once") == [1, 403]
    with pytest.raises(TemplateError, match="never"):
        rendered(folder)


def test_a_broken_template_of_the_command_line_is_refused_at_once(folder: Path) -> None:
    with pytest.raises(TokenizerError, match=r"line 1.*never"):
        load_tokenizer(str(folder), "{% never %}")


def test_a_text_that_is_plainly_too_long_is_not_encoded(stories: Tokenizer) -> None:
    with pytest.raises(TextTooLong) as refused:
        stories.encode("a" * 701, max_tokens=100)
    assert says(str(refused.value), "701 characters … 100 tokens … 700 … 7")
    assert len(stories.encode("a" * 700, max_tokens=100)) == 701  # too long, and the caller says so with its length


def test_a_long_text_is_counted_piece_by_piece(tmp_path: Path, tokenizers: Path, monkeypatch) -> None:
    shutil.copy(tokenizers / "qwen3" / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"additional_special_tokens": ["-" * 500]}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.longest_token == 500
    with monkeypatch.context() as patched:
        counted: list[int] = []
        encode = tokenizer._encode
        patched.setattr(tokenizer, "_encode", lambda text, **more: (counted.append(len(text)), encode(text, **more))[1])
        with pytest.raises(TextTooLong, match=r"40000 tokens.* 20000"):
            tokenizer.encode("x" * 5_000_000, max_tokens=20_000)
    assert counted == [100_000]
    assert tokenizer.encode("-" * 5_000_000, max_tokens=20_000) == [2026] * 10_000


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


def test_a_pair_gets_the_bos_that_a_text_gets(folder: Path) -> None:
    parts = json.loads((folder / "tokenizer.json").read_text())
    config(folder, add_bos_token=False, tokenizer_class="LlamaTokenizerFast")
    assert load_tokenizer(str(folder)).encode_pair("Once", "Once")[0] == 403
    (folder / "tokenizer.json").write_text(json.dumps(parts | {"post_processor": None}))
    config(folder, add_bos_token=True)
    assert load_tokenizer(str(folder)).encode_pair("Once", "Once") == [1, 403, 403]
