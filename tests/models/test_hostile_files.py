"""Damaged or hostile model files end in a ModelError that names the file and the field, and in no other exception."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import DATA
from models.gguf_fixture import random_hf_tensors, write_gguf
from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.models.families import decoder_config, tensor_names
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.plan import plan_weights
from sgl_jax.models.safetensors_file import read_safetensors

DEEP = "[" * 100_000  # nested deeper than any reader recurses
HOSTILE = [None, True, [], {}, "x", "", [[]], 0, -1, 10**9, 2**63, 10**40, 0.5, -2.5, float("inf"), float("nan"), 1e300]
CONFIGS = {
    folder.name: json.loads((folder / "config.json").read_text()) for folder in sorted((DATA / "oracle").iterdir())
}


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    tree = at = copy.deepcopy(tree)
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return tree


@contextlib.contextmanager
def only_errors_that_name(*names: str) -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        said = str(error)
    else:
        return
    assert any(name in said for name in names), said


hostile = st.sampled_from(HOSTILE)


@settings(max_examples=400)
@given(st.data())
def test_any_value_in_a_config_is_served_or_refused_by_name(data: st.DataObject) -> None:
    config = data.draw(st.sampled_from(sorted(CONFIGS)).map(CONFIGS.__getitem__))
    for _ in range(data.draw(st.integers(1, 2))):
        config = changed(config, data.draw(st.sampled_from(sorted(places(config), key=str))), data.draw(hostile))
    with only_errors_that_name("config.json", "config (", "eos_token_id", "rope"):
        decoder = decoder_config(config)
        plan_weights({}, decoder, tensor_names(decoder), source="the checkpoint")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "rope_scaling.factor"),
        ({"rope_scaling": []}, "rope_scaling"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"architectures": [7]}, "architectures[0]"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"num_nextn_predict_layers": 10**9}, "num_nextn_predict_layers"),
    ],
)
def test_a_config_of_wrong_values_names_the_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: {re.escape(field)} is refused"):
        decoder_config(CONFIGS["llama"] | change)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [DEEP.encode(), b"\xff\xfe", b"", b"{", b"7", b"[" * 10])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=re.escape(name)):
        open_checkpoint(str(tmp_path), load_format="dummy")


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def safetensors(header: bytes, body: bytes = bytes(16)) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


@pytest.mark.parametrize(
    ("header", "field"),
    [
        (DEEP, "header"),
        ("[]", "header"),
        ("{", "header"),
        ('{"w": null}', "w"),
        ('{"w": []}', "w"),
        (json.dumps({"w": ENTRY | {"data_offsets": ["0", "16"]}}), "w.*data_offsets"),
        (json.dumps({"w": ENTRY | {"data_offsets": [16, 0]}}), "w.*16..0"),
        (json.dumps({"w": ENTRY | {"data_offsets": [-16, 0]}}), "w.*data_offsets"),
        (json.dumps({"w": ENTRY | {"data_offsets": [0, 10**30]}}), "w.*data_offsets"),
        (json.dumps({"w": ENTRY | {"shape": [2, -2]}}), "w.*shape"),
        (json.dumps({"w": ENTRY | {"shape": [2, 3]}}), r"w.*\[2, 3\]"),
        (json.dumps({"w": ENTRY | {"shape": "22"}}), "w.*shape"),
        (json.dumps({"w": ENTRY | {"dtype": 32}}), "w.*dtype"),
        (json.dumps({"w": {"dtype": "F32", "shape": [2, 2]}}), "w.*data_offsets"),
        (json.dumps({"w": ENTRY | {"data_offsets": [0, 17]}}), "w"),
    ],
)
def test_a_damaged_safetensors_header_names_tensor_and_field(tmp_path: Path, header: str, field: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(header.encode()))
    with pytest.raises(ModelError, match=rf"model\.safetensors.*{field}"):
        read_safetensors(path)


@settings(max_examples=200)
@given(st.data())
def test_any_change_of_a_safetensors_file_is_read_or_refused_by_name(tmp_path_factory, data: st.DataObject) -> None:
    header: Any = {"__metadata__": {"format": "pt"}, "w": ENTRY, "v": ENTRY}
    header = changed(header, data.draw(st.sampled_from(list(places(header)))), data.draw(hostile))
    raw = bytearray(safetensors(json.dumps(header).encode()))
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=2)):
        raw[at] = byte
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    with only_errors_that_name("mutated.safetensors"):
        for tensor in read_safetensors(path).values():
            if tensor.supported and tensor.shape:
                tensor.read()


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss", "phi3"])
def test_a_tensor_of_any_wrong_shape_is_named(checkpoint: Callable[[str], Path], family: str) -> None:
    """Some families take rows of their tensors, or turn them, before shapes are compared."""
    found = open_checkpoint(str(checkpoint(family)))
    decoder = decoder_config(found.config)
    names = tensor_names(decoder)
    for name, tensor in found.tensors.items():
        for shape in ((), (0,), (0, 0), (3, 5), (2, 0, 4)):
            tensors = {**found.tensors, name: dataclasses.replace(tensor, shape=shape)}
            with pytest.raises(ModelError, match=re.escape(name)):
                plan_weights(tensors, decoder, names, source="")


def opened(path: Path) -> None:
    """Read a model up to its weights' values."""
    found = open_checkpoint(str(path))
    decoder = decoder_config(found.config, found.generation_config, found.tensors)
    plan_weights(found.tensors, decoder, tensor_names(decoder), source=str(path))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "whole.gguf", random_hf_tensors())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.alignment", 0),
        ("general.alignment", "32"),
        ("split.count", "2"),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", "4"),
        ("llama.attention.head_count_kv", 0),
        ("llama.block_count", 10**9),
        ("llama.embedding_length", 0.5),
        ("llama.rope.dimension_count", "16"),
    ],
)
def test_wrong_metadata_of_a_gguf_is_named(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "tiny.gguf"
    metadata = {} if key == "general.alignment" else {key: value}
    write_gguf(path, random_hf_tensors(), metadata=metadata)
    if not metadata:  # the writer itself would not write it
        raw = path.read_bytes()
        (pairs,) = struct.unpack_from("<Q", raw, 16)
        kind = struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<IQ", 8, 2) + value.encode()
        pair = struct.pack("<Q", len(key)) + key.encode() + kind
        path.write_bytes(raw[:16] + struct.pack("<Q", pairs + 1) + pair + raw[24:])
    with pytest.raises(ModelError, match=rf"tiny\.gguf.*{key}|num_hidden_layers"):
        opened(path)


@pytest.mark.parametrize("size", [4, 7, 20, 100])
def test_a_gguf_cut_in_its_header_is_named(tmp_path: Path, gguf: Path, size: int) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"tiny\.gguf: cut short"):
        opened(path)


def test_arrays_of_arrays_in_a_gguf_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    nested = struct.pack("<IQ", 9, 1) * 100_000
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 9) + nested)
    with pytest.raises(ModelError, match=r"tiny\.gguf.* array of arrays"):
        opened(path)


byte_changes = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=3)


@settings(max_examples=200)
@given(changes=byte_changes)
def test_any_change_of_a_gguf_s_header_is_read_or_refused_by_name(tmp_path_factory, gguf: Path, changes):
    raw = bytearray(gguf.read_bytes())
    for at, byte in changes:
        raw[at] = byte
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(raw)
    with only_errors_that_name("mutated.gguf", "config.json", "vocabulary"):
        opened(path)
