"""Model folders as people have them give the weights that transformers 5 loads from them, or are refused by file name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.families import decoder_config
from sgl_jax.models.loader import load_weights
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.weights import Weights

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, np.ndarray]
Change = Callable[[Path, Tensors], None]


@pytest.fixture
def folder(stories260k: Path, tmp_path: Path) -> Path:
    """A copy of stories260k, whose head is tied and not stored."""
    return Path(shutil.copytree(stories260k, tmp_path / "model"))


def load(folder: Path) -> tuple[DecoderConfig, Weights[jax.Array]]:
    found = open_checkpoint(str(folder))
    config = decoder_config(found.config, found.generation_config, found.tensors)
    return config, load_weights(found, config, "float32")


def tensors_of(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def save(folder: Path, tensors: Mapping[str, np.ndarray], name: str = "model.safetensors") -> None:
    save_file(dict(tensors), folder / name, {"format": "pt"})


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def equal(a: Weights[jax.Array], b: Weights[jax.Array]) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))
    )


def in_shards(folder: Path, tensors: Tensors, *, index: bool, number: int = 2) -> None:
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(number):
        name = f"model-{i + 1:05d}-of-{number:05d}.safetensors"
        save(folder, shard := dict(list(tensors.items())[i::number]), name)
        weight_map |= dict.fromkeys(shard, name)
    if index:
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def beside(name: str) -> Change:
    return lambda folder, tensors: save(folder, {"base_model.x.lora_A.weight": np.zeros((4, 64))} | tensors, name)


def renamed(prefix: str, head: str = HEAD) -> Change:
    def change(folder: Path, tensors: Tensors) -> None:
        save(folder, {head if n == HEAD else prefix + n.removeprefix("model."): a for n, a in tensors.items()})

    return change


def then(*changes: Change) -> Change:
    return lambda folder, tensors: [change(folder, tensors) for change in changes] and None


def stale_index(folder: Path, tensors: Tensors) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}))


def only_the_head(folder: Path, tensors: Tensors) -> None:
    save(folder, {HEAD if name == EMBED else name: array for name, array in tensors.items()})


def shards(*, index: bool) -> Change:
    return lambda folder, tensors: in_shards(folder, tensors, index=index)


def config(**changes: Any) -> Change:
    return lambda folder, tensors: edit(folder / "config.json", **changes)


SAME_MODEL: dict[str, Change] = {
    "adapter beside it": beside("adapter_model.safetensors"),
    "running average beside it": beside("model_ema.safetensors"),
    "running average of another name beside it": beside("ema.safetensors"),
    "optimizer beside it": beside("optimizer.safetensors"),
    "Mistral's layout beside it": beside("consolidated.safetensors"),
    "files of training beside a file of another name": then(
        lambda folder, tensors: (
            (folder / "model.safetensors").rename(folder / "llama-lora-merged.safetensors") and None
        ),
        beside("ema.safetensors"),
        beside("adapters.safetensors"),
        beside("optimizer.safetensors"),
        beside("model_ema.safetensors"),
    ),
    "another precision beside it": beside("model.fp16.safetensors"),
    "an index whose shards are gone": stale_index,
    "an index that is no JSON": lambda folder, tensors: (folder / INDEX).write_text("{") and None,
    "shards with an index": shards(index=True),
    "shards with an index, a file beside them": then(shards(index=True), beside("extra.safetensors")),
    "shards without an index": shards(index=False),
    "shards without an index, an adapter beside them": then(shards(index=False), beside("adapter_model.safetensors")),
    "one file of another name": lambda folder, tensors: (
        (folder / "model.safetensors").rename(folder / "a.safetensors") and None
    ),
    "saved without model.": renamed(""),
    "saved inside a larger model": renamed("language_model.model."),
    "saved inside another": renamed("model.language_model."),
    "saved by a wrapper": renamed("module.model."),
    "no architectures": config(architectures=None),
    "architectures empty": config(architectures=[]),
    "the class without a head": config(architectures=["LlamaModel"]),
    "the class without a head, without model.": then(config(architectures=["LlamaModel"]), renamed("")),
    "several classes": config(architectures=["NoSuchModel", "LlamaForCausalLM"]),
    "tied, stored as the head alone": only_the_head,
}


@pytest.mark.parametrize("case", SAME_MODEL)
def test_an_odd_folder_is_the_same_model(stories260k: Path, folder: Path, case: str) -> None:
    SAME_MODEL[case](folder, tensors_of(folder))
    (wanted_config, wanted), (got_config, got) = load(stories260k), load(folder)
    assert got_config == wanted_config
    assert equal(got, wanted)


@pytest.mark.parametrize("prefix", ["model.", "", "language_model.model."])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_tied_config_with_a_head_of_its_own_uses_it(folder: Path, prefix: str, sharded: bool) -> None:
    """As transformers 5. One value that differs, in the last row, makes a head of its own."""
    tensors = tensors_of(folder)
    head = tensors[EMBED].copy()
    head[-1, -1] += 1
    stored = {HEAD if prefix != "language_model.model." else "language_model.lm_head.weight": head}
    stored |= {prefix + name.removeprefix("model."): array for name, array in tensors.items()}
    in_shards(folder, stored, index=True, number=3) if sharded else save(folder, stored)
    config, weights = load(folder)
    assert not config.tie_embeddings
    np.testing.assert_array_equal(weights.embed, tensors[EMBED])
    np.testing.assert_array_equal(weights.lm_head, head)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_head_of_the_same_values_is_tied(folder: Path, dtype: type) -> None:
    tensors = tensors_of(folder)
    save(folder, tensors | {HEAD: tensors[EMBED].astype(dtype)})
    config, weights = load(folder)
    assert config.tie_embeddings
    assert weights.lm_head is None


def test_a_gemma_is_tied_by_default_but_for_a_head_of_its_own(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("gemma"), tmp_path / "gemma"))
    found = open_checkpoint(str(folder))
    save(folder, {name: tensor.read() for name, tensor in found.tensors.items()} | {HEAD: np.ones((512, 64), "f4")})
    assert load(checkpoint("gemma"))[1].lm_head is None
    np.testing.assert_array_equal(load(folder)[1].lm_head, np.ones((512, 64)))


def test_a_head_of_another_shape_is_named(folder: Path) -> None:
    save(folder, tensors_of(folder) | {HEAD: np.ones((500, 64), np.float32)})
    with pytest.raises(ModelError, match=r"lm_head\.weight has \[500, 64\], the config needs \[512, 64\]"):
        load(folder)


def test_an_untied_model_without_a_head_is_refused(folder: Path) -> None:
    edit(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"missing tensors: lm_head\.weight"):
        load(folder)


def test_two_text_models_in_a_folder_are_told(folder: Path) -> None:
    tensors = tensors_of(folder)
    save(folder, {prefix + n.removeprefix("model."): a for prefix in ("draft.", "target.") for n, a in tensors.items()})
    with pytest.raises(ModelError, match=r"several text models.* draft\.layers\.0.* target\.layers\.0"):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", INDEX])
def test_a_git_lfs_pointer_is_named_with_the_cure(folder: Path, name: str) -> None:
    if name == INDEX:
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(POINTER)
    with pytest.raises(ModelError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        open_checkpoint(str(folder))


def test_a_gguf_pointer_is_named_and_a_vision_projector_is_no_model(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for name in ("mmproj-model-f16.gguf", "model-Q8_0.gguf"):
        (folder / name).write_text(POINTER)
    with pytest.raises(ModelError, match=r"model-Q8_0\.gguf is a Git LFS pointer"):
        open_checkpoint(str(folder))


def test_a_file_cut_short_is_named_with_its_sizes(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(ModelError, match=rf"model\.safetensors is cut short.* {len(whole)} bytes.* {len(whole) - 7};"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("index", [True, False])
def test_missing_shards_are_named(folder: Path, index: bool) -> None:
    in_shards(folder, tensors_of(folder), index=index, number=3)
    for i in (1, 3):
        (folder / f"model-0000{i}-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r" model-00001-of-00003\.safetensors, model-00003-of-00003\.safetensors, "):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({}, "weight_map None"),
        ({"weight_map": []}, r"weight_map \[\]"),
        ({"weight_map": {"x": 1}}, r"weight_map \{'x': 1\}"),
        ({"weight_map": {"x": "../other/model.safetensors"}}, r"'\.\./other/model\.safetensors'.* folder"),
        ({"weight_map": {"x": "/etc/passwd"}}, "'/etc/passwd'.* folder"),
        ([], "JSON list"),
    ],
)
def test_a_damaged_index_is_named(folder: Path, index: object, said: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=rf"{INDEX}.*{said}"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "consolidated.safetensors", "adapter.safetensors"])
def test_weights_of_another_format_are_refused_by_name(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ModelError, match=rf"has no model\.safetensors.*only {name}; convert"):
        open_checkpoint(str(folder))
