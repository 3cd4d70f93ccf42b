"""Recompute tests/data/oracle/*/oracle.json with Hugging Face transformers.

It needs packages that the project does not, in an environment of their own; README.md beside this file has the command.
Prompts are drawn at random until no choice of a token is a near tie, so that float32 in any order of summation agrees.
`sensitivity` says how far log-probabilities move when an engine makes a certain mistake: the goldens would show it.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent
sys.path.insert(0, str(DATA.parent))

from checkpoints import write_checkpoint  # noqa: E402

PROMPT_LENGTHS = (1, 7, 33, 70)
STEPS = 24
MIN_GAP = 0.02  # between the best log-probability and the second best
MIN_ORDER_GAP = 1e-3  # between neighbours among the six best
MIN_DISTINCT = 6  # tokens that an answer must have
FIRST_ID = 3  # below are special tokens

Tensors = dict[str, torch.Tensor]


def load(folder: Path) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def logprobs(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [len(ids), V] of what follows each token; every position is computed anew, without a cache."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)


def answer(model: torch.nn.Module, prompt: list[int]) -> dict[str, Any]:
    """One case of oracle.json."""
    ids = list(prompt)
    for _ in range(STEPS):
        ids.append(int(logprobs(model, ids)[-1].argmax()))
    rows = logprobs(model, ids)
    top = rows[len(prompt) - 1 : -1].topk(6)
    assert top.indices[:, 0].tolist() == ids[len(prompt) :]
    gaps = (top.values[:, :-1] - top.values[:, 1:]).tolist()
    top5 = zip(top.indices[:, :5].tolist(), top.values[:, :5].tolist(), strict=True)
    return {
        "name": f"len{len(prompt)}",
        "prompt_ids": prompt,
        "greedy_ids": ids[len(prompt) :],
        "top5": [[[i, round(v, 6)] for i, v in zip(*step, strict=True)] for step in top5],
        "gaps": [round(gap[0], 4) for gap in gaps],
        "min_gap": round(min(gap[0] for gap in gaps), 4),
        "min_order_gap": round(min(map(min, gaps)), 4),
        "prompt_logprobs": [None, *(round(float(rows[i, token]), 6) for i, token in enumerate(prompt[1:]))],
    }


def draw_case(model: torch.nn.Module, length: int, vocab_size: int) -> dict[str, Any]:
    """The first prompt of this length whose answer is decided clearly and does not repeat a few tokens."""
    rng = np.random.default_rng(length)
    best: dict[str, Any] = {}
    for _ in range(200):
        case = answer(model, rng.integers(FIRST_ID, vocab_size, length).tolist())
        clear = case["min_gap"] >= MIN_GAP and case["min_order_gap"] >= MIN_ORDER_GAP
        if clear and len(set(case["greedy_ids"])) >= MIN_DISTINCT:
            return case
        best = max(best, case, key=lambda tried: min(tried.get("min_gap", 0), 10 * tried.get("min_order_gap", 0)))
    raise SystemExit(f"no prompt of {length} tokens is answered clearly; the best: {best}")


def config_mistakes(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings that an engine could overlook, as changes of config.json."""
    values = {
        "rope_scaling": [None],
        "rope_theta": [4 * config["rope_theta"]],
        "rms_norm_eps": [1e-3],
        "sliding_window": [config.get("sliding_window") and config["sliding_window"] + 1, 4096],
        "norm_topk_prob": [not config.get("norm_topk_prob")],
        "routed_scaling_factor": [1.0],
        "num_experts_per_tok": [config.get("num_experts_per_tok", 2) - 1],
        "topk_group": [config.get("n_group")],
        "partial_rotary_factor": [] if "longrope" in str(config.get("rope_scaling")) else [1.0],  # its factors fit one
        "original_max_position_embeddings": [32],
        "rope_local_base_freq": [config["rope_theta"]],
        "attn_logit_softcapping": [1e9],
        "final_logit_softcapping": [1e9],
        "query_pre_attn_scalar": [4 * config.get("query_pre_attn_scalar", 1)],
        "swiglu_limit": [1e9],
        "embedding_multiplier": [1.0],
        "attention_multiplier": [config.get("head_dim", 1) ** -0.5],
        "residual_multiplier": [1.0],
        "logits_scaling": [1.0],
        "no_rope_layer_interval": [1000],
    }
    for key, changed in values.items():
        if config.get(key) and not (key == "sliding_window" and config.get("use_sliding_window") is False):
            yield from ((f"{key}: {value}", {key: value}) for value in changed if value != config[key])


TENSOR_MISTAKES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # by the end of a tensor's name
    "q_proj.bias": torch.zeros_like,
    "k_proj.bias": torch.zeros_like,
    "v_proj.bias": torch.zeros_like,
    "o_proj.bias": torch.zeros_like,
    "down_proj.bias": torch.zeros_like,
    "router.bias": torch.zeros_like,
    "e_score_correction_bias": torch.zeros_like,
    "shared_expert_gate.weight": torch.zeros_like,
    "sinks": lambda sinks: torch.full_like(sinks, -1e4),
    "q_norm.weight": lambda weight: torch.full_like(weight, float(weight.float().mean())),
    "kv_a_layernorm.weight": torch.ones_like,
    "mlp.gate.weight": lambda weight: weight.roll(1, 0),
    "mlp.router.weight": lambda weight: weight.roll(1, 0),
    "block_sparse_moe.gate.weight": lambda weight: weight.roll(1, 0),
}


def mistakes(folder: Path) -> Iterator[tuple[str, dict[str, Any], Tensors]]:
    """Name, config and tensors of each checkpoint that stands for a mistake."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    for name, changes in config_mistakes(config):
        yield name, config | changes, tensors
    for end, change in TENSOR_MISTAKES.items():
        if changed := {name: change(tensor) for name, tensor in tensors.items() if name.endswith(end)}:
            yield f"{end} changed", config, tensors | changed


def sensitivity(folder: Path, case: dict[str, Any]) -> dict[str, float]:
    """The largest change of a prompt's log-probabilities for each mistake."""
    found = {}
    for name, config, tensors in mistakes(folder):
        with tempfile.TemporaryDirectory() as changed:
            (Path(changed) / "config.json").write_text(json.dumps(config))
            save_file({n: t.clone() for n, t in tensors.items()}, f"{changed}/model.safetensors", {"format": "pt"})
            rows = logprobs(load(Path(changed)), case["prompt_ids"])
        moved = [abs(float(rows[i, t]) - case["prompt_logprobs"][i + 1]) for i, t in enumerate(case["prompt_ids"][1:])]
        found[name] = round(max(moved), 4)
    return found


def as_text(value: Any, depth: int = 0) -> str:
    """JSON with a line for each entry of a dictionary and each step of `top5`."""
    pad = " " * (depth + 1)
    if isinstance(value, dict):
        lines = [f"{pad}{json.dumps(key)}: {as_text(entry, depth + 1)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(lines) + "\n" + pad[1:] + "}"
    if isinstance(value, list) and value and isinstance(value[0], (dict, list)) and depth < 4:
        return "[\n" + ",\n".join(pad + as_text(entry, depth + 1) for entry in value) + "\n" + pad[1:] + "]"
    return json.dumps(value, ensure_ascii=False)


def recompute(folder: Path) -> None:
    stored = json.loads((folder / "oracle.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as place:
        checkpoint = Path(place) / folder.name
        write_checkpoint(folder.name, checkpoint)
        model = load(checkpoint)
        cases = [draw_case(model, length, model.config.vocab_size) for length in PROMPT_LENGTHS]
        reference = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "class": type(model).__name__,
        }
        oracle = {
            "architecture": json.loads((folder / "config.json").read_text())["architectures"][0],
            "reference": reference | {"dtype": "float32", "attention": "eager"},
            "notes": stored["notes"],
            "min_gap": min(case["min_gap"] for case in cases),
            "sensitivity": sensitivity(checkpoint, cases[-1]),
            "cases": cases,
        }
    (folder / "oracle.json").write_text(as_text(oracle) + "\n", encoding="utf-8")
    distinct = [len(set(case["greedy_ids"])) for case in cases]
    unseen = {name: moved for name, moved in oracle["sensitivity"].items() if moved < 0.01}
    print(folder.name, "min gap", oracle["min_gap"], "distinct", distinct, "unseen mistakes", unseen, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="folders of tests/data/oracle; all of them if none is named")
    names = parser.parse_args().names or sorted(folder.name for folder in (DATA / "oracle").iterdir())
    torch.set_num_threads(1)
    for name in names:
        recompute(DATA / "oracle" / name)


if __name__ == "__main__":
    main()
