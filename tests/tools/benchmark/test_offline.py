from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from fakes.fake_core import FakeCore, fake_info
from fakes.fake_engine import FakeEngine
from sgl_jax import bench_offline_throughput
from sgl_jax.engine.messages import Abort, Command, Event, FlushCache, Generate, Stats
from sgl_jax.planning.machine_rates import NotMeasured
from sgl_jax.text.tokenizer import Tokenizer, load_tokenizer
from sgl_jax.tools.benchmark import machine_limits
from sgl_jax.tools.benchmark.arguments import engine_options, parse, server_arguments
from sgl_jax.tools.benchmark.datasets import load_prompts
from sgl_jax.tools.benchmark.machine_limits import MachineLimits
from sgl_jax.tools.benchmark.offline import run
from sgl_jax.tools.benchmark.protocols import Prompt
from sgl_jax.tools.benchmark.terminal import BenchmarkError


@pytest.fixture(scope="module")
def tokenizer(stories260k: Path) -> Tokenizer:
    return load_tokenizer(str(stories260k))


@pytest.fixture
def untouched_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command takes over the root logger of its process, which here is the tests'."""
    monkeypatch.setattr("sgl_jax.observability.log.setup", lambda level: None)


class ScriptedCore(FakeCore):
    """Waits for `expected` requests, so that the number of steps is known; says 123.456 tokens/s, and counts a draft in a
    step, of which `accepted` are, or none at all."""

    def __init__(self, expected: int = 0, aborted: int | None = None, accepted: int | None = None):
        info = msgspec.structs.replace(
            fake_info(context_length=64),
            weight_bytes=1_000_000_000,
            kv_bytes_per_token=10_000_000,
            parameters_per_token=5_000_000_000,
        )
        super().__init__(info)
        self._missing, self._aborted, self._accepted = expected, aborted, accepted
        self._numbers = itertools.count()

    def handle(self, command: Command) -> None:
        super().handle(command)
        if isinstance(command, Generate):
            self._missing -= 1
            if next(self._numbers) == self._aborted:
                super().handle(Abort([command.key]))

    def step(self) -> list[Event]:
        if self._missing > 0:
            events, self._kept = self._kept, []
            return events
        return super().step()

    def _stats(self) -> Stats:
        stats, drafts = super()._stats(), {}
        if self._accepted is not None:
            drafts = {"draft_steps": stats.steps, "drafted_tokens": stats.steps, "accepted_drafts": self._accepted}
        return msgspec.structs.replace(stats, gen_throughput=123.456, **drafts)

    def generated(self) -> list[Generate]:
        return [command for command in self.commands if isinstance(command, Generate)]


TOOL = "bench_offline_throughput"
LIMITS = MachineLimits(20.0, 0.5, "float32", "none", 1)


def measure(
    tokenizer: Tokenizer, core: ScriptedCore, prompts: list[Prompt], *words: object, limits=lambda *devices: LIMITS
) -> int:
    args, _ = parse(TOOL, ["--model-path", "fake", *map(str, words)])
    ticks = iter((10.0, 12.0))
    with pytest.MonkeyPatch.context() as patch, FakeEngine(lambda: core, tokenizer) as engine:
        patch.setattr(machine_limits, "measure_limits", limits)
        return run(args, engine, prompts, lambda: next(ticks))


PROMPTS = [
    Prompt([5, 6, 7, 8, 9, 10], 6, 4),
    Prompt([5, 6, 7, 8, 9, 10], 6, 4),  # cached but for its last token
    Prompt(list(range(20, 30)), 10, 2),
    Prompt([11, 12], 2, 6),
]


def test_every_figure_to_the_digit(tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "out.jsonl"
    core = ScriptedCore(expected=4)
    assert measure(tokenizer, core, PROMPTS, "--skip-warmup", "--result-filename", path) == 0
    assert capsys.readouterr().out == (
        "\n"
        "====== Offline Throughput Benchmark Result =======\n"
        "Backend:                                 engine    \n"
        "Successful requests:                     4         \n"
        "Benchmark duration (s):                  2.00      \n"
        "Total input tokens:                      24        \n"
        "Total generated tokens:                  16        \n"
        "Total cached tokens:                     5         \n"
        "Last generation throughput (tok/s):      123.46    \n"
        "Request throughput (req/s):              2.00      \n"
        "Input token throughput (tok/s):          12.00     \n"
        "Output token throughput (tok/s):         8.00      \n"
        "Total token throughput (tok/s):          20.00     \n"
        "==================================================\n"
        "\n"
        "============== Share of the Machine ==============\n"
        "Device:                                  1 x none  \n"
        "Memory bandwidth (GB/s):                 20.00     \n"
        "Matmul rate, float32 (TFLOP/s):          0.50      \n"
        "Decode bandwidth share (%):              17.90     \n"  # (6 x 1e9 + 116 x 1e7) / 2 s / 20e9
        "Matmul share (%):                        35.00     \n"  # 2 x 5e9 x (24 - 5 + 16) / 2 s / 0.5e12
        "==================================================\n"
    )
    (line,) = path.read_text().splitlines()
    assert json.loads(line) == {
        "backend": "engine",
        "model_path": "fake",
        "dtype": "float32",
        "dataset_name": "random",
        "num_prompts": 4,
        "seed": 1,
        "sampling_params": {"temperature": 0.0, "ignore_eos": True},
        "successful_requests": 4,
        "total_latency": 2.0,
        "total_input_tokens": 24,
        "total_output_tokens": 16,
        "total_cached_tokens": 5,
        "steps": 6,
        "last_gen_throughput": 123.456,
        "request_throughput": 2.0,
        "input_throughput": 12.0,
        "output_throughput": 8.0,
        "total_throughput": 20.0,
        "machine_limits": {
            "memory_gb_per_s": 20.0,
            "matmul_tflop_per_s": 0.5,
            "dtype": "float32",
            "device_kind": "none",
            "num_devices": 1,
        },
        "model_cost": {
            "weight_bytes": 1_000_000_000,
            "kv_bytes_per_token": 10_000_000,
            "parameters_per_token": 5_000_000_000,
        },
        "decode_rows": 16 / 6,
        "decode_context": 116 / 16,
        "decode_bandwidth_share": pytest.approx(0.179),
        "matmul_share": pytest.approx(0.35),
    }


def test_the_acceptance_length_of_a_launch_that_speculates(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "out.jsonl"
    measure(tokenizer, ScriptedCore(4, accepted=3), PROMPTS, "--skip-warmup", "--result-filename", path)
    assert "Accept length:                           1.50 " in capsys.readouterr().out  # 3 of 6 drafts
    assert json.loads(path.read_text())["accept_length"] == 1.5


def test_without_limits_there_is_no_second_block(tokenizer: Tokenizer, capsys: pytest.CaptureFixture) -> None:
    def no_room(*devices: object) -> MachineLimits:
        raise NotMeasured("the limits cannot be measured: too little memory")

    assert measure(tokenizer, ScriptedCore(4), PROMPTS, "--skip-warmup", limits=no_room) == 0
    out = capsys.readouterr()
    assert "Share of the Machine" not in out.out
    assert out.err == "bench_offline_throughput: the limits cannot be measured: too little memory\n"


def test_a_request_that_failed_is_not_counted_as_successful(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture
) -> None:
    assert measure(tokenizer, ScriptedCore(4, aborted=2), PROMPTS, "--skip-warmup") == 1
    out = capsys.readouterr().out
    assert "Successful requests:                     3 " in out
    assert "Total input tokens:                      14 " in out
    assert "Total generated tokens:                  14 " in out


def test_texts_are_sent_as_the_data_set_counts_them(tokenizer: Tokenizer) -> None:
    words = ("--num-prompts", 5, "--random-input", 20, "--random-output", 9, "--skip-warmup")
    args, _ = parse(TOOL, ["--model-path", "fake", *map(str, words)])
    prompts = load_prompts(args, tokenizer, None, args.seed)
    core = ScriptedCore(5)
    measure(tokenizer, core, prompts, *words)
    sent = core.generated()
    assert [len(command.prompt_ids) for command in sent] == [prompt.prompt_len for prompt in prompts]
    assert [tokenizer.decode(command.prompt_ids) for command in sent] == [prompt.prompt for prompt in prompts]
    assert [command.params.max_tokens for command in sent] == [prompt.output_len for prompt in prompts]
    assert {(command.params.temperature, command.params.ignore_eos) for command in sent} == {(0.0, True)}


def test_parameters_of_the_extra_body_reach_every_request(tokenizer: Tokenizer) -> None:
    core = ScriptedCore(4)
    body = '{"temperature": 0.5, "max_new_tokens": 3, "top_k": 7}'
    measure(tokenizer, core, PROMPTS, "--skip-warmup", "--extra-request-body", body)
    sent = {(p.temperature, p.max_tokens, p.top_k) for p in (command.params for command in core.generated())}
    assert sent == {(0.5, 3, 7)}


def test_the_warm_up_leaves_no_trace_in_cache_or_figures(tokenizer: Tokenizer, capsys: pytest.CaptureFixture) -> None:
    core = ScriptedCore()
    assert measure(tokenizer, core, PROMPTS[2:3]) == 0
    assert [type(command) for command in core.commands] == [Generate, FlushCache, Generate]
    warm_up, timed = core.generated()
    assert warm_up.prompt_ids == timed.prompt_ids == PROMPTS[2].prompt
    out = capsys.readouterr().out
    assert "Total generated tokens:                  2 " in out
    assert "Decode bandwidth share (%):              5.55 " in out  # 2 steps: (2 x 1e9 + 22 x 1e7) / 2 s / 20e9


@pytest.mark.parametrize(
    ("prompts", "words", "said"),
    [
        ([Prompt([5] * 60, 60, 4), Prompt([5] * 60, 60, 5)], (), "a request is refused: "),
        (PROMPTS, ("--extra-request-body", '{"topk": 1}'), "a request is refused: .*topk is not a sampling parameter"),
        (PROMPTS, ("--extra-request-body", '{"top_k": "a"}'), "a request is refused: .*top_k: Expected `int`"),
        (PROMPTS, ("--extra-request-body", '{"top_p": 2}'), "a request is refused: top_p is 2.0; it must be between"),
        ([Prompt([600], 1, 4)], (), "a request is refused: input_ids has token id 600; the vocabulary is 0..511"),
    ],
)
def test_requests_that_cannot_be_are_refused(tokenizer: Tokenizer, prompts: list, words: tuple, said: str) -> None:
    with pytest.raises(BenchmarkError, match=said):
        measure(tokenizer, ScriptedCore(), prompts, "--skip-warmup", *words)


def test_the_engine_gets_the_flags_that_are_not_about_http() -> None:
    server_args = server_arguments(["--model-path", "m", "--page-size", "8", "--port", "5", "--disable-radix-cache"])
    options = engine_options(server_args)
    assert options == {"model_path": "m", "page_size": 8, "disable_radix_cache": True}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--result-filename", "/none/x"), "--result-filename is /none/x; it must be a file in a folder that exists"),
        (("--extra-request-body", '{"n": 2}'), "--extra-request-body has n 2; one answer to a prompt is measured"),
        (("--profile-output-dir", "x"), "--profile-output-dir needs --profile"),
        (("--compile-only",), "--compile-only leaves nothing to measure"),
        (("--page-size", "3"), "--page-size is 3; it must be a power of two"),
        (("--tokenizer-path", "/none/at/all"), "/none/at/all: no such file or folder"),
    ],
)
@pytest.mark.usefixtures("untouched_log")
def test_flags_that_cannot_be_honoured_are_named(words: tuple, said: str, capsys: pytest.CaptureFixture) -> None:
    assert bench_offline_throughput.main(["--model-path", "m", *words]) == 2
    assert f"bench_offline_throughput: error: {said}" in capsys.readouterr().err


def test_the_command_measures_a_real_model(stories260k: Path, tmp_path: Path) -> None:
    words = ["--model-path", str(stories260k), "--compilation-cache-dir", str(tmp_path / "compiled"), "--device", "cpu"]
    words += ["--page-size", "16", "--max-running-requests", "4", "--chunked-prefill-size", "4", "--port", "1234"]
    words += ["--max-total-tokens", "2048", "--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "2"]
    words += ["--gsp-prompts-per-group", "3", "--gsp-system-prompt-len", "48", "--gsp-question-len", "16"]
    words += ["--gsp-output-len", "10", "--result-filename", "r.jsonl", "--profile"]
    result = subprocess.run(
        [sys.executable, "-m", "sgl_jax.bench_offline_throughput", *words],
        capture_output=True, text=True, timeout=240, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "--port has no effect" in result.stderr
    assert "====== Offline Throughput Benchmark Result =======" in result.stdout
    found = json.loads((tmp_path / "r.jsonl").read_text())
    assert (found["successful_requests"], found["total_input_tokens"], found["total_output_tokens"]) == (6, 6 * 64, 60)
    assert found["total_cached_tokens"] >= 2 * 2 * 32, "a group shares 47 tokens: two pages"
    assert found["decode_bandwidth_share"] > 0 < found["matmul_share"]
    assert list((tmp_path / "profile_offline").rglob("*.xplane.pb"))
