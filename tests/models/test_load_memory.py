"""A host's memory while it loads stays near the size of what devices hold: no matrix is in memory whole in another form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import quantise

D, F, LAYERS, V = 1024, 4096, 6, 256  # 100 million values
SHAPES = {f"self_attn.{name}_proj": (D, D) for name in "qkvo"} | {
    "mlp.gate_proj": (F, D),
    "mlp.up_proj": (F, D),
    "mlp.down_proj": (D, F),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "vocab_size": V,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel"}
W8A8 = quantise.compressed(CHANNEL, "int-quantized", input_activations={"num_bits": 8, "type": "int"})

LOAD = """
import dataclasses, re, sys, threading, time
from pathlib import Path
import jax
from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.models.families import decoder_config
from sgl_jax.models.loader import load_weights
from sgl_jax.models.scaled import Scaled

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def watch():
    while not done.is_set():
        most[0] = max(most[0], anonymous())
        time.sleep(0.002)

checkpoint = open_checkpoint(sys.argv[1])
config = decoder_config(checkpoint.config, tensors=checkpoint.tensors)
config = dataclasses.replace(config, weight_scheme=Scaled("int8", rounding="int8"))
jax.numpy.zeros(1).block_until_ready()
before, most, done = anonymous(), [0], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
weights = load_weights(checkpoint, config, "bfloat16")
jax.block_until_ready(weights)
done.set()
thread.join()
most[0] = max(most[0], anonymous())  # the last weights may have come after the thread's last look
print(most[0] - before, sum(leaf.nbytes for leaf in jax.tree.leaves(weights)))
"""


@pytest.mark.parametrize("stored", ["int8", "bfloat16"])
def test_loading_takes_little_more_than_the_weights(tmp_path: Path, stored: str) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "model.embed_tokens.weight": np.zeros((V, D), ml_dtypes.bfloat16),
        "model.norm.weight": np.ones(D, ml_dtypes.bfloat16),
    }
    for i in range(LAYERS):
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = np.ones(D, ml_dtypes.bfloat16)
        for name, shape in SHAPES.items():
            values = rng.integers(-127, 128, shape, np.int8)
            if stored == "int8":
                tensors[f"model.layers.{i}.{name}.weight_scale"] = np.full((shape[0], 1), 1e-3, np.float32)
            tensors[f"model.layers.{i}.{name}.weight"] = (
                values if stored == "int8" else values.astype(ml_dtypes.bfloat16)
            )
    config = CONFIG | ({"quantization_config": W8A8} if stored == "int8" else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    quantise.save(tmp_path / "model.safetensors", tensors)
    files = (tmp_path / "model.safetensors").stat().st_size
    del tensors
    run = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path], capture_output=True, text=True, timeout=300, check=True
    )
    most, held = map(int, run.stdout.split())
    assert held < 1.02 * (files if stored == "int8" else files / 2)
    # Some weights lie in memory that the process had freed before, which is counted in neither.
    assert 0.95 * held < most < (1.3 if stored == "int8" else 0.9) * files
