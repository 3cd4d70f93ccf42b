"""Flags of LoRA adapters: every spelling in every place, and what cannot be honoured."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from messages import says
from sgl_jax.multihost.identity import shared_flags
from sgl_jax.multihost.wire import Identity
from sgl_jax.observability import log
from sgl_jax.settings.adapter_paths import AdapterPath
from sgl_jax.settings.flag_parser import FlagError
from sgl_jax.settings.server_args import ServerArgs

SGLANG = '{"lora_name": "c", "lora_path": "/c d", "pinned": true}'
VLLM = '{"name": "e", "path": "~/e", "base_model_name": "m"}'
ALL = ["/a", "b=/b=b", SGLANG, VLLM]
FOUND = (
    AdapterPath("/a", "/a"),
    AdapterPath("b", "/b=b"),
    AdapterPath("c", "/c d", pinned=True),
    AdapterPath("e", "/home/someone/e"),
)


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")


def parse(*words: str, **environ: str) -> ServerArgs:
    return ServerArgs.from_cli(["--model-path", "m", *words], environ)


def test_adapters_in_every_spelling_and_place(tmp_path: Path) -> None:
    assert parse("--lora-paths", *ALL).adapters == FOUND
    assert parse("--lora-paths", *ALL[:2], "--lora-modules", *ALL[2:]).adapters == FOUND
    assert parse(SGL_JAX_LORA_PATHS=json.dumps([*ALL[:3], json.loads(VLLM)])).adapters == FOUND
    assert parse(SGL_JAX_LORA_PATHS=" /a  b=/b=b").adapters == FOUND[:2]
    assert parse(SGL_JAX_LORA_PATHS=SGLANG).adapters == FOUND[2:3]
    config = tmp_path / "server.yaml"
    config.write_text(f"lora-modules:\n- /a\n- b=/b=b\n- {SGLANG}\n- {VLLM}\n")
    assert parse("--config", str(config)).adapters == FOUND
    config.write_text("lora-paths: /a b=/b=b\nlora-target-modules: [q_proj, o_proj]\n")
    args = parse("--config", str(config))
    assert (args.adapters, args.lora_target_modules) == (FOUND[:2], ("q_proj", "o_proj"))
    assert ServerArgs(model_path="m", lora_paths=ALL).adapters == FOUND  # lists, as in Python


def test_adapters_reach_the_engine_process_other_hosts_and_the_log() -> None:
    import msgspec

    args = parse("--lora-paths", *ALL, "--lora-target-modules", "all")
    assert ServerArgs(**json.loads(json.dumps(dataclasses.asdict(args)))) == args
    identity = Identity({}, shared_flags(args), {})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(identity), type=Identity) == identity
    assert identity.flags["--lora-paths"] == tuple(ALL)
    words = shlex.split(log.changed_args_line(args.changed()).removeprefix("Arguments: "))
    assert ServerArgs.from_cli(words, {}) == args


def test_adapters_are_enabled_by_any_flag_that_names_them(tmp_path: Path) -> None:
    assert not parse().lora_enabled
    assert not parse("--no-enable-lora").lora_enabled
    for words in (["--enable-lora"], ["--lora-paths", "/a"], ["--lora-dir", str(tmp_path)]):
        assert parse(*words).lora_enabled
    args = parse("--enable-lora", "--max-loras", "2", "--max-cpu-loras", "3", "--max-lora-rank", "64")
    assert (args.max_loras_per_batch, args.max_loaded_loras, args.max_lora_rank) == (2, 3, 64)
    assert (args.adapters, args.lora_target_modules) == ((), ())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_lora_rank": 8}, "--max-lora-rank … no effect without --enable-lora"),
        ({"enable_lora": False, "lora_paths": ["a"]}, "--lora-paths … no effect with --no-enable-lora"),
        ({"max_loras_per_batch": 0}, "--max-loras-per-batch is 0 … at least 1"),
        ({"enable_lora": True, "max_loaded_loras": 7}, "--max-loaded-loras is 7 … at least --max-loras-per-batch … 8"),
        ({"lora_dir": "/nowhere"}, "--lora-dir is /nowhere … no such folder"),
        ({"lora_paths": "a=b"}, "--lora-paths is a=b … list"),
        ({"lora_paths": ["a", 7]}, "--lora-paths … 7 … text"),
        ({"lora_paths": [""]}, "--lora-paths … not empty"),
        ({"lora_paths": ["a=/x", "a=/y"]}, "--lora-paths … the name a twice"),
        ({"lora_paths": ["m=/x"]}, "--lora-paths … the name m … served model"),
        ({"lora_paths": ["s=/x"]}, "--lora-paths … the name s … served model"),
        ({"lora_paths": ["m/"]}, "--lora-paths … the name m/ … served model"),
        ({"lora_paths": ["default=/x"]}, "--lora-paths … the name default … served model"),
        ({"lora_paths": ["a\n=/x"]}, "--lora-paths … 1 to 512 … visible"),
        ({"lora_paths": ["=/x"]}, "--lora-paths has =/x … empty … NAME=PATH"),
        ({"lora_paths": ["a="]}, "--lora-paths has a= … empty … NAME=PATH"),
        ({"lora_paths": ['{"lora_name": 1']}, "--lora-paths … not JSON … NAME=PATH"),
        ({"lora_paths": ['{"lora_name": "a", "lora_path": "/x", "rank": 1}']}, "--lora-paths … rank … lora_name"),
        ({"lora_paths": ['{"name": "a", "path": 3}']}, "--lora-paths … lora_path is 3 … lora_name"),
        ({"lora_paths": ['{"name": "a"}']}, "--lora-paths … a name and a path"),
        (
            {"lora_paths": ['{"name": "a", "path": "/x", "base_model_name": "b"}']},
            "--lora-paths has a … base model b … m or s",
        ),
        (
            {"max_loras_per_batch": 1, "lora_paths": ['{"lora_name": "a", "lora_path": "/x", "pinned": true}']},
            "--lora-paths … 1 pinned … fewer than --max-loras-per-batch … 1",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(FlagError) as caught:
        ServerArgs(model_path="m", served_model_name="s", **given)
    assert says(str(caught.value), message)
    assert caught.value.flag == message.split()[0]


def test_values_from_outside_that_are_no_list_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match=r"--lora-paths is \[1.* list .*SGL_JAX_LORA_PATHS"):
        parse(SGL_JAX_LORA_PATHS="[1")
    config = tmp_path / "server.yaml"
    config.write_text("lora-paths: 7\n")
    with pytest.raises(FlagError, match=r"--lora-paths is 7.* list .*server.yaml"):
        parse("--config", str(config))
    with pytest.raises(FlagError, match=r"--lora-paths.*expected at least one"):
        parse("--lora-paths")
