"""Every form of --model-path is opened, and anything else is refused with a reason."""

from __future__ import annotations

import json
import struct

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import save_file

from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.stored import concatenated
from sgl_jax.settings.hub import Downloads


def test_a_folder(stories260k):
    checkpoint = open_checkpoint(str(stories260k))
    assert checkpoint.format == "safetensors"
    assert checkpoint.tokenizer_path == stories260k
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.generation_config["eos_token_id"] == 2
    assert checkpoint.dtype == "float32"
    assert checkpoint.total_bytes == sum(4 * np.prod(t.shape) for t in checkpoint.tensors.values())


def test_dtype_in_either_spelling(tmp_path):
    save_file({"x": np.zeros(1)}, tmp_path / "model.safetensors")
    for key in ("dtype", "torch_dtype"):
        (tmp_path / "config.json").write_text(json.dumps({key: "bfloat16"}))
        assert open_checkpoint(str(tmp_path)).dtype == "bfloat16"
        (tmp_path / "config.json").write_text(json.dumps({"text_config": {key: "bfloat16"}}))
        assert open_checkpoint(str(tmp_path)).dtype == "bfloat16"


def test_a_hub_id_is_downloaded_without_other_layouts(stories260k, monkeypatch):
    calls = []

    def download(repo_id, **options):
        calls.append((repo_id, options))
        return str(stories260k)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_checkpoint("org/model", downloads=Downloads(folder="cache")).path == stories260k
    assert open_checkpoint("org/model", load_format="dummy").tensors == {}
    (repo_id, with_weights), (_, without) = calls
    assert (repo_id, with_weights["cache_dir"]) == ("org/model", "cache")
    assert "*.safetensors" in with_weights["allow_patterns"]
    assert "*.safetensors" not in without["allow_patterns"]
    assert "original/*" in with_weights["ignore_patterns"]


@pytest.mark.parametrize("name", ["qwen3-8b", "Qwen3-8B"])
def test_a_bundled_config_is_a_shape_without_weights(name):
    checkpoint = open_checkpoint(f"config:{name}", load_format="dummy")
    assert (checkpoint.format, checkpoint.dtype, checkpoint.tensors) == ("dummy", "bfloat16", {})
    assert checkpoint.config["hidden_size"] == 4096
    with pytest.raises(ModelError, match="--load-format dummy"):
        open_checkpoint(f"config:{name}")


def test_an_unknown_config_lists_those_there_are():
    with pytest.raises(ModelError, match=r"'qwen9'.* Llama-3\.1-8B, .*Qwen3-8B"):
        open_checkpoint("config:qwen9", load_format="dummy")


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.* convert"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json.* JSON"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(("text", "kind"), [("[1]", "list"), ('["ab"]', "list"), ("1", "int"), ("null", "NoneType")])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_config_that_is_no_object_is_named(tmp_path, name, text, kind):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=rf"{name} .*{kind}.* object"):
        open_checkpoint(str(tmp_path), load_format="dummy")


def test_two_gguf_files_are_one_too_many(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"2 \.gguf .*a\.gguf, b\.gguf"):
        open_checkpoint(str(tmp_path))


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"x")
    with pytest.raises(ModelError, match=r"model\.bin is no model.* folder.* \.gguf"):
        open_checkpoint(str(path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        (struct.pack("<Q", 5) + b"{oops", "JSON"),
        (struct.pack("<Q", 59) + b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}     ', "cut short"),
    ],
)
def test_broken_safetensors(tmp_path, content, said):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=said):
        open_checkpoint(str(tmp_path))


def test_shards_of_tensor_parallel_devices_are_kept_apart_and_concatenated(stories260k, tmp_path):
    (tmp_path / "config.json").write_text((stories260k / "config.json").read_text())
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    for shard in range(2):
        tensors = {
            "rows": whole[2 * shard : 2 * shard + 2],
            "columns": np.ascontiguousarray(np.split(whole, 2, 1)[shard]),
        }
        save_file(tensors, tmp_path / f"model-00000-TP-{shard:03d}.safetensors")
    save_file({"norm": np.ones(3)}, tmp_path / "model-00001-TP-common.safetensors")
    index = {"weight_map": {"rows": "model-00000-TP-000.safetensors", "norm": "model-00001-TP-common.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    stored = open_checkpoint(str(tmp_path)).tensors
    assert sorted(stored) == ["columns (shard 0)", "columns (shard 1)", "norm", "rows (shard 0)", "rows (shard 1)"]
    rows = concatenated("rows", [stored["rows (shard 0)"], stored["rows (shard 1)"]], axis=0)
    columns = concatenated("columns", [stored["columns (shard 0)"], stored["columns (shard 1)"]], axis=1)
    for start, stop in [(0, 4), (1, 3), (0, 1), (3, 4)]:
        np.testing.assert_array_equal(rows.rows(start, stop), whole[start:stop])
        np.testing.assert_array_equal(columns.rows(start, stop), whole[start:stop])
    assert rows.shape == columns.shape == (4, 6)
    with pytest.raises(ModelError, match=r"axis 0.* \[2, 6\] F32, \[4, 3\] F32"):
        concatenated("rows", [stored["rows (shard 0)"], stored["columns (shard 1)"]], axis=0)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": np.zeros(1)}, tmp_path / name)
    with pytest.raises(ModelError, match=r"b\.safetensors .*another file"):
        open_checkpoint(str(tmp_path))
