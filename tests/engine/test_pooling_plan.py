"""Decisions of a launch about vectors, read from folders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from checkpoints import DATA
from sgl_jax.engine.pooling_plan import pooler_of, with_pooling
from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.models.families import decoder_config, known_families
from sgl_jax.settings.server_args import ServerArgs


def test_a_default_prompt_is_told_once_and_not_put(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = DATA / "embed" / "qwen3-embedding"
    for name, text in {"name": "query", "none": None}.items():
        folder = tmp_path / name
        folder.mkdir()
        for file in source.iterdir():
            if file.name != "config_sentence_transformers.json":
                (folder / file.name).symlink_to(file)
        about = json.loads((source / "config_sentence_transformers.json").read_text()) | {"default_prompt_name": text}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(about))
        args, families = ServerArgs(model_path=str(folder)), known_families(None)
        checkpoint = dataclasses.replace(open_checkpoint(str(folder), load_format="dummy"), path=folder)
        model = decoder_config(checkpoint.config, checkpoint.generation_config, families=families)
        model = with_pooling(args, model, checkpoint)
        caplog.clear()
        assert pooler_of(args, model, checkpoint, families) is not None
        said = [line for line in caplog.messages if "default_prompt_name" in line]
        assert len(said) == (1 if text else 0)
        assert all("query" in line and "prompt_name" in line for line in said)
