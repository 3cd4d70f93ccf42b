"""Tiny checkpoints made when tests need them: their weights are not stored, they follow from names."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

DATA = Path(__file__).parent / "data"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
DTYPES = {"BF16": ml_dtypes.bfloat16, "F32": np.float32}


def write_checkpoint(name: str, folder: Path) -> None:
    """Write the checkpoint `name` into `folder`: a folder of tests/data/oracle, `stories260k-qwen2moe`, or `lora-` and a folder
    of tests/data/lora, the base of the adapters there."""
    folder.mkdir(parents=True)
    base = name.removeprefix("lora-")
    if name == "stories260k-qwen2moe":
        write_experts_of_equal_function(folder)
    elif base != name:
        for file in ("config.json", "generation_config.json"):
            shutil.copy(DATA / "oracle" / base / file, folder)
        shutil.copy(DATA / "lora" / base / "model.safetensors", folder)
    else:
        write_oracle(name, folder)
    for file in TOKENIZER_FILES:
        shutil.copy(DATA / "stories260k" / file, folder)


def write_oracle(name: str, folder: Path) -> None:
    source = DATA / "oracle" / name
    for file in source.glob("*.json"):
        shutil.copy(file, folder)
    table = json.loads((source / "weights.json").read_text(encoding="utf-8"))
    save_file(random_tensors(name, table), folder / "model.safetensors", {"format": "pt"})


def random_tensors(family: str, table: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The tensors of a table: name, with lists such as `{0,1}` in it, to shape, mean, std and dtype (BF16 if not said), or
    to the name of another tensor that it equals."""
    tensors = {}
    for pattern, spec in table.items():
        for name in expanded(pattern):
            if "same_as" in spec:
                tensors[name] = tensors[spec["same_as"]]
            else:
                values = random_values(f"{family} {name}", spec["shape"])
                dtype = DTYPES[spec.get("dtype", "BF16")]
                tensors[name] = (spec["mean"] + spec["std"] * values).astype(np.float32).astype(dtype)
    return tensors


def expanded(pattern: str) -> Iterator[str]:
    """The names that a pattern stands for: `a.{0,2}.b` for `a.0.b` and `a.2.b`."""
    texts = re.split(r"\{(.*?)\}", pattern)
    for numbers in itertools.product(*(choice.split(",") for choice in texts[1::2])):
        yield "".join(itertools.chain(*zip(texts[::2], [*numbers, ""], strict=True)))


def random_values(key: str, shape: Sequence[int]) -> np.ndarray:
    """Values of mean 0 and variance 1, near to normal, made of the key's hash: the same on every machine and for ever. Each
    is the sum of four uniform 16-bit integers, scaled."""
    size = int(np.prod(shape))
    parts = np.frombuffer(hashlib.shake_256(key.encode()).digest(8 * size), "<u2").reshape(size, 4)
    sums = parts.sum(1, dtype=np.int64) - 2 * 0xFFFF
    return (sums / np.sqrt((2.0**32 - 1) / 3)).reshape(shape)


def write_experts_of_equal_function(folder: Path) -> None:
    """stories260k as Qwen2-MoE: each expert is the dense MLP with its neurons in an order of its own, and the shared expert
    gives zeros. Any routing gives the dense model's tokens; an error in dispatch does not."""
    num_experts, num_shared = 4, 16
    dense = json.loads((DATA / "stories260k" / "config.json").read_text(encoding="utf-8"))
    hidden, neurons = dense["hidden_size"], dense["intermediate_size"]
    config = dense | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": neurons,
        "norm_topk_prob": True,
        "num_experts": num_experts,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": num_shared,
    }
    tensors = {}
    for name, array in load_file(DATA / "stories260k" / "model.safetensors").items():
        layer, is_mlp, matrix = name.partition(".mlp.")
        if not is_mlp:
            tensors[name] = array
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                tensors[name.removesuffix("weight") + "bias"] = np.zeros(len(array), np.float32)
            continue
        for expert in range(num_experts):
            order = np.argsort(random_values(f"{layer} expert {expert}", [neurons]), kind="stable")
            tensors[f"{layer}.mlp.experts.{expert}.{matrix}"] = np.take(array, order, axis=array.shape.index(neurons))
        shape = (hidden, num_shared) if matrix == "down_proj.weight" else (num_shared, hidden)
        tensors[f"{layer}.mlp.shared_expert.{matrix}"] = np.zeros(shape, np.float32)
        tensors[f"{layer}.mlp.shared_expert_gate.weight"] = np.zeros((1, hidden), np.float32)
        router = 0.5 * random_values(f"{layer} router", [num_experts, hidden])
        tensors[f"{layer}.mlp.gate.weight"] = router.astype(np.float32)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    shutil.copy(DATA / "stories260k" / "generation_config.json", folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def with_mtp_layer(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Add a random MTP layer, of the shapes of the last layer, to a model's config and tensors, under its family's names."""
    last, number, d = config["num_hidden_layers"] - 1, config["num_hidden_layers"], config["hidden_size"]
    at, is_bailing = f"model.layers.{number}.", "model.word_embeddings.weight" in tensors
    shapes = {
        name.replace(f"layers.{last}.", f"layers.{number}."): value.shape
        for name, value in tensors.items()
        if f"layers.{last}." in name
    }
    norm = "final_layernorm" if is_bailing else "shared_head.norm"
    shapes |= {f"{at}{name}.weight": (d,) for name in ("enorm", "hnorm", norm)}
    shapes[f"{at}eh_proj.weight"] = (d, 2 * d)
    if not is_bailing:
        shapes |= {f"{at}{name}.weight": (config["vocab_size"], d) for name in ("embed_tokens", "shared_head.head")}
    mtp = {}
    for name, shape in shapes.items():
        values = random_values(f"mtp {name}", shape)
        mtp[name] = (values / shape[-1] ** 0.5 if len(shape) > 1 else 1 + 0.2 * values).astype(np.float32)
    return {**config, "num_nextn_predict_layers": 1}, {**tensors, **mtp}
