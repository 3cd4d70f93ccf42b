"""LoRA adapters inside the engine against references: PEFT's outputs, alone, mixed, in chunks, behind prefixes, preempted, and
with drafts. A launch has fewer slots than adapters."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from exact import ALL_PROMPTS, GREEDY, Build, assert_oracle, assert_top5, with_empty_cache
from safetensors.numpy import load_file, save_file

from sgl_jax.engine.core import Core
from sgl_jax.engine.messages import TokenLogprobs
from sgl_jax.models.scaled import Scaled
from simulated import Answer, Client

LORA = Path(__file__).parents[1] / "data" / "lora"
BASES = ("llama", "qwen2", "qwen3", "gemma2", "qwen3_moe")


def adapters_of(base: str) -> list[str]:
    """Return the adapters that are not refused by name (tests/models/test_lora_files.py)."""
    return [each.parent.name for each in sorted((LORA / base).glob("*/oracle.json"))]


ADAPTERS = [(base, name) for base in BASES for name in adapters_of(base)]


@pytest.fixture(scope="module")
def start(build: Build, checkpoint: Callable[[str], Path]) -> Callable[..., Core]:
    """Start a core with all adapters of a base and two slots; without options each base is started once."""
    started: dict[str, Core] = {}

    def start(base: str, **options) -> Core:
        if options or base not in started:
            paths = tuple(f"{name}={LORA / base / name}" for name in adapters_of(base))
            launch = {"page_size": 4, "context_length": 256, "lora_paths": paths, "max_loras_per_batch": 2} | options
            core = build(checkpoint(f"lora-{base}"), ALL_PROMPTS, optimised=True, **launch)
            if options:
                return core
            started[base] = core
        return started[base]

    return start


def number(core: Core, name: str | None) -> int:
    """Return the number of an adapter's load."""
    return next((each.number for each in core.info.adapters if each.name == name), 0)


def mixed(base: str) -> list[dict]:
    return json.loads((LORA / base / "mixed.json").read_text())["cases"]


def ask(core: Core, case: dict, order: np.ndarray, first: int = 1, **params) -> dict[int, Answer]:
    """Send a mixed case's requests at once, in this order, and return the answers by their index in the case."""
    client = Client(core)
    for i in order:
        name = case["requests"][i]["adapter"]
        client.submit(first + int(i), case["prompt_ids"], adapter=number(core, name), max_tokens=12, **GREEDY | params)
    client.run()
    return {key - first: answer for key, answer in client.answers.items()}


@pytest.mark.parametrize(("base", "name"), ADAPTERS)
def test_an_adapter_gives_the_tokens_and_logprobs_of_the_reference(start, base: str, name: str) -> None:
    core = start(base)
    assert_oracle(core, LORA / base / name, number(core, name))


@pytest.mark.parametrize("base", BASES)
def test_adapters_and_the_model_share_batches_and_prefixes_are_their_own(start, base: str) -> None:
    core, rng = start(base), np.random.default_rng(0)
    for overlap in (True, False):
        fresh = with_empty_cache(core, overlap=overlap)
        for case in mixed(base):
            taken = [i for i, each in enumerate(case["requests"]) if each["adapter"] in (None, *adapters_of(base))]
            assert len(taken) > 2
            cached = 0
            for turn in range(2):  # the second finds the prefixes of the first
                answers = ask(fresh, case, rng.permutation(taken), 100 * turn + 1, logprobs=5)
                for i, answer in answers.items():
                    assert answer.tokens == case["requests"][i]["greedy_ids"]
                    assert_top5(answer.logprobs, case["requests"][i]["top5"])
                cached = sum(answer.prompt.num_cached_tokens for answer in answers.values() if answer.prompt)
            assert cached >= len(taken) * (len(case["prompt_ids"]) - 5)


@pytest.mark.parametrize(
    "options",
    [
        {"max_total_tokens": 256},  # one request fits for certain: rows are preempted
        {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 4},
        {"max_loras_per_batch": 8, "max_lora_rank": 40},
        {"attention_backend": "native"},
    ],
    ids=["preempted", "drafts", "all resident, wider rank", "native"],
)
def test_mixed_batches_are_the_same_in_every_setting(start, options: dict) -> None:
    core = start("llama", **options)
    for case in mixed("llama"):
        taken = [i for i, each in enumerate(case["requests"]) if each["adapter"] in (None, *adapters_of("llama"))]
        for i, answer in ask(core, case, np.array(taken)).items():
            assert answer.tokens == case["requests"][i]["greedy_ids"]
    assert core.runner.compiles_after_ready == 0
    if "max_total_tokens" in options:
        prompts = np.random.default_rng(1).integers(3, 500, (4, 60)).tolist()
        client = Client(core)
        for key, prompt in enumerate(prompts, 500):
            name = adapters_of("llama")[key % 2]
            client.submit(key, prompt, adapter=number(core, name), max_tokens=40, **GREEDY)
        client.run()
        assert core.scheduler.counters.preemptions > 0
        plain = start("llama")
        alone = Client(with_empty_cache(plain))
        for key, prompt in enumerate(prompts, 500):
            alone.submit(key, prompt, adapter=number(plain, adapters_of("llama")[key % 2]), max_tokens=40, **GREEDY)
            alone.run()
        assert client.tokens == alone.tokens


def test_requests_for_the_model_are_bit_identical_to_a_launch_without_adapters(start, build: Build, checkpoint) -> None:
    prompts = np.random.default_rng(0).integers(3, 500, (4, 20)).tolist()
    found: list[list[list[TokenLogprobs]]] = []
    for core in (
        start("llama"),
        build(checkpoint("lora-llama"), ALL_PROMPTS, optimised=True, page_size=4, context_length=256),
    ):
        client = Client(with_empty_cache(core))
        others = [each.number for each in core.info.adapters[:2]]
        for key, prompt in enumerate(prompts[:3], 1):
            client.submit(key, prompt, max_tokens=12, logprobs=5, **GREEDY)
        client.submit(9, prompts[3], adapter=others[0] if others else 0, max_tokens=12, **GREEDY)
        client.run()
        found.append([client.answers[key].logprobs for key in (1, 2, 3)])
    assert found[0] == found[1]


NOT_ADAPTED = (
    r"experts?[._]|shared_expert|mlp\.(gate|router)\.|block_sparse_moe|kv_b_proj|embed|lm_head|layers\.\d+\.mtp"
)


def write_random_adapter(model: Path, folder: Path) -> dict[str, np.ndarray]:
    """Write an adapter for all modules of a checkpoint that can have one. Return the checkpoint's tensors with it merged."""
    rng, tensors, merged = np.random.default_rng(0), {}, load_file(model / "model.safetensors")
    layers = "|".join(map(str, range(json.loads((model / "config.json").read_text())["num_hidden_layers"])))
    for name, w in sorted(merged.items()):
        if w.ndim == 2 and re.search(rf"layers\.({layers})\.", name) and not re.search(NOT_ADAPTED, name):
            module, (rows, columns) = name.removesuffix(".weight"), w.shape
            a, b = (rng.standard_normal(shape, np.float32) / 8 for shape in ((4, columns), (rows, 4)))
            tensors |= {f"base_model.model.{module}.lora_{x}.weight": value for x, value in (("A", a), ("B", b))}
            merged[name] = w.astype(np.float32) + 2 * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    modules = sorted({name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors})
    (folder / "adapter_config.json").write_text(json.dumps(about | {"target_modules": modules}))
    return merged


@pytest.mark.parametrize("family", ["deepseek_v3", "phi3", "gpt_oss", "qwen2_moe-mixed", "gemma3_text"])
def test_an_adapter_does_what_the_same_weights_merged_do(family: str, build: Build, checkpoint, tmp_path: Path) -> None:
    """Latent attention, fused modules, biases and dense layers among experts."""
    base, whole = checkpoint(family), tmp_path / "merged"
    merged = write_random_adapter(base, tmp_path / "adapter")
    shutil.copytree(base, whole)
    save_file(merged, whole / "model.safetensors")
    prompts = np.random.default_rng(1).integers(3, 500, (3, 30)).tolist()
    found = []
    for model, options in ((base, {"lora_paths": (f"x={tmp_path / 'adapter'}",)}), (whole, {})):
        core = build(model, ALL_PROMPTS, optimised=True, page_size=4, context_length=256, **options)
        client = Client(core)
        for key, prompt in enumerate(prompts, 1):
            client.submit(key, prompt, adapter=number(core, "x"), max_tokens=12, logprobs=5, **GREEDY)
        client.run()
        found.append([client.answers[key] for key in (1, 2, 3)])
    for adapted, plain in zip(*found, strict=True):
        assert adapted.tokens == plain.tokens
        top = [list(zip(each.top_ids, each.top_logprobs, strict=True)) for each in plain.logprobs]
        assert_top5(adapted.logprobs, top)


def test_a_quantised_model_is_adapted_beside_its_rounded_matrices(
    start, build: Build, checkpoint, tmp_path: Path
) -> None:
    """It answers as the model of the rounded matrices does with the same adapters."""
    rounded, base = tmp_path / "rounded", checkpoint("lora-llama")
    shutil.copytree(base, rounded)
    tensors = load_file(base / "model.safetensors")
    for name, w in tensors.items():
        if "_proj." in name:
            values, scales = Scaled("int8").quantise(w)
            tensors[name] = values.astype(np.float32) * scales
    save_file(tensors, rounded / "model.safetensors")
    options = {"page_size": 4, "context_length": 256, "max_loras_per_batch": 2}
    paths = tuple(f"{name}={LORA / 'llama' / name}" for name in adapters_of("llama"))
    wide = build(rounded, ALL_PROMPTS, optimised=True, lora_paths=paths, **options)
    narrow = start("llama", quantization="int8-weight-only")
    for case in mixed("llama"):
        taken = [i for i, each in enumerate(case["requests"]) if each["adapter"] in (None, *adapters_of("llama"))]
        ours, theirs = (ask(core, case, np.array(taken)) for core in (narrow, wide))
        assert [ours[i].tokens for i in taken] == [theirs[i].tokens for i in taken]
