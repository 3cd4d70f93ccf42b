"""Weights that change in a running engine, and memory that it lends: tokens are those of a launch with the weights.

Two checkpoints have the same shapes: stories260k, and the same with its layers in reverse order.
"""

from __future__ import annotations

import gc
import json
import resource
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from exact import GREEDY, Build
from safetensors.numpy import load_file, save_file

from checkpoints import DATA
from messages import says
from models.gguf_fixture import Q8_0, random_hf_tensors, write_gguf
from sgl_jax.engine.core import Core
from sgl_jax.engine.messages import (
    ContinueGeneration,
    PauseGeneration,
    Refused,
    ReleaseMemory,
    ResumeMemory,
    StateChanged,
    UpdateWeights,
)
from sgl_jax.engine.trainer_calls import TrainerCall
from sgl_jax.runtime.buckets import Bucket
from simulated import Client

PROMPTS = ([1, 403, 407], [1, 403, 407, 261, 378], [1, 5, 6, 7, 8, 9, 10, 11, 12], [1, 300, 301])
STEPS, LENGTH = Bucket(32, 4), 24
BOTH = ["kv_cache", "weights"]


def reversed_layers(source: Path, folder: Path) -> Path:
    """Write a checkpoint with a model's layers in reverse order."""
    folder.mkdir()
    for file in source.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    number = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    tensors = load_file(source / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(number - 1 - int(parts[2]))
        renamed[".".join(parts)] = tensor
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def other(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reversed_layers(stories260k, tmp_path_factory.mktemp("other") / "model")


def ask(client: Client, first: int = 1) -> list[list[int]]:
    """Return the tokens of each prompt."""
    for key, prompt in enumerate(PROMPTS, first):
        client.submit(key, [*prompt], max_tokens=LENGTH, **GREEDY)
    client.run(100_000)
    return [client.answers[first + i].tokens for i in range(len(PROMPTS))]


def call(client: Client, call: TrainerCall) -> StateChanged | Refused:
    client.core.handle(call)
    for _ in range(100_000):
        if client.said:
            break
        client.step()
    said = client.said.pop()
    assert isinstance(said, StateChanged | Refused)
    return said


def array_bytes() -> int:
    gc.collect()
    return sum(each.nbytes for each in jax.live_arrays())


def compiled(core: Core) -> int:
    assert core.runner.num_compiling == 0
    return core.runner.compiles_after_ready


OPTIONS = {
    "float32": {},
    "int8": {"quantization": "int8"},
    "float8 KV": {"kv_cache_dtype": "fp8_e4m3"},
}


@pytest.mark.parametrize("way", OPTIONS)
def test_tokens_after_an_update_under_load_are_the_new_weights(
    build: Build, stories260k: Path, other: Path, way: str
) -> None:
    options = OPTIONS[way] | {"context_length": 128}
    right = ask(Client(build(other, STEPS, **options)))
    client = Client(core := build(stories260k, STEPS, **options))
    old = ask(client)
    assert old != right
    before = array_bytes(), len(jax.live_arrays())
    for key, prompt in enumerate(PROMPTS, 11):
        client.submit(key, [*prompt], max_tokens=100, **GREEDY)
    for _ in range(5):
        client.step()
    said = call(client, UpdateWeights(1, str(other)))
    assert isinstance(said, StateChanged)
    assert (said.holds, said.weights) == (False, (str(other), ""))
    spanning = {key: len(client.answers[key].tokens) for key in range(11, 15)}
    assert all(0 < number < 100 for number in spanning.values())
    assert ask(client, 21) == right
    for key in spanning:
        assert (len(client.answers[key].tokens), client.answers[key].reason.type) == (100, "length")
    assert call(client, UpdateWeights(2, str(stories260k))).weights == (str(stories260k), "")
    assert ask(client, 31) == old
    assert compiled(core) == 0
    assert (array_bytes(), len(jax.live_arrays())) == before


def test_tokens_of_a_request_that_spans_an_update_go_on_from_its_own(
    build: Build, stories260k: Path, other: Path
) -> None:
    client = Client(build(stories260k, STEPS, context_length=256))
    client.submit(1, [1, 403, 407], max_tokens=60, **GREEDY)
    for _ in range(5):
        client.step()
    call(client, UpdateWeights(1, str(other)))
    number = len(client.answers[1].tokens)
    client.run(100_000)
    tokens = client.answers[1].tokens
    fresh = Client(build(other, STEPS, context_length=256))
    fresh.submit(1, [1, 403, 407, *tokens[:number]], max_tokens=60 - number, **GREEDY)
    fresh.run(100_000)
    assert tokens[number:] == fresh.answers[1].tokens


@pytest.mark.parametrize("way", ["float32", "int8"])
def test_released_memory_is_free_and_the_tokens_are_the_same_afterwards(
    build: Build, stories260k: Path, other: Path, way: str
) -> None:
    options = OPTIONS[way] | {"context_length": 128, "max_total_tokens": 65536}
    right = ask(Client(build(other, STEPS, **options)))
    client = Client(core := build(stories260k, STEPS, **options))
    old, whole = ask(client), array_bytes()
    weights, pools = core.runner.take("weights"), core.runner.take("kv")
    core.runner.give("weights", weights)
    core.runner.give("kv", pools)
    of_weights, of_pools = (sum(each.nbytes for each in jax.tree.leaves(tree)) for tree in (weights, pools))
    leaves = jax.tree.leaves((weights, pools))
    del weights, pools
    assert call(client, ReleaseMemory(1, ["kv_cache"])).holds
    assert whole - array_bytes() == of_pools
    assert call(client, ReleaseMemory(2, BOTH)).holds
    assert whole - array_bytes() == of_pools + of_weights
    assert all(leaf.is_deleted() for leaf in leaves)
    client.submit(90, [1, 403], max_tokens=3, **GREEDY)
    client.run()
    assert client.answers[90].reason is None
    assert call(client, ResumeMemory(3, ["weights"])).holds
    assert not call(client, ResumeMemory(4, BOTH)).holds
    assert (ask(client, 21), array_bytes()) == (old, whole)
    assert client.answers[90].reason.type == "length"
    call(client, PauseGeneration(5, "retract"))
    call(client, ReleaseMemory(6, BOTH))
    assert call(client, UpdateWeights(7, str(other))).holds
    call(client, ResumeMemory(8, BOTH))
    call(client, ContinueGeneration(9))
    assert ask(client, 31) == right
    assert compiled(core) == 0


def test_the_kv_cache_of_a_cpu_goes_back_to_the_machine(build: Build, stories260k: Path) -> None:
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    client = Client(core := build(stories260k, STEPS, context_length=128, max_total_tokens=2**20))
    pools = core.runner.pools
    core.runner.give("kv", [pool.at[:].set(1) for pool in pools])  # every page of it is in memory
    for pool in pools:
        pool.delete()
    del pools, pool
    size = sum(pool.nbytes for pool in core.runner.pools)
    assert size > 2**28
    before = resident()
    call(client, ReleaseMemory(1, ["kv_cache"]))
    assert before - resident() > 0.95 * size
    call(client, ResumeMemory(2, ["kv_cache"]))
    ask(client)


LORA = DATA / "lora" / "llama"


def answers_with(client: Client, adapter: int, first: int) -> list[list[int]]:
    """Return the tokens of two prompts with an adapter; 0: the model itself."""
    for key, prompt in enumerate(PROMPTS[:2], first):
        client.submit(key, [*prompt], max_tokens=12, adapter=adapter, **GREEDY)
    client.run(100_000)
    return [client.answers[first + i].tokens for i in range(2)]


def test_loaded_adapters_change_the_new_weights(
    build: Build, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Three adapters share two slots, so one is put into its slot after the update, and two are there."""
    base = checkpoint("lora-llama")
    changed = reversed_layers(base, tmp_path / "changed")
    names = sorted(each.parent.name for each in LORA.glob("*/oracle.json"))[:3]
    options = {"context_length": 128, "lora_paths": tuple(f"{name}={LORA / name}" for name in names)}
    options |= {"max_loras_per_batch": 2}
    fresh = Client(build(changed, STEPS, **options))
    right = [answers_with(fresh, adapter, 10 * adapter + 1) for adapter in range(4)]
    client = Client(core := build(base, STEPS, **options))
    old = [answers_with(client, adapter, 10 * adapter + 1) for adapter in range(4)]
    assert all(one != other for one, other in zip(old, right, strict=True))
    assert isinstance(call(client, UpdateWeights(1, str(changed))), StateChanged)
    assert [answers_with(client, adapter, 10 * adapter + 101) for adapter in range(4)] == right
    call(client, ReleaseMemory(2, BOTH))
    call(client, ResumeMemory(3, BOTH))
    assert [answers_with(client, adapter, 10 * adapter + 201) for adapter in range(4)] == right
    assert compiled(core) == 0


def arrays(core: Core) -> list[np.ndarray]:
    weights = core.runner.take("weights")
    core.runner.give("weights", weights)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(weights)]


def test_a_draft_head_stays_beside_the_new_weights(build: Build, tmp_path: Path) -> None:
    folder = DATA / "eagle" / "eagle3-llama"
    changed = reversed_layers(folder / "target", tmp_path / "changed")
    options = {"context_length": 128, "speculative_algorithm": "EAGLE3", "speculative_num_draft_tokens": 5}
    options |= {"speculative_draft_model_path": str(folder / "draft")}
    fresh = Client(build(changed, STEPS, **options))
    right = ask(fresh)
    client = Client(core := build(folder / "target", STEPS, **options))
    old = ask(client)
    assert old != right
    assert isinstance(call(client, UpdateWeights(1, str(changed))), StateChanged)
    assert ask(client, 21) == right
    for ours, theirs in zip(arrays(core), arrays(fresh.core), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    call(client, ReleaseMemory(2, BOTH))
    call(client, UpdateWeights(3, str(folder / "target")))
    call(client, ResumeMemory(4, BOTH))
    assert ask(client, 41) == old
    assert compiled(core) == 0


def test_weights_come_from_gguf_files_too(build: Build, tmp_path: Path) -> None:
    """Files of the same model, as floats and quantised, take each other's place."""
    quantised = {"ffn_": Q8_0, "_proj": Q8_0}
    first = write_gguf(tmp_path / "first.gguf", random_hf_tensors(0))
    second = write_gguf(tmp_path / "second.gguf", random_hf_tensors(1), types=quantised)
    options = {"context_length": 64}
    prompts = {1: [1, 3, 5], 2: [7, 8, 9, 10]}

    def tokens(client: Client, first: int) -> list[list[int]]:
        for key, prompt in prompts.items():
            client.submit(first + key, prompt, max_tokens=16, **GREEDY)
        client.run(100_000)
        return [client.answers[first + key].tokens for key in prompts]

    old, right = (tokens(Client(build(file, STEPS, **options)), 0) for file in (first, second))
    assert old != right
    client = Client(build(first, STEPS, **options))
    assert isinstance(call(client, UpdateWeights(1, str(second))), StateChanged)
    assert tokens(client, 10) == right
    assert isinstance(call(client, UpdateWeights(2, str(first), "gguf")), StateChanged)
    assert tokens(client, 20) == old
    said = call(client, UpdateWeights(3, str(second), "safetensors"))
    assert isinstance(said, Refused)
    assert says(said.message, f"{second} … safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 4}, "num_layers is 4 … launch 5"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps is 0.001"),
        ({"rope_theta": 5.0}, "rope"),
        ({"hidden_size": 128}, "hidden_size is 128"),
    ],
)
def test_another_model_is_refused_by_name(
    small: Client, stories260k: Path, tmp_path: Path, change: dict[str, float], message: str
) -> None:
    config = json.loads((stories260k / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((stories260k / "model.safetensors").read_bytes())
    refused(small, tmp_path, message)


def drop(tensors: dict[str, np.ndarray]) -> None:
    del tensors["model.norm.weight"]


def cut(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:8].copy()


@pytest.mark.parametrize(
    ("change", "message"), [(drop, "model.norm.weight"), (cut, "model.layers.1.mlp.up_proj.weight")]
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    small: Client, stories260k: Path, tmp_path: Path, change: Callable[[dict[str, np.ndarray]], None], message: str
) -> None:
    tensors = load_file(stories260k / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((stories260k / "config.json").read_bytes())
    refused(small, tmp_path, message)


@pytest.mark.parametrize("path", ["/nowhere", "no/such/model", ".", "/dev/null", "a\0b", "config:qwen3-8b"])
def test_paths_without_weights_are_refused(small: Client, path: str) -> None:
    refused(small, path, "")


def test_an_int8_kv_cache_keeps_the_scales_of_its_weights(build: Build, stories260k: Path) -> None:
    client = Client(build(stories260k, STEPS, context_length=128, kv_cache_dtype="int8"))
    refused(client, stories260k, "--kv-cache-dtype int8 … scales")


@pytest.fixture(scope="module")
def small(build: Build, stories260k: Path) -> Client:
    return Client(build(stories260k, STEPS, context_length=128))


def refused(client: Client, path: Path | str, message: str) -> None:
    client.answers.clear()
    before = ask(client)
    said = call(client, UpdateWeights(1, str(path)))
    assert isinstance(said, Refused)
    assert said.param == "model_path"
    assert says(said.message, message)
    client.answers.clear()
    assert ask(client) == before
