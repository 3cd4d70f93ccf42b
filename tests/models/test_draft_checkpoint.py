"""Draft models of every layout are described as their files mean them, read whole, or refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints import DATA, random_tensors, random_values, with_mtp_layer
from messages import says
from sgl_jax.models.checkpoint import Checkpoint, open_checkpoint
from sgl_jax.models.decoder_config import DecoderConfig, DraftConfig
from sgl_jax.models.draft_checkpoint import describe, draft_config, draft_names
from sgl_jax.models.families import decoder_config
from sgl_jax.models.loader import load_weights, random_weights
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.plan import plan_weights
from sgl_jax.models.stored import StoredTensor
from sgl_jax.models.weights import Weights, declare
from sgl_jax.settings.speculation import Algorithm

EAGLE = DATA / "eagle"
IDS = "eagle_aux_hidden_state_layer_ids"
D, V, F, HEADS, KV_HEADS, SMALL = 64, 512, 96, 4, 2, 40  # sizes of made-up heads; SMALL is a reduced vocabulary

LAYERS = {
    "hidden_size": D,
    "intermediate_size": F,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": 1,
    "vocab_size": V,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32,
}
CLASSIC = LAYERS | {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}
SPECULATORS = {
    "architectures": ["Eagle3DraftModel"],
    "speculators_model_type": "eagle3",
    "transformer_layer_config": LAYERS | {"model_type": "llama"},
}


def layer(at: str, inputs: int = D, head_dim: int = 16) -> dict[str, np.ndarray]:
    """Random tensors of a layer of Llama, whose attention reads `inputs` values."""
    shapes = {
        "self_attn.q_proj.weight": (HEADS * head_dim, inputs),
        "self_attn.k_proj.weight": (KV_HEADS * head_dim, inputs),
        "self_attn.v_proj.weight": (KV_HEADS * head_dim, inputs),
        "self_attn.o_proj.weight": (D, HEADS * head_dim),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
    }
    return {at + name: tensor(name, *shape) for name, shape in shapes.items()}


def tensor(name: str, *shape: int) -> np.ndarray:
    return random_values(name, shape).astype(np.float32)


def eagle3(at: str = "midlayer.", states: int = 3, size: int = V, **kwargs: int) -> dict[str, np.ndarray]:
    tensors = layer(at, 2 * D, **kwargs) | {
        f"{at}hidden_norm.weight": tensor("hidden_norm", D),
        "fc.weight": tensor("fc", D, states * D),
        "norm.weight": tensor("norm", D),
        "lm_head.weight": tensor("lm_head", size, D),
    }
    ids = np.arange(size) * 3 + 1
    table = np.isin(np.arange(V), ids)
    return tensors if size == V else tensors | {"d2t": ids - np.arange(size), "t2d": table}


def eagle1(*others: str) -> dict[str, np.ndarray]:
    tensors = layer("layers.0.") | {"fc.weight": tensor("fc", D, 2 * D)}
    del tensors["layers.0.input_layernorm.weight"]
    return tensors | {name: tensor(name, *((D,) if name == "fc.bias" else (V, D))) for name in others}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Mapping[str, Any], Mapping[str, np.ndarray]], Checkpoint]:
    def written(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Checkpoint:
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(dict(tensors), tmp_path / "model.safetensors")
        return open_checkpoint(str(tmp_path))

    return written


@pytest.fixture(scope="module")
def llama(checkpoint: Callable[[str], Path]) -> Checkpoint:
    return open_checkpoint(str(checkpoint("llama")))


@pytest.fixture(scope="module")
def target(llama: Checkpoint) -> DecoderConfig:
    """A model of 12 layers, as wide as the heads here."""
    return dataclasses.replace(decoder_config(llama.config), num_layers=12)


def without(draft: DraftConfig) -> DraftConfig:
    """Leave the layers out, to compare the rest."""
    return dataclasses.replace(draft, decoder=None)


def planned(stored: Checkpoint, target: DecoderConfig, draft: DraftConfig) -> dict[str, np.ndarray]:
    """Read the draft's weights, by path, without a target's."""
    config = dataclasses.replace(target, draft=draft)
    leaves = plan_weights(stored.tensors, config, draft_names(config), source=str(stored.path), of_draft=True)
    return {leaf.path.removeprefix(".draft"): np.concatenate([p.read() for p in leaf.pieces]) for leaf in leaves}


# --- layouts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "algorithm", "expected", "theta"),
    [
        ("eagle1-llama", "EAGLE", {"own_embed": True, "fc_bias": True}, 1e4),
        ("eagle1-llama-nobias", "EAGLE", {}, 5e5),
        ("eagle3-llama", "EAGLE3", {"target_layers": (2, 4, 6), "own_head": True, "is_reduced": True}, 1e4),
        ("eagle3-llama-fullvocab", "EAGLE3", {"target_layers": (2, 4, 6), "own_head": True}, 5e5),
        (
            "eagle3-qwen3",
            "EAGLE3",
            {"target_layers": (2, 4, 5), "own_head": True, "own_embed": True, "is_reduced": True},
            1e6,
        ),
    ],
)
def test_the_oracles_heads(name: str, algorithm: Algorithm, expected: dict[str, Any], theta: float) -> None:
    folder = EAGLE / name
    of_target = decoder_config(json.loads((folder / "target" / "config.json").read_text()))
    stored = open_checkpoint(str(folder / "draft"))
    draft = draft_config(stored, of_target, algorithm)
    kind = "eagle3" if algorithm == "EAGLE3" else "eagle"
    assert without(draft) == DraftConfig(kind, None, **expected)
    layers = json.loads((folder / "oracle.json").read_text())["aux_layers"]
    assert draft.target_layers == tuple(layers["inputs_of_layers"] if layers else ())
    own, head_dim = draft.decoder, 32 if name == "eagle3-qwen3" else 16
    assert (own.num_layers, own.hidden_size, own.intermediate_size) == (1, 64, 128)
    assert (own.num_heads, own.num_kv_heads, own.head_dim, own.rms_norm_eps) == (4, 2, head_dim, 1e-5)
    assert own.rope.inv_freq == pytest.approx([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)])
    assert own.vocab_size == (320 if draft.is_reduced else 512)

    raw = {key: value.astype(np.float32) for key, value in load_file(folder / "draft" / "model.safetensors").items()}
    at = "midlayer." if kind == "eagle3" else "layers.0."
    read = planned(stored, of_target, draft)
    assert len(read) == len(jax.tree.leaves(declare(dataclasses.replace(of_target, draft=draft), "float32").draft))
    joined = {
        ".layers[0].qkv": [f"{at}self_attn.{x}_proj.weight" for x in "qkv"],
        ".layers[0].gate_up": [f"{at}mlp.gate_proj.weight", f"{at}mlp.up_proj.weight"],
    }
    alone = {
        ".embed": "embed_tokens.weight",
        ".fc": "fc.weight",
        ".fc_bias": "fc.bias",
        ".feature_norm": f"{at}hidden_norm.weight",
        ".layers[0].attn_norm": f"{at}input_layernorm.weight",
        ".layers[0].o": f"{at}self_attn.o_proj.weight",
        ".layers[0].mlp_norm": f"{at}post_attention_layernorm.weight",
        ".layers[0].down": f"{at}mlp.down_proj.weight",
        ".final_norm": "norm.weight",
        ".lm_head": "lm_head.weight",
        ".d2t": "d2t",
    }
    for path, values in read.items():
        names = joined.get(path) or [alone[path]]
        np.testing.assert_array_equal(values, np.concatenate([raw[name] for name in names]), err_msg=path)


@pytest.mark.parametrize(
    ("config", "at"),
    [(CLASSIC, "midlayer."), (CLASSIC, "layers.0."), (CLASSIC, "model.layers.0."), (SPECULATORS, "layers.0.")],
    ids=["SafeAILab", "numbered", "inside model", "speculators"],
)
def test_layouts_differ_in_names_and_in_the_default_residual(write, target, config, at: str) -> None:
    stored = write(config | {"draft_vocab_size": SMALL}, eagle3(at, size=SMALL))
    draft = draft_config(stored, target, "EAGLE3")
    assert draft.norm_before_residual == (config is SPECULATORS)
    assert without(dataclasses.replace(draft, norm_before_residual=False)) == DraftConfig(
        "eagle3", None, target_layers=(2, 6, 9), own_head=True, is_reduced=True
    )
    assert draft.decoder.context_length == target.context_length  # not the draft's 32
    read = planned(stored, target, draft)
    expected = eagle3(size=SMALL)
    np.testing.assert_array_equal(read[".layers[0].o"], expected["midlayer.self_attn.o_proj.weight"])
    np.testing.assert_array_equal(read[".feature_norm"], expected["midlayer.hidden_norm.weight"])
    np.testing.assert_array_equal(read[".d2t"] + np.arange(SMALL), np.arange(SMALL) * 3 + 1)


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, (2, 6, 9)),
        ({"eagle_config": {IDS: [1, 5, 8]}}, (2, 6, 9)),  # outputs
        ({"eagle_config": {IDS: [0, 3, 10]}}, (1, 4, 11)),
        ({IDS: [1, 5, 8]}, (1, 5, 8)),  # inputs
        ({"eagle_config": {IDS: [2, 6, 9]}}, (2, 6, 9)),  # the default, in the terms of the other layouts
        ({"eagle_config": {IDS: [4, 8, 12]}}, (4, 8, 12)),  # the last layer, 11, has no output 12
        ({IDS: [2, 6, 12]}, (2, 6, 12)),
        ({"eagle_config": {"use_aux_hidden_state": True}, IDS: None}, (2, 6, 9)),
        ({"num_aux_hidden_states": 3}, (2, 6, 9)),
    ],
    ids=str,
)
def test_layer_ids_are_outputs_in_eagle_config_and_inputs_at_the_top(write, target, changes, layers) -> None:
    assert draft_config(write(CLASSIC | changes, eagle3()), target, "EAGLE3").target_layers == layers


NORMS = {"norm_before_fc": True}
AUX = {f"aux_norm_{name}.weight": D for name in ("low", "mid", "high")}


@pytest.mark.parametrize(
    ("changes", "tensors", "expected", "read"),
    [
        (NORMS, {"input_norm.weight": 3 * D}, NORMS, {".fc_norm": "input_norm.weight"}),
        ({"eagle_config": NORMS}, {"input_norm.weight": 3 * D}, NORMS, {".fc_norm": "input_norm.weight"}),
        (
            {"fc_norm": True},
            {f"fc_norm.{i}.weight": D for i in range(3)},
            {"fc_norms": True},
            {".fc_norms[2]": "fc_norm.2.weight"},
        ),
        ({"use_aux_norm": True}, AUX, {"fc_norms": True}, {".fc_norms[2]": "aux_norm_high.weight"}),
        ({"norm_output": True}, {}, {"recycles_normed": True}, {}),
        ({"norm_before_residual": True}, {}, {"norm_before_residual": True}, {}),
        ({"bias": True}, {"fc.bias": D}, {"fc_bias": True}, {".fc_bias": "fc.bias"}),
        ({}, {"fc.bias": D}, {"fc_bias": True}, {".fc_bias": "fc.bias"}),
    ],
    ids=str,
)
def test_switches_of_eagle3(write, target, changes, tensors, expected, read: dict[str, str]) -> None:
    stored = write(CLASSIC | changes, eagle3() | {name: tensor(name, size) for name, size in tensors.items()})
    draft = draft_config(stored, target, "EAGLE3")
    usual = DraftConfig("eagle3", None, target_layers=(2, 6, 9), own_head=True)
    assert without(draft) == dataclasses.replace(usual, **expected)
    found = planned(stored, target, draft)
    for path, name in read.items():
        np.testing.assert_array_equal(found[path], tensor(name, tensors[name]))


def test_other_numbers_of_states(write, target) -> None:
    stored = write(CLASSIC | {IDS: [2, 4, 6, 8]}, eagle3(states=4))
    draft = draft_config(stored, target, "EAGLE3")
    assert draft.num_features == 4
    assert planned(stored, target, draft)[".fc"].shape == (D, 4 * D)


def test_a_head_on_the_final_output_has_no_fc(write, target) -> None:
    tensors = eagle3()
    del tensors["fc.weight"]
    stored = write(CLASSIC | {"eagle_config": {"use_aux_hidden_state": False, IDS: []}}, tensors)
    draft = draft_config(stored, target, "EAGLE3")
    assert draft.target_layers == ()
    assert ".fc" not in planned(stored, target, draft)


@pytest.mark.parametrize("norm", ["input_layernorm", "hidden_norm"])
def test_further_layers_read_the_width_once(write, target, norm: str) -> None:
    """SGLang stores a norm in input_layernorm, too, that it does not use."""
    second = layer("layers.1.") | {f"layers.1.{norm}.weight": tensor("second", D)}
    stored = write(CLASSIC | {"num_hidden_layers": 2}, eagle3() | second)
    read = planned(stored, target, draft_config(stored, target, "EAGLE3"))
    assert (read[".layers[0].qkv"].shape, read[".layers[1].qkv"].shape) == ((128, 2 * D), (128, D))
    np.testing.assert_array_equal(read[".layers[1].attn_norm"], tensor("second", D))


def test_a_head_of_speculators_with_layers_of_qwen3(write, target) -> None:
    layers = LAYERS | {
        "model_type": "qwen3",
        "head_dim": 32,
        "eos_token_id": 151645,  # beyond the vocabulary: the target ends texts
        "rope_scaling": {"rope_type": "mrope", "mrope_section": [4, 4, 8]},
        "rope_theta": 1e6,
    }
    norms = {f"layers.0.self_attn.{x}_norm.weight": tensor(x, 32) for x in "qk"}
    stored = write(SPECULATORS | {"transformer_layer_config": layers}, eagle3("layers.0.", head_dim=32) | norms)
    draft = draft_config(stored, target, "EAGLE3")
    assert (draft.decoder.qk_norm, draft.decoder.head_dim, draft.decoder.eos_token_ids) == (True, 32, ())
    assert draft.decoder.rope.inv_freq[1] == pytest.approx(1e6 ** (-1 / 16))
    np.testing.assert_array_equal(
        planned(stored, target, draft)[".layers[0].k_norm"], norms["layers.0.self_attn.k_norm.weight"]
    )


@pytest.mark.parametrize(
    ("changes", "tensors", "size", "own_head"),
    [
        ({"draft_vocab_size": None}, eagle3(), V, True),
        ({"draft_vocab_size": V}, eagle3() | {"d2t": np.zeros(V, np.int64), "t2d": np.ones(V, bool)}, V, True),
        ({}, {name: value for name, value in eagle3().items() if name != "lm_head.weight"}, V, False),
        ({}, eagle3(size=SMALL), SMALL, True),
        ({}, eagle3(size=SMALL) | {"d2t": eagle3(size=SMALL)["d2t"].astype(np.int32)}, SMALL, True),
        ({"tie_word_embeddings": True}, eagle3(), V, True),  # copied from the target's config
    ],
    ids=range(6),
)
def test_the_draft_vocabulary(write, target, changes, tensors, size: int, own_head: bool) -> None:
    stored = write(CLASSIC | changes, tensors)
    draft = draft_config(stored, target, "EAGLE3")
    assert (draft.decoder.vocab_size, draft.is_reduced, draft.own_head) == (size, size < V, own_head)
    assert (".lm_head" in planned(stored, target, draft)) == own_head
    assert not draft.decoder.tie_embeddings


def test_a_head_without_a_matrix_takes_the_tied_one_of_its_target(write, target) -> None:
    tensors = {name: value for name, value in eagle3().items() if name != "lm_head.weight"}
    stored = write(CLASSIC | {"tie_word_embeddings": True}, tensors)
    tied = dataclasses.replace(target, tie_embeddings=True)
    assert not draft_config(stored, tied, "EAGLE3").own_head


def test_a_head_narrower_than_its_target_has_its_own_embedding(write, target) -> None:
    wide = dataclasses.replace(target, hidden_size=96)
    tensors = eagle3() | {"fc.weight": tensor("fc", D, 3 * 96)}
    stored = write(CLASSIC | {"target_hidden_size": 96}, tensors | {"embed_tokens.weight": tensor("embed", V, D)})
    assert planned(stored, wide, draft_config(stored, wide, "EAGLE3"))[".embed"].shape == (V, D)
    stored = write(CLASSIC, tensors)
    with pytest.raises(ModelError, match=r"missing tensors: embed_tokens\.weight$"):
        planned(stored, wide, draft_config(stored, wide, "EAGLE3"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_copy_of_the_targets_embedding_is_not_held_twice(write, llama: Checkpoint, dtype: str) -> None:
    config, name = decoder_config(llama.config), "model.embed_tokens.weight"
    of_target = {name: llama.tensors[name].rounded(dtype)}
    embed = of_target[name].read().astype(dtype)

    def described(stored: Mapping[str, StoredTensor] | None) -> DraftConfig:
        head = write(CLASSIC | {IDS: [0, 1, 4]}, eagle3() | {"embed_tokens.weight": embed})
        draft = draft_config(head, config, "EAGLE3", stored=stored)
        assert (".embed" in planned(head, config, draft)) == draft.own_embed
        return draft

    assert not described(of_target).own_embed
    assert described(None).own_embed  # the target's is not at hand
    embed[-1, -1] += 1
    assert described(of_target).own_embed


def test_norms_of_queries_make_layers_those_of_qwen3(write, target) -> None:
    norms = {f"midlayer.self_attn.{x}_norm.weight": tensor(x, 16) for x in "qk"}
    stored = write(CLASSIC | {"head_dim": 16}, eagle3() | norms)
    draft = draft_config(stored, target, "EAGLE3")
    np.testing.assert_array_equal(planned(stored, target, draft)[".layers[0].q_norm"], tensor("q", 16))


def test_biases_of_attention_are_those_stored(write, target) -> None:
    biases = {f"layers.0.self_attn.{x}_proj.bias": tensor(x, n) for x, n in (("q", 64), ("k", 32), ("v", 32))}
    stored = write(LAYERS | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, eagle1("fc.bias") | biases)
    draft = draft_config(stored, target, "EAGLE")
    assert without(draft) == DraftConfig("eagle", None, fc_bias=True)
    np.testing.assert_array_equal(
        planned(stored, target, draft)[".layers[0].qkv_bias"], np.concatenate([*biases.values()])
    )


def test_eagle1_has_a_bias_where_there_is_one(write, target) -> None:
    assert not draft_config(write(LAYERS, eagle1()), target, "EAGLE").fc_bias
    assert draft_config(write(LAYERS, eagle1("fc.bias")), target, "EAGLE").fc_bias


# --- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "config", "tensors", "message"),
    [
        ("EAGLE", CLASSIC, eagle3(), "--speculative-algorithm … EAGLE … EAGLE3"),
        ("EAGLE3", LAYERS, eagle1(), "--speculative-algorithm … EAGLE3 … EAGLE"),
        ("EAGLE3", LAYERS, layer("model.layers.0."), "--speculative-algorithm … EAGLE3 … fc.weight"),
        ("EAGLE3", SPECULATORS | {"speculators_model_type": "peagle"}, eagle3(), "peagle"),
        ("EAGLE3", SPECULATORS | {"speculators_model_type": "mtp"}, eagle3(), "speculators_model_type 'mtp'"),
        ("EAGLE3", CLASSIC | {"architectures": ["DFlashDraftModel"]}, eagle3(), "DFlashDraftModel"),
        ("EAGLE3", CLASSIC | {"architectures": ["Qwen3DSparkModel"]}, eagle3(), "Qwen3DSparkModel"),
        ("EAGLE", LAYERS | {"medusa_num_heads": 4}, eagle1(), "medusa_num_heads"),
        ("EAGLE3", CLASSIC | {"mask_token_id": 7}, eagle3(), "mask_token_id"),
        ("EAGLE3", CLASSIC | {"vocab_size": 500}, eagle3(), "vocab_size … 500 … 512"),
        ("EAGLE3", CLASSIC | {"draft_vocab_size": 600}, eagle3(), "draft_vocab_size … 600 … 512"),
        ("EAGLE3", CLASSIC | {"draft_vocab_size": "many"}, eagle3(), "draft_vocab_size"),
        ("EAGLE3", CLASSIC | {"draft_vocab_size": 50}, eagle3(size=SMALL), "d2t … [40] … draft_vocab_size=50"),
        ("EAGLE3", CLASSIC, eagle3(size=SMALL) | {"d2t": np.arange(SMALL) * -1}, "d2t … draft id 1 … id 0 … 511"),
        ("EAGLE3", CLASSIC, eagle3(size=SMALL) | {"d2t": np.arange(SMALL) * 13}, "d2t … draft id 39 … id 546 … 511"),
        ("EAGLE3", CLASSIC, eagle3(size=SMALL) | {"d2t": np.full(SMALL, -1)}, "d2t … draft id 0 … id -1"),
        ("EAGLE3", CLASSIC, eagle3(size=SMALL) | {"d2t": np.zeros(SMALL, np.float32)}, "d2t … F32 … I64"),
        ("EAGLE3", CLASSIC, eagle3(size=SMALL) | {"t2d": np.ones(V, bool)}, "t2d … [512] … 512 … 40"),
        ("EAGLE3", CLASSIC, eagle3(size=SMALL) | {"t2d": np.ones(300, bool)}, "t2d … [300] … 512 … 40"),
        ("EAGLE3", CLASSIC | {"target_hidden_size": 128}, eagle3(), "hidden_size 128 … 64"),
        ("EAGLE3", CLASSIC, eagle3(states=4), "fc.weight … [64, 256] … 3 … 64 … [64, 192]"),
        ("EAGLE", LAYERS | {"hidden_size": 32}, eagle1(), "hidden_size 32 … 64"),
        ("EAGLE3", CLASSIC | {"eagle_config": {IDS: [1, 5, 13]}}, eagle3(), f"{IDS} … 13 … layers 0 to 11"),
        ("EAGLE3", CLASSIC | {IDS: [-1, 5, 8]}, eagle3(), f"{IDS} … -1 … layers 0 to 11"),
        ("EAGLE3", CLASSIC | {"num_aux_hidden_states": 4}, eagle3(), f"num_aux_hidden_states … 4 … {IDS} … 3"),
        ("EAGLE3", CLASSIC | {"eagle_config": [1]}, eagle3(), "config.json … no draft model"),
        ("EAGLE3", CLASSIC | {"quantization_config": {"quant_method": "fp8"}}, eagle3(), "fp8"),
        (
            "EAGLE3",
            CLASSIC | {"tie_word_embeddings": True},
            {name: value for name, value in eagle3().items() if name != "lm_head.weight"},
            "tie_word_embeddings=True … lm_head.weight",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(write, target, algorithm, config, tensors, message: str) -> None:
    stored = write(config, tensors)
    with pytest.raises(ModelError) as caught:
        draft_config(stored, target, algorithm)
    assert says(str(caught.value), f"{stored.path} … {message}"), caught.value


def test_one_error_lists_the_misfits_of_a_draft_folder(write, target) -> None:
    tensors = eagle3() | {"lm_head.weight": tensor("lm_head", 99, D), "input_norm.weight": tensor("x", D)}
    del tensors["midlayer.mlp.up_proj.weight"]
    stored = write(CLASSIC, tensors)
    with pytest.raises(ModelError) as caught:
        planned(stored, target, draft_config(stored, target, "EAGLE3"))
    message = str(caught.value)
    assert says(message, f"{stored.path} … LlamaForCausalLMEagle3")
    assert says(message, "missing … layers.0.mlp.up_proj.weight")
    assert says(message, "no place … input_norm.weight")
    assert says(message, "shape … lm_head.weight … [99, 64] … [512, 64]")


def test_a_folder_of_pickled_weights_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LAYERS))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*safetensors"):
        open_checkpoint(str(tmp_path))


# --- loading --------------------------------------------------------------------------------------------------------------


def test_target_and_head_are_loaded_together(write, llama: Checkpoint) -> None:
    config = decoder_config(llama.config)
    stored = write(CLASSIC | {IDS: [0, 1, 4]}, eagle3(size=SMALL))
    config = dataclasses.replace(config, draft=draft_config(stored, config, "EAGLE3"))
    reports: list[tuple[float, int]] = []
    weights = load_weights(llama, config, "bfloat16", draft=stored, report=lambda *report: reports.append(report))
    assert_filled(weights, config, "bfloat16")
    assert reports[-1] == (1.0, llama.total_bytes + stored.total_bytes)
    assert weights.draft is not None
    np.testing.assert_array_equal(weights.draft.d2t, eagle3(size=SMALL)["d2t"])
    np.testing.assert_array_equal(weights.draft.fc, eagle3()["fc.weight"].astype(weights.draft.fc.dtype))


def assert_filled(weights: Weights, config: DecoderConfig, dtype: str) -> None:
    declared = declare(config, dtype)
    assert jax.tree.map(lambda x: (x.shape, x.dtype.name), weights) == jax.tree.map(
        lambda spec: (spec.shape, spec.dtype), declared
    )


def test_random_weights_have_a_draft(llama: Checkpoint) -> None:
    config = decoder_config(llama.config)
    changes = {"draft_vocab_size": SMALL, "fc_norm": True, IDS: [1, 2, 3]}
    dummy = dataclasses.replace(llama, format="dummy", config=llama.config | CLASSIC | changes, tensors={})
    config = dataclasses.replace(config, draft=draft_config(dummy, config, "EAGLE3"))
    weights = random_weights(config, "float32")
    assert_filled(weights, config, "float32")
    assert weights.draft is not None
    assert not np.asarray(weights.draft.d2t).any()
    assert all((np.asarray(norm) == 1).all() for norm in weights.draft.fc_norms)
    plain = dataclasses.replace(dummy, config=llama.config)
    assert draft_config(plain, config, "EAGLE3").own_head
    assert draft_config(plain, config, "EAGLE") == dataclasses.replace(
        draft_config(plain, config, "EAGLE3"), kind="eagle", target_layers=(), own_head=False, fc_bias=True
    )


BAILING = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    **LAYERS,
    "num_hidden_layers": 2,
    "use_bias": False,
    "use_qk_norm": True,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
BAILING_SHAPES = {
    "lm_head.weight": [V, D],
    "model.word_embeddings.weight": [V, D],
    "model.norm.weight": [D],
    "model.layers.{0,1}.input_layernorm.weight": [D],
    "model.layers.{0,1}.post_attention_layernorm.weight": [D],
    "model.layers.{0,1}.attention.query_key_value.weight": [128, D],
    "model.layers.{0,1}.attention.query_layernorm.weight": [16],
    "model.layers.{0,1}.attention.key_layernorm.weight": [16],
    "model.layers.{0,1}.attention.dense.weight": [D, 64],
    "model.layers.0.mlp.{gate,up}_proj.weight": [F, D],
    "model.layers.0.mlp.down_proj.weight": [D, F],
    "model.layers.1.mlp.gate.weight": [4, D],
    "model.layers.1.mlp.gate.expert_bias": [4],
    "model.layers.1.mlp.experts.{0,1,2,3}.{gate,up}_proj.weight": [24, D],
    "model.layers.1.mlp.experts.{0,1,2,3}.down_proj.weight": [D, 24],
    "model.layers.1.mlp.shared_experts.{gate,up}_proj.weight": [24, D],
    "model.layers.1.mlp.shared_experts.down_proj.weight": [D, 24],
}


@pytest.fixture(params=["deepseek_v3", "glm4_moe", "bailing"])
def with_mtp(request: pytest.FixtureRequest, checkpoint) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and tensors of a model with an MTP layer."""
    if request.param == "bailing":
        config = BAILING
        table = {name: {"shape": shape, "mean": 0.0, "std": 1.0} for name, shape in BAILING_SHAPES.items()}
        tensors = random_tensors("bailing", table)
    else:
        folder = checkpoint(request.param)
        config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    return with_mtp_layer(config, tensors)


def test_an_mtp_layer_is_read_like_a_layer_more(write, with_mtp) -> None:
    hf, tensors = with_mtp
    config = decoder_config(hf)
    draft = draft_config(None, config, "NEXTN")
    assert without(draft) == DraftConfig("mtp", None, recycles_normed=True)
    assert (draft.decoder.num_layers, draft.decoder.moe_layers) == (1, (True,))
    weights = load_weights(write(hf, tensors), dataclasses.replace(config, draft=draft), "float32")
    assert_filled(weights, dataclasses.replace(config, draft=draft), "float32")
    mtp, at = weights.draft, f"model.layers.{config.num_layers}."
    assert mtp is not None
    assert mtp.embed is None
    assert mtp.lm_head is None
    outside = {"fc": "eh_proj", "embed_norm": "enorm", "feature_norm": "hnorm"}
    for field, name in outside.items():
        np.testing.assert_array_equal(getattr(mtp, field), tensors[f"{at}{name}.weight"])
    norm = tensors.get(f"{at}final_layernorm.weight", tensors.get(f"{at}shared_head.norm.weight"))
    np.testing.assert_array_equal(mtp.final_norm, norm)

    joins = ("norm", "eh_proj", "embed_tokens", "shared_head")
    plain = {
        name: value
        for name, value in tensors.items()
        if not name.startswith(at) or not name.removeprefix(at).startswith(("enorm", "hnorm", "final_", *joins))
    }
    deeper = hf | {"num_hidden_layers": config.num_layers + 1, "num_nextn_predict_layers": 0}
    longer = load_weights(write(deeper, plain), decoder_config(deeper), "float32")
    jax.tree.map(np.testing.assert_array_equal, mtp.layers[0], longer.layers[-1])


def test_a_missing_mtp_layer_is_named(write, with_mtp) -> None:
    hf, tensors = with_mtp
    config = decoder_config(hf)
    config = dataclasses.replace(config, draft=draft_config(None, config, "NEXTN"))
    name = f"model.layers.{config.num_layers}.eh_proj.weight"
    stored = write(hf, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(ModelError) as caught:
        load_weights(stored, config, "float32")
    assert says(str(caught.value), f"MTP layer … {stored.path} … missing … {name}")
    with pytest.raises(ModelError) as caught:
        draft_config(None, decoder_config(hf | {"num_nextn_predict_layers": 0}), "NEXTN")
    assert says(str(caught.value), "--speculative-algorithm NEXTN … num_nextn_predict_layers")


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_whole_model_drafts_for_one_with_the_same_vocabulary(checkpoint, llama: Checkpoint, name: str) -> None:
    small = open_checkpoint(str(checkpoint(name)))
    config = decoder_config(llama.config)
    draft = draft_config(small, config, "STANDALONE")
    assert without(draft) == DraftConfig("standalone", None, own_embed=True, own_head=name == "llama")
    weights = load_weights(llama, dataclasses.replace(config, draft=draft), "float32", draft=small)
    alone = load_weights(small, draft.decoder, "float32")
    assert weights.draft is not None
    jax.tree.map(np.testing.assert_array_equal, weights.draft.layers, alone.layers)
    np.testing.assert_array_equal(weights.draft.embed, alone.embed)
    with pytest.raises(ModelError) as caught:
        draft_config(small, dataclasses.replace(config, vocab_size=600), "STANDALONE")
    assert says(str(caught.value), f"{small.path} … vocab_size … 512 … 600")


def test_the_log_names_the_layers(write, target) -> None:
    draft = draft_config(write(CLASSIC, eagle3(size=SMALL)), target, "EAGLE3")
    line = "EAGLE-3 head (LlamaForCausalLMEagle3) with 1 layer and 40 token ids, from the target's "
    assert describe(draft) == line + "inputs of layers 2, 6, 9 (outputs of 1, 5, 8)"
    assert describe(dataclasses.replace(draft, target_layers=())) == line + "output after its final norm"
    assert describe(draft_config(None, dataclasses.replace(target, num_mtp_layers=1), "NEXTN")).startswith(
        "MTP layer (Llama"
    )
