"""Identities of hosts: a model is the same in any folder, and another model differs."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from pathlib import Path

import pytest

from messages import says
from sgl_jax.multihost.identity import differences, identity_of, model_files, shared_flags
from sgl_jax.settings.server_args import ServerArgs

CONFIGS = {"config.json": {"a": 1, "b": [2]}, "generation_config.json": {}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for i in (1, 2):
        (folder / f"model-{i}.safetensors").write_bytes(bytes([i]) * 100_000)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_copy_elsewhere_and_later_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    before = model_files(CONFIGS, folder)
    assert set(before) == {*CONFIGS, "model-1.safetensors", "model-2.safetensors"}
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    for file in copy.iterdir():
        os.utime(file, (1, 1))
    (copy / "tokenizer.json").write_text("{ }")  # host 0's alone matters
    assert model_files({"generation_config.json": {}, "config.json": {"b": [2], "a": 1}}, copy) == before


@pytest.mark.parametrize("change", ["size", "last bytes", "missing", "config"])
def test_another_model_is_not(folder: Path, change: str) -> None:
    before = model_files(CONFIGS, folder)
    file, configs = folder / "model-2.safetensors", dict(CONFIGS)
    match change:
        case "size":
            file.write_bytes(file.read_bytes() + b"\0")
        case "last bytes":
            file.write_bytes(file.read_bytes()[:-1] + b"\0")
        case "missing":
            file.unlink()
        case "config":
            configs["config.json"] = {"a": 1, "b": [3]}
    after = model_files(configs, folder)
    differing = {name for name in before if before[name] != after.get(name)}
    assert differing == {"config.json" if change == "config" else "model-2.safetensors"}


def test_flags_of_one_machine_alone_are_not_compared(folder: Path) -> None:
    common = {"nnodes": 2, "tp_size": 2, "dist_init_addr": "10.0.0.1:10011"}
    one = ServerArgs(model_path="a", **common)
    other = ServerArgs(model_path="b", port=1, log_level="debug", node_rank=1, dist_token="t", api_key="k", **common)
    assert shared_flags(one) == shared_flags(other)
    assert not {"--api-key", "--dist-token", "--model-path"} & shared_flags(one).keys()
    wider = ServerArgs(model_path="a", **common | {"tp_size": 4})
    a, b = (identity_of(args, CONFIGS, folder) for args in (one, wider))
    [said] = differences(a, b, "host 1")
    assert says(said, "--tp-size … 4 on host 1 … 2 on host 0")
    assert differences(a, a, "host 1") == []


def test_the_package_of_a_brought_attention_backend_is_compared(folder: Path) -> None:
    """Check the version of the backend's package, since another version makes other programs."""
    plain, brought = (
        identity_of(ServerArgs(model_path="a", attention_backend=name), CONFIGS, folder).versions
        for name in ("fa", "tokamax")
    )
    assert "tokamax" not in plain
    assert brought["tokamax"] == importlib.metadata.version("tokamax")
