"""LoRA adapters as PEFT writes them are read as PEFT applies them, or refused by the name of what is not applied."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from checkpoints import DATA, random_tensors
from messages import says
from sgl_jax.models.decoder_config import DecoderConfig, DraftConfig
from sgl_jax.models.families import decoder_config, tensor_names
from sgl_jax.models.lora_config import LoraConfig
from sgl_jax.models.lora_files import AdapterFiles, MatrixFactors, open_adapter
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.plan import plan_weights
from sgl_jax.models.stored import StoredTensor

LORA = DATA / "lora"
WRAPPER = "base_model.model."
REFUSED = {  # adapters of trained kinds that are not served, with what the error names
    "llama/r8-dora": "use_dora True",
    "llama/r8-save-head-embed": "modules_to_save ['lm_head', 'embed_tokens']",
    "llama/r8-lora-head-embed": "base_model.model.model.embed_tokens.lora_embedding_A … lm_head.lora_A.weight",
    "qwen2/r8-bias": "bias 'lora_only'",
}
SERVED = sorted({f"{file.parent.parent.name}/{file.parent.name}" for file in LORA.glob("*/*/oracle.json")})
ATTENTION = "self_attn.{}_proj"
QKV = [ATTENTION.format(name) for name in "qkv"]


def config_of(family: str) -> DecoderConfig:
    return decoder_config(json.loads((DATA / "oracle" / family / "config.json").read_text()))


def opened(folder: Path, config: DecoderConfig) -> AdapterFiles:
    return open_adapter(folder, config, tensor_names(config))


def write_adapter(folder: Path, modules: Mapping[str, tuple[int, int]], **config: Any) -> dict[str, np.ndarray]:
    """Write an adapter with random factors for modules of these paths and shapes [O, I], and return its tensors."""
    rng = np.random.default_rng(0)
    tensors = {}
    for path, (o, i) in modules.items():
        tensors[f"{WRAPPER}{path}.lora_A.weight"] = rng.standard_normal((4, i), np.float32)
        tensors[f"{WRAPPER}{path}.lora_B.weight"] = rng.standard_normal((o, 4), np.float32)
    write(folder, tensors, **{"target_modules": sorted(modules)} | config)
    return tensors


def write(folder: Path, tensors: Mapping[str, np.ndarray], **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    written = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(written))
    save_file(dict(tensors), folder / "adapter_model.safetensors")


def delta(tensors: Mapping[str, np.ndarray], path: str, scale: float) -> np.ndarray:
    a, b = (tensors[f"{WRAPPER}{path}.lora_{letter}.weight"].astype(np.float32) for letter in "AB")
    return scale * (b @ a)


def parts_of(factors: MatrixFactors) -> list[np.ndarray | None]:
    return [None if a is None or b is None else b @ a for a, b in zip(factors.a, factors.b, strict=True)]


def refusal(folder: Path, config: DecoderConfig) -> str:
    with pytest.raises(ModelError) as raised:
        opened(folder, config).factors()
    return str(raised.value)


@pytest.mark.parametrize("adapter", SERVED)
def test_an_adapter_of_peft_is_read_with_its_own_scales(adapter: str) -> None:
    """Every tensor of the file is in the factors; r8-patterns has another rank for up_proj, and another alpha for k_proj."""
    folder = LORA / adapter
    said, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    r, alpha, rslora = said["r"], said["lora_alpha"], said["use_rslora"]
    scales = {"k_proj": 24 / 8, "up_proj": 8 / 16} if adapter == "llama/r8-patterns" else {}
    files = opened(folder, config_of(adapter.partition("/")[0]))
    found = {weight: parts_of(factors) for weight, factors in files.factors().items()}
    names = {
        "qkv": QKV,
        "o": [ATTENTION.format("o")],
        "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "down": ["mlp.down_proj"],
    }
    seen = 0
    for weight, parts in found.items():
        layer, site = re.fullmatch(r"\.layers\[(\d+)\]\.(\w+)", weight).groups()
        for name, part in zip(names[site], parts, strict=True):
            path = f"model.layers.{layer}.{name}"
            if part is None:
                assert f"{WRAPPER}{path}.lora_A.weight" not in tensors
            else:
                scale = scales.get(name.rpartition(".")[2], alpha / (math.sqrt(r) if rslora else r))
                np.testing.assert_allclose(part, delta(tensors, path, scale), rtol=1e-5, atol=1e-5)
                seen += 1
    assert 2 * seen == len(tensors) == 2 * files.num_matrices
    assert files.rank == (16 if adapter == "llama/r8-patterns" else r)
    assert files.sites == {weight.rpartition(".")[2] for weight in found}
    assert files.base_model == f"oracle/{adapter.partition('/')[0]}"


OTHERS = r"experts?[._]|shared_expert|mlp\.(gate|router)\.|block_sparse_moe|kv_b_proj|embed|lm_head|layers\.\d+\.mtp"
FAMILIES = sorted(folder.name for folder in (DATA / "oracle").iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_have_the_layout_in_which_weights_are_loaded(family: str, tmp_path: Path) -> None:
    """A checkpoint whose matrices are the products of an adapter's factors is loaded as the products of what is read."""
    table = json.loads((DATA / "oracle" / family / "weights.json").read_text())
    base, config = random_tensors(family, table), config_of(family)
    layers = "|".join(map(str, range(config.num_layers)))
    adapted = {
        name.removesuffix(".weight"): array.shape
        for name, array in base.items()
        if re.search(rf"layers\.({layers})\.", name) and array.ndim == 2 and not re.search(OTHERS, name)
    }
    tensors = write_adapter(tmp_path, adapted)
    merged = base | {f"{path}.weight": delta(tensors, path, 2.0) for path in adapted}
    stored = {
        name: StoredTensor(name, array.shape, "F32", array.nbytes, lambda start, stop, array=array: array[start:stop])
        for name, array in merged.items()
    }
    leaves = {leaf.path: leaf for leaf in plan_weights(stored, config, tensor_names(config), source="the checkpoint")}
    found = opened(tmp_path, config).factors()
    assert len(found) >= 2 * config.num_layers
    for weight, factors in found.items():
        whole = np.concatenate([part for part in parts_of(factors) if part is not None])
        np.testing.assert_allclose(
            whole, np.concatenate([p.read() for p in leaves[weight].pieces]), rtol=1e-5, atol=1e-5
        )


FUSED = {
    "hidden_size": 8,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
    "max_position_embeddings": 64,
}
PHI3 = FUSED | {"architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": 64}
EXPERTS = {"moe_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1, "first_k_dense_replace": 1}
BAILING = FUSED | EXPERTS | {"architectures": ["BailingMoeForCausalLM"]}
QWEN1 = {key: value for key, value in FUSED.items() if key != "num_key_value_heads"}
QWEN1 |= {"architectures": ["QWenLMHeadModel"], "seq_length": 64}


@pytest.mark.parametrize(
    ("hf", "path", "rows", "weight", "cuts"),
    [
        (PHI3, "model.layers.0.self_attn.qkv_proj", 16, "qkv", [(0, 8), (8, 12), (12, 16)]),
        (PHI3, "model.layers.0.mlp.gate_up_proj", 48, "gate_up", [(0, 24), (24, 48)]),
        (BAILING, "model.layers.0.attention.query_key_value", 16, "qkv", [(0, 8), (8, 12), (12, 16)]),
        (BAILING, "model.layers.0.attention.dense", 8, "o", [(0, 8)]),
        (BAILING, "model.layers.0.mlp.up_proj", 24, "gate_up", [None, (0, 24)]),
        (QWEN1, "transformer.h.0.attn.c_attn", 24, "qkv", [(0, 8), (8, 16), (16, 24)]),
        (QWEN1, "transformer.h.0.mlp.w2", 12, "gate_up", [(0, 12), None]),
        (QWEN1, "transformer.h.0.mlp.w1", 12, "gate_up", [None, (0, 12)]),
    ],
)
def test_a_fused_module_is_cut_into_its_parts(
    hf: dict[str, Any], path: str, rows: int, weight: str, cuts: Sequence[tuple[int, int] | None], tmp_path: Path
) -> None:
    tensors = write_adapter(tmp_path, {path: (rows, 8)}, lora_alpha=6)
    (found,) = opened(tmp_path, decoder_config(hf)).factors().items()
    assert found[0] == f".layers[0].{weight}"
    whole = delta(tensors, path, 1.5)
    for part, cut in zip(parts_of(found[1]), cuts, strict=True):
        if cut is None or part is None:
            assert part is cut is None
        else:
            np.testing.assert_allclose(part, whole[slice(*cut)], rtol=1e-5, atol=1e-5)


LLAMA = config_of("llama")  # 4 layers, D = 64, 4 heads of 16, 2 of them with keys, F = 176
SHAPES = {
    f"layers.{i}.{name}": shape
    for i in range(4)
    for name, shape in {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (176, 64),
        "mlp.up_proj": (176, 64),
        "mlp.down_proj": (64, 176),
    }.items()
}
Q = {f"model.layers.{i}.self_attn.q_proj": (64, 64) for i in range(4)}


@pytest.mark.parametrize(
    "prefix", ["model.", "", "model.language_model.", "language_model.model.", "language_model.", "model.text_model."]
)
def test_modules_are_found_with_and_without_a_larger_model_around_them(prefix: str, tmp_path: Path) -> None:
    tensors = write_adapter(tmp_path, {f"{prefix}layers.3.mlp.down_proj": (64, 176)})
    ((weight, factors),) = opened(tmp_path, LLAMA).factors().items()
    assert weight == ".layers[3].down"
    np.testing.assert_array_equal(factors.a[0], tensors[f"{WRAPPER}{prefix}layers.3.mlp.down_proj.lora_A.weight"])


@pytest.mark.parametrize("other", ["vision_tower.encoder.", "model.visual.", "base_model.model.model.", "model.model."])
def test_modules_of_other_parts_are_not_taken_for_the_text_models(other: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, {f"{other}layers.{i}.self_attn.q_proj": (64, 64) for i in range(4)})
    assert says(refusal(tmp_path, LLAMA), f"model does not have … {other}layers.0.self_attn.q_proj.lora_A.weight")
    write_adapter(tmp_path, Q | {f"{other}layers.0.self_attn.q_proj": (64, 64)})
    assert says(
        refusal(tmp_path, LLAMA), f"model does not have: {WRAPPER}{other}layers.0.self_attn.q_proj.lora_A.weight"
    )


def test_two_tensors_for_one_place_are_refused(tmp_path: Path) -> None:
    write_adapter(
        tmp_path,
        {f"model.language_model.{path.removeprefix('model.')}": s for path, s in Q.items()} | {next(iter(Q)): (64, 64)},
    )
    assert says(
        refusal(tmp_path, LLAMA), "not applied … base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    )


BAD = {
    "no-config": "no adapter_config.json",
    "no-weights": "no adapter_model.safetensors",
    "missing-lora-b": "other one of A and B: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "wrong-rank": "layers.0.self_attn.q_proj.lora_A.weight is [4, 64], not [8, 64]",
    "wrong-shape": "layers.0.self_attn.q_proj.lora_A.weight is [4, 56], not [4, 64]",
    "unknown-module": "model does not have: base_model.model.model.layers.0.self_attn.query_key_value.lora_A.weight",
    "layer-out-of-range": "4 layers … model.layers.99.self_attn.q_proj.lora_A.weight … model.layers.0.self_attn.q_proj",
    "ia3": "peft_type 'IA3' … LORA",
    "nan": "layers.0.self_attn.q_proj.lora_A.weight … NaN",
    "truncated": "adapter_model.safetensors is cut short … 9192 … 9092",
}


@pytest.mark.parametrize("case", json.loads((LORA / "llama-bad" / "index.json").read_text())["each must be refused"])
def test_a_damaged_adapter_is_refused_by_the_name_of_the_damage(case: str) -> None:
    assert says(refusal(LORA / "llama-bad" / case, LLAMA), BAD[case])


@pytest.mark.parametrize("adapter", REFUSED)
def test_an_adapter_that_is_more_than_factors_is_refused(adapter: str) -> None:
    assert says(refusal(LORA / adapter, config_of(adapter.partition("/")[0])), REFUSED[adapter])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_bias", True),
        ("bias", "all"),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("trainable_token_indices", [3]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("fan_in_fan_out", True),
        ("alora_invocation_tokens", [7, 8]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 0.1}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("a_key_of_next_year", 1),
    ],
)
def test_keys_that_change_more_than_factors_do_are_refused_by_name(key: str, value: object, tmp_path: Path) -> None:
    write_adapter(tmp_path, Q, **{key: value})
    assert says(refusal(tmp_path, LLAMA), f"adapter_config.json has {key} {value!r} … unchanged base")


def test_keys_without_effect_are_accepted(tmp_path: Path) -> None:
    """PEFT 0.21 writes all of these; others are written by trainers."""
    config = json.loads((LORA / "llama" / "r8-all" / "adapter_config.json").read_text())
    trained = {"task_type": "CAUSAL_LM", "lora_dropout": 0.1, "inference_mode": False, "revision": "main"}
    configs = {"loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0}, "megatron_core": "megatron.core"}
    mapping = {"auto_mapping": {"base_model_class": "LlamaForCausalLM"}, "unsloth_fixed": True, "merge_weights": False}
    for init in (True, False, None, "gaussian", "orthogonal", "eva", "mica"):
        every = config | trained | configs | mapping | {"init_lora_weights": init, "bias": "none", "new_key": None}
        write_adapter(tmp_path, Q, **every | {"r": 4, "target_modules": ["q_proj"]})
        assert opened(tmp_path, LLAMA).num_matrices == 4


@pytest.mark.parametrize(
    ("change", "pinned"),
    [
        ({"r": "8"}, "r is refused: Expected `int`, got `str` … '8'"),
        ({"r": 8.0}, "r is refused: Expected `int`, got `float` … 8.0"),
        ({"r": 0}, "r is refused … >= 1 … 0"),
        ({"r": None}, "has no r; PEFT writes"),
        ({"lora_alpha": "16"}, "lora_alpha is refused: Expected `float`, got `str` … '16'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is refused … nan"),
        ({"lora_alpha": None, "target_modules": None}, "has no lora_alpha and no target_modules"),
        ({"target_modules": [1]}, "target_modules[0] is refused: Expected `str`, got `int` … [1]"),
        ({"target_modules": "(q_proj"}, "target_modules has '(q_proj' … no regular expression"),
        ({"exclude_modules": "*"}, "exclude_modules has '*' … no regular expression"),
        ({"rank_pattern": {"(?i)q": 4}}, "rank_pattern has … (?i)q … no regular expression"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern[...] is refused … 'q_proj': '4'"),
        ({"alpha_pattern": {"[": 4}}, "alpha_pattern has … [ … no regular expression"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "("},
            "layers_pattern has … no regular expression",
        ),
        ({"layers_to_transform": [0.5]}, "layers_to_transform[0] is refused: Expected `int`, got `float` … [0.5]"),
        (
            {"layers_to_transform": [0], "target_modules": ".*q_proj"},
            "layers_to_transform; target_modules '.*q_proj' … list",
        ),
        ({"use_rslora": 1}, "use_rslora is refused … 1"),
        ({"peft_type": None}, "peft_type None … LORA"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_its_key(change: dict[str, Any], pinned: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, Q, **change)
    assert says(refusal(tmp_path, LLAMA), f"adapter_config.json … {pinned}")


def outcome(folder: Path) -> str:
    try:
        return f"{opened(folder, LLAMA).num_matrices} matrices"
    except ModelError as error:
        return str(error)


HOSTILE = [
    None,
    True,
    [],
    {},
    "x",
    "",
    "(",
    [[]],
    [None],
    0,
    -1,
    2**63,
    10**40,
    0.5,
    float("inf"),
    float("nan"),
    {"(": 1},
]
KEYS = json.loads((LORA / "llama" / "r8-all" / "adapter_config.json").read_text())


@settings(max_examples=150)
@given(changes=st.dictionaries(st.sampled_from(sorted(KEYS)), st.sampled_from(HOSTILE), min_size=1, max_size=2))
def test_any_value_in_a_config_is_served_or_refused_by_name(
    changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "hostile"
    write_adapter(folder, Q, **KEYS | {"r": 4, "target_modules": ["q_proj"]} | changes)
    said = outcome(folder)
    assert said == "4 matrices" or any(name in said for name in (*changes, "does not fit"))


def targeted(config: Mapping[str, Any], path: str) -> bool:
    """Whether PEFT's rules adapt a module; written down apart from the package."""

    def ends(names: list[str]) -> bool:
        return any(f".{path}".endswith(f".{name}") for name in names)

    if ends(config["exclude_modules"]) or not ends(config["target_modules"]):
        return False
    layers = config["layers_to_transform"]
    return not layers or path in config["target_modules"] or int(path.split(".")[2]) in layers


names_of_modules = st.lists(
    st.sampled_from(
        ["q_proj", "k_proj", "up_proj", "mlp.down_proj", "proj", "0.self_attn.o_proj", "model.layers.2.mlp.up_proj"]
    ),
    unique=True,
)


@settings(max_examples=60)
@given(
    names=names_of_modules.filter(bool),
    excluded=names_of_modules,
    layers=st.lists(st.integers(0, 3), unique=True),
    change=st.sampled_from(["none", "one less", "one more"]),
    data=st.data(),
)
def test_an_adapter_has_exactly_the_modules_that_its_config_names(
    names: list[str],
    excluded: list[str],
    layers: list[int],
    change: str,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "targets"
    config = {"target_modules": names, "exclude_modules": excluded, "layers_to_transform": layers}
    every = {f"model.{path}": shape for path, shape in SHAPES.items()}
    named = {path: shape for path, shape in every.items() if targeted(config, path)}
    pool = {"none": [], "one less": sorted(named), "one more": sorted(every.keys() - named)}[change]
    other = data.draw(st.sampled_from(pool)) if pool else None
    modules = {path: every[path] for path in sorted(named.keys() ^ {other} if other else named)}
    write_adapter(folder, modules, **config)
    if not modules:
        assert says(refusal(folder, LLAMA), "holds no tensors")
    elif other is None:
        assert opened(folder, LLAMA).num_matrices == len(named)
    elif change == "one less":
        assert says(refusal(folder, LLAMA), f"without tensors, though target_modules names them: {other}")
    else:
        assert says(refusal(folder, LLAMA), f"the config leaves out: {WRAPPER}{other}.lora_A.weight")


def lora(**changes: Any) -> LoraConfig:
    return msgspec.convert({"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]} | changes, LoraConfig)


@pytest.mark.parametrize(
    ("changes", "path", "named"),
    [
        ({"target_modules": "all-linear"}, "model.layers.0.mlp.up_proj", True),
        ({"target_modules": "All-Linear", "exclude_modules": ["up_proj"]}, "model.layers.0.mlp.up_proj", False),
        ({"target_modules": r".*\.[qv]_proj"}, "model.layers.0.self_attn.v_proj", True),
        ({"target_modules": r"[qv]_proj"}, "model.layers.0.self_attn.v_proj", False),  # the whole path must match
        ({"target_modules": r"a|.*q_proj"}, "a.q_proj", True),
        ({"target_modules": r"(?i).*Q_PROJ"}, "a.q_proj", True),
        ({"exclude_modules": r".*\.0\..*"}, "model.layers.0.self_attn.q_proj", False),
        ({}, "model.layers.0.self_attn.iq_proj", False),
        ({"layers_to_transform": 1}, "model.layers.1.self_attn.q_proj", True),
        ({"layers_to_transform": 1}, "model.layers.11.self_attn.q_proj", False),
        ({"layers_to_transform": []}, "model.layers.11.self_attn.q_proj", True),
        ({"layers_to_transform": [1], "layers_pattern": "h"}, "model.layers.1.self_attn.q_proj", False),
        ({"layers_to_transform": [1], "layers_pattern": ""}, "model.layers.1.self_attn.q_proj", True),
        ({"layers_to_transform": [1], "layers_pattern": ["h", "layers"]}, "model.layers.1.self_attn.q_proj", True),
        ({"layers_to_transform": [0]}, "model.layers.1.experts.0.q_proj", False),  # the first number is the layer's
        ({"layers_to_transform": [0]}, "lower.q_proj", False),
        ({"layers_to_transform": [0]}, "q_proj", True),  # the whole path
    ],
)
def test_target_modules_are_matched_as_peft_does(changes: dict[str, Any], path: str, named: bool) -> None:
    assert lora(**changes).targets(path) == named


@pytest.mark.parametrize(
    ("changes", "rank", "scale"),
    [
        ({}, 8, 2.0),
        ({"use_rslora": True}, 8, 16 / math.sqrt(8)),
        ({"rank_pattern": {"q_proj": 4}}, 4, 4.0),
        ({"rank_pattern": {"proj": 4}}, 8, 2.0),  # a pattern is a whole part of the path
        ({"rank_pattern": {".*proj": 4}}, 4, 4.0),
        ({"rank_pattern": {"self_attn.q_proj": 4, "q_proj": 2}}, 4, 4.0),  # the first that matches
        ({"rank_pattern": {"^model.layers.1.self_attn.q_proj": 4}}, 4, 4.0),
        ({"rank_pattern": {"^q_proj": 4}}, 8, 2.0),
        (
            {"rank_pattern": {r"layers\.[01]\..*": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
            2,
            3 / math.sqrt(2),
        ),
        ({"alpha_pattern": {"k_proj|q_proj": 4}}, 8, 0.5),
    ],
)
def test_ranks_and_alphas_are_matched_as_peft_does(changes: dict[str, Any], rank: int, scale: float) -> None:
    path = "model.layers.1.self_attn.q_proj"
    assert (lora(**changes).rank(path), lora(**changes).scale(path)) == (rank, scale)


@pytest.mark.parametrize(
    ("family", "path", "shape"),
    [
        ("llama", "lm_head", (512, 64)),
        ("llama-tied", "lm_head", (512, 64)),
        ("llama", "model.embed_tokens", (512, 64)),
        ("qwen3_moe", "model.layers.0.mlp.gate", (8, 64)),
        ("qwen3_moe", "model.layers.0.mlp.experts.3.up_proj", (48, 64)),
        ("qwen2_moe", "model.layers.0.mlp.shared_expert.up_proj", (96, 64)),
        ("deepseek_v3", "model.layers.2.mlp.shared_experts.up_proj", (40, 64)),
        ("deepseek_v3", "model.layers.0.self_attn.kv_b_proj", (192, 64)),
    ],
)
def test_modules_that_are_not_adapted_are_refused_by_name(
    family: str, path: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    write_adapter(tmp_path, {path: shape})
    assert says(
        refusal(tmp_path, config_of(family)),
        f"only A and B of attention and of dense MLPs are: {WRAPPER}{path}.lora_A.weight",
    )


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.layers.0.self_attn.q_proj.lora_B.bias",
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
    ],
)
def test_other_tensors_are_refused_by_name(name: str, tmp_path: Path) -> None:
    tensors = write_adapter(tmp_path, Q)
    write(tmp_path, tensors | {WRAPPER + name: np.zeros(4, np.float32)})
    assert says(refusal(tmp_path, LLAMA), f"not applied … {WRAPPER}{name}")
    write(tmp_path, tensors | {"model.layers.0.self_attn.k_proj.lora_A.weight": np.zeros((4, 64), np.float32)})
    assert says(refusal(tmp_path, LLAMA), "not applied … model.layers.0.self_attn.k_proj.lora_A.weight")


def test_all_that_is_wrong_stands_in_one_error(tmp_path: Path) -> None:
    modules = Q | {"model.layers.7.self_attn.q_proj": (64, 64), "lm_head": (512, 64)}
    tensors = write_adapter(tmp_path, modules)
    del tensors[f"{WRAPPER}model.layers.1.self_attn.q_proj.lora_A.weight"]
    tensors[f"{WRAPPER}model.layers.2.self_attn.q_proj.lora_A.weight"] = np.zeros((4, 64), np.int8)
    tensors[f"{WRAPPER}model.layers.3.self_attn.q_proj.lora_B.weight"] = np.zeros((65, 4), np.float32)
    write(tmp_path, tensors, target_modules=["q_proj", "v_proj"], base_model_name_or_path="org/other")
    error = refusal(tmp_path, LLAMA)
    for pinned in (
        f"{tmp_path}, made for org/other … (LlamaForCausalLM, 4 layers)",
        "lm_head.lora_A.weight",
        "layers.7.self_attn.q_proj.lora_A.weight",
        "layers.1.self_attn.q_proj.lora_B.weight",
        "layers.2.self_attn.q_proj.lora_A.weight (I8)",
        "layers.3.self_attn.q_proj.lora_B.weight is [65, 4], not [64, 4]",
        "without tensors … model.layers.0.self_attn.v_proj",
    ):
        assert says(error, pinned), pinned


def test_an_error_shows_forty_names_of_a_kind(tmp_path: Path) -> None:
    write_adapter(tmp_path, {f"model.layers.{i}.self_attn.q_proj": (64, 64) for i in range(4, 34)})
    assert says(refusal(tmp_path, LLAMA), "layers.29.self_attn.q_proj.lora_B.weight and 20 more")


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    write_adapter(tmp_path, Q)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    assert says(
        refusal(tmp_path, LLAMA),
        "no adapter_model.safetensors … adapter_model.bin … pickle … convert it to safetensors",
    )


def test_an_adapter_without_tensors_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {})
    assert says(refusal(tmp_path, LLAMA), "adapter_model.safetensors holds no tensors")


@pytest.mark.parametrize("kind", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_factors_of_any_float_type_are_read_as_float32(kind: Any, tmp_path: Path) -> None:
    tensors = write_adapter(tmp_path, Q)
    write(tmp_path, {name: array.astype(kind) for name, array in tensors.items()})
    factors = opened(tmp_path, LLAMA).factors()[".layers[2].qkv"]
    a, b = (
        tensors[f"{WRAPPER}model.layers.2.self_attn.q_proj.lora_{x}.weight"].astype(kind).astype(np.float32)
        for x in "AB"
    )
    assert factors.a[1:] == factors.b[1:] == (None, None)
    assert factors.a[0].dtype == factors.b[0].dtype == np.float32
    np.testing.assert_array_equal(factors.a[0], a)
    np.testing.assert_array_equal(factors.b[0], b * np.float32(2))


def test_an_infinite_value_is_refused_by_its_tensor(tmp_path: Path) -> None:
    tensors = write_adapter(tmp_path, Q)
    name = f"{WRAPPER}model.layers.2.self_attn.q_proj.lora_B.weight"
    tensors[name][5, 1] = np.inf
    write(tmp_path, tensors)
    assert opened(tmp_path, LLAMA).num_matrices == 4  # values are not read yet
    assert says(refusal(tmp_path, LLAMA), f"{tmp_path}: {name} … infinite")


def test_a_changed_file_has_another_fingerprint(tmp_path: Path) -> None:
    write_adapter(tmp_path / "one", Q)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    first = opened(tmp_path / "one", LLAMA).fingerprint
    assert opened(tmp_path / "one", LLAMA).fingerprint == first
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        file = tmp_path / "one" / name
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
        changed = opened(tmp_path / "one", LLAMA).fingerprint
        assert changed != first
        first = changed


def test_an_adapter_changes_the_target_alone(tmp_path: Path) -> None:
    """A draft in the target's layout has modules of the same names."""
    write_adapter(tmp_path, Q)
    drafting = dataclasses.replace(LLAMA, draft=DraftConfig("standalone", LLAMA))
    assert list(opened(tmp_path, drafting).factors()) == [f".layers[{i}].qkv" for i in range(4)]


@pytest.mark.parametrize("pattern", [r"([\w.]+)+!", r"(a|a)*b", r".*.*.*.*.*.*.*q", "q" * 5000, r"(x){2,}"])
def test_an_expression_that_could_take_forever_is_refused(pattern: str, tmp_path: Path) -> None:
    write_adapter(tmp_path, {"model.layers.0.self_attn.q_proj": (64, 64)}, target_modules=pattern)
    assert says(refusal(tmp_path, config_of("llama")), "target_modules … at most 6 of * and +")


def test_values_that_overflow_products_are_refused(tmp_path: Path) -> None:
    tensors = write_adapter(tmp_path, {"model.layers.0.self_attn.q_proj": (64, 64)})
    name = f"{WRAPPER}model.layers.0.self_attn.q_proj.lora_B.weight"
    for value in (3e38, 1e5, np.nan, -np.inf):
        tensors[name][0, 0] = value
        write(tmp_path, tensors, target_modules=["model.layers.0.self_attn.q_proj"])
        assert says(refusal(tmp_path, config_of("llama")), f"{name} … above 10000 … damaged")
