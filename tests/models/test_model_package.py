"""Families from outside the tree: a module named by --model-package, or an installed package's entry point."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sgl_jax.models.checkpoint import Checkpoint, open_checkpoint
from sgl_jax.models.families import FAMILIES, Families, decoder_config, known_families
from sgl_jax.models.loader import load_weights
from sgl_jax.models.model_errors import ModelError

MODULE = """
import dataclasses

from sgl_jax.models import llama

ARCHITECTURES = ("TinyTaleForCausalLM",)
NAMES = llama.NAMES.with_layer({"o": ("model.layers.{i}.tale.out.weight",)})


def config(hf):
    same = llama.config(hf | {"architectures": ["LlamaForCausalLM"]})
    return dataclasses.replace(same, architecture="TinyTaleForCausalLM")
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Lay out a package with one family as pip would install it."""
    (tmp_path / "tiny_tale.py").write_text(MODULE)
    (tmp_path / "no_family.py").write_text("ARCHITECTURES = ()\n")
    info = tmp_path / "tiny_tale-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-tale\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    metadata.MetadataPathFinder().invalidate_caches()
    yield info
    for name in ("tiny_tale", "no_family", "several"):
        sys.modules.pop(name, None)


@pytest.fixture
def checkpoint(tmp_path: Path, stories260k: Path) -> Checkpoint:
    """Write stories260k under the names of the package's family."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((stories260k / "config.json").read_text()) | {"architectures": ["TinyTaleForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(stories260k / "model.safetensors")
    renamed = {name.replace("self_attn.o_proj", "tale.out"): value for name, value in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    return open_checkpoint(str(folder))


def assert_loads_as_the_original(checkpoint: Checkpoint, stories260k: Path, families: Families) -> None:
    config, original = decoder_config(checkpoint.config, families=families), open_checkpoint(str(stories260k))
    assert config.architecture == "TinyTaleForCausalLM"
    ours = load_weights(checkpoint, config, "float32", families=families)
    theirs = load_weights(original, decoder_config(original.config), "float32")
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_module_named_by_the_flag(package: Path, checkpoint: Checkpoint, stories260k: Path) -> None:
    with pytest.raises(ModelError, match="TinyTaleForCausalLM"):
        decoder_config(checkpoint.config)
    families = known_families("tiny_tale")
    assert_loads_as_the_original(checkpoint, stories260k, families)
    assert sorted(families) == sorted([*FAMILIES, "TinyTaleForCausalLM"])


def test_the_table_of_families_never_changes(package: Path, checkpoint: Checkpoint) -> None:
    before = dict(FAMILIES)
    known_families("tiny_tale")
    assert before == FAMILIES
    assert known_families(None) is FAMILIES
    with pytest.raises(TypeError):
        FAMILIES["TinyTaleForCausalLM"] = sys  # type: ignore[index]
    with pytest.raises(ModelError, match="TinyTaleForCausalLM"):
        decoder_config(checkpoint.config)


def test_a_module_may_list_families_which_come_before_ours(package: Path, tmp_path: Path, stories260k: Path) -> None:
    (tmp_path / "several.py").write_text("""
import tiny_tale
from types import ModuleType

again = ModuleType("again")
again.ARCHITECTURES, again.NAMES = ("LlamaForCausalLM",), tiny_tale.NAMES
again.config = lambda hf: tiny_tale.config(hf)
FAMILIES = (tiny_tale, again)
""")
    families = known_families("several")
    assert (
        decoder_config(open_checkpoint(str(stories260k)).config, families=families).architecture
        == "TinyTaleForCausalLM"
    )


def test_an_entry_point_of_an_installed_package(package: Path, checkpoint: Checkpoint, stories260k: Path) -> None:
    (package / "entry_points.txt").write_text("[sgl_jax.models]\nTinyTaleForCausalLM = tiny_tale\n")
    assert_loads_as_the_original(checkpoint, stories260k, FAMILIES)


def test_what_is_no_family_is_said(package: Path) -> None:
    with pytest.raises(ModelError, match=r"no_family .*NAMES"):
        known_families("no_family")
    with pytest.raises(ModelError, match="--model-package nowhere_at_all"):
        known_families("nowhere_at_all")


def test_an_unknown_architecture_is_told_which_relative_its_tensors_fit(stories260k: Path) -> None:
    stored = open_checkpoint(str(stories260k))
    unknown = stored.config | {"architectures": ["NovelForCausalLM"]}
    with pytest.raises(ModelError, match=r"NovelForCausalLM .*LlamaForCausalLM and MistralForCausalLM"):
        decoder_config(unknown, {}, stored.tensors)
    fewer = {name: tensor for name, tensor in stored.tensors.items() if "down_proj" not in name}
    with pytest.raises(ModelError, match=r"NovelForCausalLM .*none"):
        decoder_config(unknown, {}, fewer)
