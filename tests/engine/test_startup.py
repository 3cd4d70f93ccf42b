"""From arguments to a core: weights are read and programs compiled at the same time."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from messages import says
from scripted_hub import Hub, serving
from sgl_jax.engine import startup, weight_files
from sgl_jax.engine.core import Core
from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.observability.progress import LaunchProgress
from sgl_jax.runtime.programs import step_name
from sgl_jax.runtime.runner import ModelRunner
from sgl_jax.settings.server_args import ServerArgs
from sgl_jax.step_plan import RowLoad, StepPlan
from simulated import Client


def arguments(model: Path | str, cache: Path) -> ServerArgs:
    return ServerArgs(
        model_path=str(model), dtype="float32", device="cpu", compilation_cache_dir=str(cache), max_total_tokens=1024,
        max_running_requests=1, chunked_prefill_size=8,
    )  # fmt: skip


@pytest.fixture
def hub(stories260k: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Fake ModelScope whose org/model is stories260k."""
    with serving() as found:
        found.files = {file.name: file.read_bytes() for file in stories260k.iterdir()}
        found.listed_sha256, found.breaks = None, 0
        monkeypatch.setenv("MODELSCOPE_DOMAIN", found.url)
        yield found


def named(folder: Path, **flags) -> ServerArgs:
    """Make the arguments for a launch of the hub's model."""
    given = arguments("org/model", folder / "programs")
    source = {"download_source": "modelscope", "download_dir": str(folder / "models")}
    return dataclasses.replace(given, **source | flags)


class Enough(Exception):
    pass


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"attention_backend": "fa"}, "--attention-backend fa.* tpu.* cpu.* native"),
        ({"context_length": 10**6}, "--context-length .*1000000.* 512"),
        ({"mem_fraction_static": 1e-6, "max_total_tokens": None}, "KV.*--mem-fraction-static"),
        (
            {
                "speculative_algorithm": "NGRAM",
                "speculative_num_draft_tokens": 17,
                "max_total_tokens": 32,
                "page_size": 16,
            },
            "--speculative-num-draft-tokens is 17; .*32 tokens.*32 tokens in pages of 16.*--max-total-tokens",
        ),
        ({"load_format": "gguf"}, "0 .gguf"),
    ],
)
def test_what_a_launch_refuses_is_said_before_weights_are_fetched(
    hub: Hub, tmp_path: Path, flags: dict, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        startup.build_core(named(tmp_path, **flags))
    assert hub.transfers("config.json") == [None]
    assert hub.transfers("model.safetensors") == []


def test_a_model_that_cannot_be_served_is_not_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.files["config.json"] = json.dumps({"architectures": ["OtherForCausalLM"]}).encode()
    with pytest.raises(ValueError, match=r"config\.json .*OtherForCausalLM"):
        startup.build_core(named(tmp_path))
    del hub.files["config.json"]
    with pytest.raises(ValueError, match=r"org/model .*config\.json"):
        startup.build_core(named(tmp_path / "empty"))
    assert hub.transfers("model.safetensors") == []


def test_a_named_model_that_is_accepted_is_fetched_and_loaded(hub: Hub, tmp_path: Path, stories260k: Path) -> None:
    seen = []

    def accept(plan) -> None:
        seen.append((plan.kv_tokens, hub.transfers("model.safetensors")))

    core = startup.build_core(named(tmp_path), accept)
    assert core.info.weight_bytes == sum(t.nbytes for t in open_checkpoint(str(stories260k)).tensors.values())
    core.close()
    assert seen == [(1024, []), (1024, [None])]  # before and after the weights are fetched


def test_a_gguf_file_in_the_folder_of_downloads_brings_its_config(hub: Hub, tmp_path: Path) -> None:
    """A GGUF file that another tool has put into the folder is used."""
    del hub.files["config.json"], hub.files["model.safetensors"]
    file = tmp_path / "models/org/model/stories.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"no GGUF")
    with pytest.raises(ValueError, match=r"stories\.gguf"):
        startup.build_core(named(tmp_path))


def test_devices_left_unused_are_warned_of_unless_tp_size_says_so(
    stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def enough(plan) -> None:
        raise Enough

    def warnings(args: ServerArgs) -> list[str]:
        caplog.clear()
        with pytest.raises(Enough):
            startup.build_core(args, enough)
        return [record.message for record in caplog.records if record.levelname == "WARNING"]

    args = arguments(stories260k, tmp_path)
    assert warnings(args) == []
    one = jax.local_devices(backend="cpu")[0]
    monkeypatch.setattr(jax, "local_devices", lambda backend: [one] * 4)
    [said] = warnings(args)
    assert says(said, "3 of 4 cpu … --tp-size 4")
    assert warnings(dataclasses.replace(args, tp_size=1)) == []


def test_programs_compile_while_the_weights_are_read(stories260k, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = threading.Event()
    load = startup.read_weights

    def waits(*args):
        assert compiled.wait(60), "nothing was compiled before the weights were read"
        return load(*args)

    monkeypatch.setattr(LaunchProgress, "compiled", lambda *report: compiled.set())
    monkeypatch.setattr(startup, "read_weights", waits)
    core = startup.build_core(arguments(stories260k, tmp_path))
    assert core.info.num_programs == len(core.runner.programs)
    core.close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def usual(stories260k: Path, cache: Path) -> Core:
    """Core with two buckets, of one token and of eight."""
    return startup.build_core(arguments(stories260k, cache))


def served(core: Core, prompts: list[list[int]]) -> Client:
    client = Client(core)
    for key, prompt in enumerate(prompts):
        client.submit(key, prompt, max_tokens=6, temperature=0.0, ignore_eos=True, logit_bias={17: 3.0})
    return client


def test_a_launch_that_simulates_acceptance_says_so_loudly(
    stories260k: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sgl_jax")
    flags = {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 2, "decode_log_interval": 2}
    flags |= {"speculative_simulated_acceptance": 1.0}
    core = startup.build_core(dataclasses.replace(arguments(stories260k, tmp_path), **flags))
    client = Client(core)
    client.submit(0, [5, 6, 5, 6, 5, 6], max_tokens=60, ignore_eos=True, temperature=0.0)
    client.run()
    assert core.info.simulated
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert says(warning, "--speculative-simulated-acceptance … 1.0 … SIMULATED … nonsense")
    assert any("SIMULATED accept len: 2.00" in record.getMessage() for record in caplog.records)
    assert client.stats[-1].drafts.accept_rate == 1.0


def test_with_skip_server_warmup_requests_wait_for_their_programs(
    usual: Core, stories260k: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs become available one by one, as the test lets them. Tokens are those of a launch that has them all."""
    prompts = [[5], [6, 7, 8], list(range(9, 30))]
    expected = served(usual, prompts)
    expected.run()
    assert expected.stats[-1].compiles_after_ready == expected.stats[-1].num_compiling == 0

    allowed = threading.Semaphore(0)
    monkeypatch.setattr(LaunchProgress, "compiled", lambda *report: allowed.acquire(timeout=60))
    core = startup.build_core(dataclasses.replace(arguments(stories260k, cache), skip_server_warmup=True))
    num_programs = core.info.num_programs
    client = served(core, prompts)
    for _ in range(10):
        client.step()
    assert client.tokens == {0: [], 1: [], 2: []}  # one program at most, and the first request needs two
    assert client.stats[-1].num_compiling >= num_programs - 1
    for _ in range(num_programs):
        allowed.release()
        for _ in range(5):
            client.step()
    while core.busy:
        client.step()
    assert client.tokens == expected.tokens
    assert client.stats[-1].num_compiling == 0
    assert num_programs - 1 <= client.stats[-1].compiles_after_ready <= num_programs
    core.close()


def test_requests_are_answered_while_programs_compile_behind(
    stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's engine is ready with the smallest and the largest step; here the others wait for the test."""
    go_on, compiled = threading.Event(), []

    def take(progress: LaunchProgress, program: str, cache_hit: bool) -> None:
        compiled.append(program)
        if program in ("tokens=4 rows=4", "tokens=8 rows=4"):
            assert go_on.wait(60)

    monkeypatch.setattr(LaunchProgress, "compiled", take)
    args = dataclasses.replace(arguments(stories260k, tmp_path), max_running_requests=4, chunked_prefill_size=32)
    core = startup.launch(args, die=pytest.fail, tell=lambda now: None)
    assert isinstance(core, Core)
    runner = core.runner
    assert isinstance(runner, ModelRunner)
    ran = []
    monkeypatch.setattr(runner, "_announce", lambda program, vector, source: ran.append(program))
    sizes = (1, 3, 7, 20, 60)

    def answers() -> dict[int, list[int]]:
        """Ask one after the other, then all at once."""
        client = Client(core)
        for several in (*([size] for size in sizes), sizes):
            for size in several:
                client.submit(
                    len(client.answers), list(range(5, 5 + size)), max_tokens=6, temperature=0.0, ignore_eos=True
                )
            while any(answer.reason is None for answer in client.answers.values()):
                client.step()
        assert client.stats[-1].compiles_after_ready == 0
        core.scheduler.flush()
        return client.tokens

    meanwhile = answers()
    loads = {"load pages", "load counts", "load bias", "load mask"}
    assert {*compiled[:6]} == {"tokens=1 rows=1", "tokens=32 rows=4"} | loads
    assert {name for name in ran if name.startswith("tokens")} == {"tokens=1 rows=1", "tokens=32 rows=4"}
    assert runner.num_compiling >= 1
    go_on.set()
    while runner.num_compiling:
        core.step()
    assert answers() == meanwhile
    assert {name for name in ran if name.startswith("tokens")} == {
        step_name(bucket) for bucket in runner.config.buckets
    }
    core.close()


def test_a_larger_bucket_stands_in_until_the_right_one_is_compiled(
    usual: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = usual.runner
    assert isinstance(runner, ModelRunner)
    small, *_, large = (step_name(bucket) for bucket in runner.config.buckets)
    calls = runner._calls

    def answer() -> list[int]:
        client = served(usual, [[5]])
        while client.answers[0].reason is None:
            client.step()
        return client.tokens[0]

    def only(*names: str) -> None:
        monkeypatch.setattr(runner, "_calls", {name: calls[name] for name in names})
        present = tuple(bucket for bucket in runner.config.buckets if step_name(bucket) in names)
        monkeypatch.setattr(runner, "_buckets", present)

    right = answer()
    ran = []
    monkeypatch.setattr(runner, "_announce", lambda program, vector, source: ran.append(program))
    for present in (small, large):
        only(present, "load bias")
        ran.clear()
        assert answer() == right
        assert {*ran} == {"load bias", present}

    one, five = (StepPlan.of(np.array([n], np.int32)) for n in (1, 5))
    with_pages = dataclasses.replace(one, loads=[RowLoad(0, np.array([3], np.int32), None)])
    only(large)
    assert [runner.can_launch(plan) for plan in (one, five, with_pages)] == [True, True, False]
    only(small, "load pages")
    assert [runner.can_launch(plan) for plan in (one, five, with_pages)] == [True, False, True]


def test_a_program_that_cannot_be_compiled_ends_an_engine_that_is_ready(
    stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = threading.Event()

    def compiles(runner, programs, report, behind):
        assert ready.wait(60)
        raise ValueError("the backend cannot do sinks")

    monkeypatch.setattr(ModelRunner, "_compile", compiles)
    core = startup.build_core(dataclasses.replace(arguments(stories260k, tmp_path), skip_server_warmup=True))
    ready.set()
    with pytest.raises(ValueError, match="cannot do sinks"):
        Client(core).run()  # with no request at all


def test_weights_that_cannot_be_read_end_the_launch_at_once(
    stories260k, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that nobody waits for the compiling thread, whose programs may take minutes."""
    over, ended = threading.Event(), threading.Event()

    def compiles(runner, programs, report, behind):
        over.wait(60)
        assert runner.stopped.wait(60)
        ended.set()

    def fails(*args):
        raise ValueError("a tensor is missing")

    monkeypatch.setattr(ModelRunner, "_compile", compiles)
    monkeypatch.setattr(startup, "read_weights", fails)
    began = time.monotonic()
    with pytest.raises(ValueError, match="a tensor is missing"):
        startup.build_core(arguments(stories260k, tmp_path))
    assert time.monotonic() - began < 50
    over.set()
    assert ended.wait(60)


def test_a_program_that_cannot_be_compiled_ends_the_reading_of_weights(
    stories260k, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiles(runner, programs, report, behind):
        raise ValueError("the backend cannot do sinks")

    def load_weights(*args, report, **options):
        for step in range(600):
            report(step / 600, step)
            time.sleep(0.1)
        pytest.fail("all weights were read")

    monkeypatch.setattr(ModelRunner, "_compile", compiles)
    monkeypatch.setattr(weight_files, "load_weights", load_weights)
    with pytest.raises(ValueError, match="cannot do sinks"):
        startup.build_core(arguments(stories260k, tmp_path))
