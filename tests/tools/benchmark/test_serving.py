"""A run against a server with scripted timings: every figure is derived by hand, every printed digit compared."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from scripted_run import COST, ROOFLINE, bench, serving_args
from scripted_server import Script, ScriptedServer
from virtual_time import run_in_virtual_time

from sgl_jax.tools.benchmark.figures import ServingRun, failure_line, standard_block
from sgl_jax.tools.benchmark.machine_limits import shares_block
from sgl_jax.tools.benchmark.protocols import BACKENDS, Prompt
from sgl_jax.tools.benchmark.serving import ServerFacts, ask_server, run_serving
from sgl_jax.tools.benchmark.terminal import BenchmarkError

# Two at a time. Sent at, first token after, gap, ended at:
#   0: 0     0.25  4 x 0.125  0.75
#   1: 0     0.5   4 x 0.25   1.5
#   2: 0.75  0.75  8 x 0.125  2.5
#   3: 1.5   1.0   -          2.5
# Tokens in seconds 0, 1, 2: 5 + 2, 3 + 4, 5 + 1.
PROMPTS = [Prompt("w " * n, n, out) for n, out in ((10, 5), (20, 5), (30, 9), (40, 1))]
SCRIPT = Script(
    ttft_s=lambda request: (0.25, 0.5, 0.75, 1.0)[request],
    itl_s=lambda request: (0.125, 0.25, 0.125, 0.125)[request],
    cached_tokens=None,
)
BLOCK = Path(__file__).with_name("serving_block.txt").read_text(encoding="utf-8").rstrip("\n")


NOTHING_TOLD = ServerFacts()


def sent_at(run: ServingRun) -> list[float]:
    return [outcome.sent_s - run.start_s for outcome in run.outcomes]


@pytest.mark.parametrize("backend", ["sgl-jax", "sgl-jax-oai", "sgl-jax-oai-chat", "vllm", "openai-chat"])
def test_the_block_is_the_same_to_the_digit_over_every_api(backend: str) -> None:
    run, server = bench(SCRIPT, PROMPTS, backend=backend, max_concurrency=2)
    assert standard_block(run) == BLOCK.replace("sgl-jax   ", f"{backend:<10}")
    assert {path for path, body in server.received if "stream" in (body or {})} == {BACKENDS[backend].protocol.path}
    assert failure_line(run) is None


def test_tokens_that_come_together_share_their_gap() -> None:
    """1 token after 0.5 s, then 4 after 0.5 s more, then 3 after 0.375 s: each gap is 0.125 s."""
    run, _ = bench(Script(ttft_s=lambda _: 0.5, itl_s=lambda _: 0.125, tokens_per_event=4), [Prompt([1, 2], 2, 8)])
    (outcome,) = run.outcomes
    assert outcome.itl_s == [0.125] * 7
    assert (outcome.ttft_s, outcome.latency_s, outcome.output_len) == (0.5, 1.375, 8)
    assert run.figures["mean_tpot_ms"] == 125.0


@pytest.mark.parametrize(("usage_each_event", "gaps"), [(True, [0.125] * 7), (False, [0.5, 0.375])])
def test_a_chunk_is_a_token_unless_the_server_counts(usage_each_event: bool, gaps: list[float]) -> None:
    script = Script(ttft_s=lambda _: 0.5, itl_s=lambda _: 0.125, tokens_per_event=4, usage_each_event=usage_each_event)
    run, _ = bench(script, [Prompt([1, 2], 2, 8)], backend="vllm")
    assert run.outcomes[0].itl_s == gaps
    assert run.outcomes[0].output_len == 8  # the usage at the end says so
    assert run.figures["max_output_tokens_per_s"] == pytest.approx(4 if usage_each_event else 16 / 3)


def test_tokens_without_text_are_seen_when_the_answer_ends() -> None:
    run, _ = bench(Script(ttft_s=lambda _: 0.5, itl_s=lambda _: 0.125, token=""), [Prompt([1], 1, 5)])
    (outcome,) = run.outcomes
    assert (outcome.ttft_s, outcome.latency_s, outcome.output_len, outcome.itl_s) == (1.0, 1.0, 5, [])


def test_held_back_text_counts_its_tokens_once() -> None:
    """Token 2 has no text yet, 3 brings both; the text that was held back at the end brings no token."""

    def said(text: str, tokens: int) -> bytes:
        return b"data: " + json.dumps({"text": text, "meta_info": {"completion_tokens": tokens}}).encode() + b"\n\n"

    events = [said("a", 1), said("a", 2), said("abc", 3), said("abcd", 3), b"data: [DONE]\n\n"]

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in events:
            await asyncio.sleep(0.25)
            for i in range(len(event)):  # as badly cut as can be
                await response.write(event[i : i + 1])
        return response

    async def main() -> ServingRun:
        app = web.Application()
        app.router.add_post("/generate", answer)
        async with TestServer(app) as server:
            return await run_serving(serving_args(str(server.make_url(""))), NOTHING_TOLD, [Prompt([1], 1, 3)])

    (outcome,) = run_in_virtual_time(main()).outcomes
    assert (outcome.error, outcome.text, outcome.output_len) == ("", "abcd", 3)
    assert (outcome.ttft_s, outcome.itl_s, outcome.latency_s) == (0.25, [0.25, 0.25], 1.25)


def test_without_streaming_only_whole_latencies_are_known() -> None:
    run, server = bench(SCRIPT, PROMPTS, max_concurrency=2, disable_stream=True)
    lines = BLOCK.splitlines()
    first = next(i for i, line in enumerate(lines) if "Time to First Token" in line)
    expected = [
        f"{line[:41]}{'n/a':<10}" if line.startswith("Peak") or (i > first and "(ms)" in line) else line
        for i, line in enumerate(lines)
    ]
    assert standard_block(run).splitlines() == expected
    assert {body["stream"] for path, body in server.received if path == "/generate"} == {False}


def test_cached_tokens_have_their_lines_when_the_server_tells() -> None:
    """The hit rate is over the prompt tokens that the server counted."""
    script = Script(cached_tokens=lambda request: (0, 16)[request])
    run, _ = bench(script, [Prompt("w " * 30, 31, 2), Prompt("w " * 34, 35, 2)], max_concurrency=1)
    lines = standard_block(run).splitlines()
    at = lines.index("Total generated tokens (retokenized):    n/a       ")
    assert lines[at + 1 : at + 4] == [
        "Total cached tokens:                     16        ",
        "Cache hit rate:                          25.00%    ",
        f"Request throughput (req/s):              {2 / 0.22:<10.2f}",
    ]


OURS = """# TYPE sgl_jax_spec_decode_num_drafts_total counter
sgl_jax_spec_decode_num_drafts_total {0}
sgl_jax_spec_decode_num_draft_tokens_total {1}
sgl_jax_spec_decode_num_accepted_tokens_total {2}
sgl_jax_spec_decode_num_accepted_tokens_per_pos_total{{position="0"}} 1000
"""
VLLM = """# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{{engine="0",model_name="m"}} {0}
vllm:spec_decode_num_drafts_total{{engine="1",model_name="m"}} 10.0
vllm:spec_decode_num_draft_tokens_total{{engine="0",model_name="m"}} {1}
vllm:spec_decode_num_accepted_tokens_total{{engine="0",model_name="m"}} {2}
"""


@pytest.mark.parametrize("text", [OURS, VLLM], ids=["ours", "vllm"])
def test_the_acceptance_length_is_that_of_the_run(text: str) -> None:
    script = Script(metrics=[text.format(100.0, 300.0, 7.0), text.format(140.0, 420.0, 67.0)])
    run, _ = bench(script, PROMPTS)
    assert run.json()["accept_length"] == 2.5
    lines = standard_block(run).splitlines()
    assert lines[lines.index(next(line for line in lines if line.startswith("Concurrency:"))) + 1] == (
        "Accept length:                           2.50      "
    )


@pytest.mark.parametrize("metrics", [[], ["<html>"], ["up 1"], [OURS.format(5, 15, 6)] * 2, [OURS.format(5, 15, 6)]])
def test_there_is_no_acceptance_length_where_the_run_had_no_drafts_or_the_server_does_not_tell(
    metrics: list[str],
) -> None:
    run, _ = bench(Script(metrics=[*metrics]), PROMPTS)
    assert run.json()["accept_length"] is None
    assert "Accept length" not in standard_block(run)
    assert "SIMULATED" not in standard_block(run)


def test_a_server_that_simulates_acceptance_is_shown_up() -> None:
    async def measured() -> ServingRun:
        script = Script(info={"speculative_simulated_acceptance": 0.7})
        async with ScriptedServer(script).running() as server:
            args = serving_args(server.url)
            return await run_serving(args, await ask_server(args), PROMPTS)

    run = run_in_virtual_time(measured())
    assert run.json()["simulated_acceptance"] == 0.7
    assert "\nSIMULATED acceptance:                    0.70      \n" in standard_block(run)


class Words:
    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [0] * (2 * len(text.split()))


def test_the_texts_are_counted_again_with_the_tokenizer() -> None:
    run, _ = bench(SCRIPT, PROMPTS, Words(), max_concurrency=2)
    assert "Total generated tokens (retokenized):    40        " in standard_block(run).splitlines()


def test_failures_are_counted_and_left_out_of_the_figures() -> None:
    """Six requests run one after another; 1 to 4 fail in four ways; 0 and 5 take 0.25 + 0.125 s each."""
    script = Script(
        ttft_s=lambda _: 0.25,
        itl_s=lambda _: 0.125,
        fails=lambda request: (503, "the queue is full") if request == 1 else None,
        breaks=lambda request: {2: "ended", 3: "error", 4: "aborted"}.get(request, ""),
    )
    run, _ = bench(script, [Prompt([1] * 8, 8, 2)] * 6, max_concurrency=1)
    assert [outcome.error for outcome in run.outcomes] == [
        "",
        "HTTP 503 from /generate: the queue is full",
        "the stream ended early, without [DONE]",
        "the server answered an error: out of memory",
        "the server aborted the request: stopped",
        "",
    ]
    figures = run.figures
    assert (figures["completed"], figures["failed"]) == (2, 4)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (16, 4)
    assert run.figures["duration"] == 2 * 0.375 + 3 * 0.25
    assert figures["output_throughput"] == 4 / 1.5
    shown = [figures[name] for name in ("mean_ttft_ms", "mean_itl_ms", "p99_e2e_latency_ms")]
    assert shown == [250.0, 125.0, 375.0]
    assert failure_line(run) == ("4 of 6 requests failed, the first with: HTTP 503 from /generate: the queue is full")


@pytest.mark.parametrize(
    ("how", "error"), [("dropped", "the connection broke: "), ("gibberish", "the server sent what is no JSON: <html>")]
)
@pytest.mark.parametrize("backend", ["sgl-jax", "vllm-chat"])
def test_a_broken_stream_is_a_failure(how: str, error: str, backend: str) -> None:
    run, _ = bench(Script(breaks=lambda _: how), [Prompt("a", 1, 4)], backend=backend)
    assert run.outcomes[0].error.startswith(error)
    assert run.figures["completed"] == 0


def test_a_rate_sends_as_a_poisson_process_that_the_seed_determines() -> None:
    prompts = [Prompt([1], 1, 1)] * 50
    run, _ = bench(Script(), prompts, request_rate=4.0, seed=7)
    gaps = np.random.default_rng(7).exponential(0.25, 49)
    assert sent_at(run) == pytest.approx([0.0, *np.cumsum(gaps)], abs=1e-9)
    assert "Traffic request rate:                    4.0       " in standard_block(run).splitlines()
    other, _ = bench(Script(), prompts, request_rate=4.0, seed=8)
    assert sent_at(other) != sent_at(run)


def test_requests_over_the_limit_wait_their_turn() -> None:
    """Answers take 1 s, one at a time: what is due meanwhile is sent when the one before has ended."""
    prompts = [Prompt([1], 1, 1, arrival_s=at) for at in (10.0, 10.5, 13.0)]
    run, _ = bench(Script(ttft_s=lambda _: 1.0), prompts, use_trace_timestamps=True, max_concurrency=1)
    assert sent_at(run) == [0.0, 1.0, 3.0]
    assert run.figures["duration"] == 4.0


def test_a_trace_without_times_is_refused() -> None:
    prompts = [Prompt([1], 1, 1, arrival_s=0.0), Prompt([1], 1, 1)]
    with pytest.raises(BenchmarkError, match="--use-trace-timestamps: 1 of 2 prompts have no time"):
        bench(Script(), prompts, use_trace_timestamps=True)


def test_no_prompts_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match="no prompts"):
        bench(Script(), [])


# --- what is sent -----------------------------------------------------------------------------------------------------

OPTIONS = {
    "temperature": 0.5,
    "return_logprob": True,
    "extra_request_body": {"sampling_params": {"top_p": 0.5}, "temperature": 0.25},
    "lora_name": ["tales"],
    "header": ["Authorization=Bearer key"],
}
NATIVE = {
    "sampling_params": {"temperature": 0.5, "max_new_tokens": 3, "ignore_eos": True, "top_p": 0.5},
    "temperature": 0.25,
    "stream": True,
    "return_logprob": True,
    "lora_path": "tales",
}
OPENAI = {
    "model": "tales",
    "stream": True,
    "stream_options": {"include_usage": True},
    "ignore_eos": True,
    "sampling_params": {"top_p": 0.5},
    "temperature": 0.25,
}


@pytest.mark.parametrize(
    ("backend", "prompt", "body"),
    [
        ("sgl-jax", [5, 6], NATIVE | {"input_ids": [5, 6]}),
        ("sglang", "a b", NATIVE | {"text": "a b"}),
        ("vllm", [5, 6], OPENAI | {"prompt": [5, 6], "max_tokens": 3, "logprobs": 1}),
        ("sgl-jax-oai", "a b", OPENAI | {"prompt": "a b", "max_tokens": 3, "logprobs": 1}),
        (
            "vllm-chat",
            "a b",
            OPENAI | {"messages": [{"role": "user", "content": "a b"}], "max_completion_tokens": 3, "logprobs": True},
        ),
    ],
)
def test_the_body_of_a_request(backend: str, prompt: Any, body: dict[str, Any]) -> None:
    run, server = bench(Script(), [Prompt(prompt, 2, 3)], model="m", backend=backend, **OPTIONS)
    assert run.figures["failed"] == 0
    assert (BACKENDS[backend].protocol.path, body) in server.received
    assert server.headers[-1]["Authorization"] == "Bearer key"
    assert "Bearer key" not in str(run.config)


def test_answers_may_end_when_eos_is_not_ignored() -> None:
    for backend in ("sgl-jax", "vllm"):
        _, server = bench(Script(), [Prompt("a", 1, 3)], backend=backend, disable_ignore_eos=True)
        (body,) = [body for path, body in server.received if path == BACKENDS[backend].protocol.path]
        assert "ignore_eos" not in body
        assert "ignore_eos" not in body.get("sampling_params", {})


def test_token_ids_for_a_chat_are_refused() -> None:
    with pytest.raises(BenchmarkError, match="chat takes text, and these prompts are token ids"):
        bench(Script(), [Prompt([1, 2], 2, 3)], backend="vllm-chat")


def test_adapters_are_drawn_by_the_seed() -> None:
    def drawn(seed: int) -> list[str]:
        _, server = bench(Script(), [Prompt("a", 1, 1)] * 20, max_concurrency=1, lora_name=["x", "y"], seed=seed)
        return [body["lora_path"] for path, body in server.received if path == "/generate"]

    assert set(drawn(1)) == {"x", "y"}
    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


# --- around the run ---------------------------------------------------------------------------------------------------


def test_warming_up_comes_first_and_is_not_measured() -> None:
    prompts = [Prompt("a", 1, 100), Prompt("b", 1, 4)]
    run, server = bench(Script(), prompts, warmup_requests=2, flush_cache=True, profile=True)
    assert len(run.outcomes) == 2
    calls = [(path, (body or {}).get("text")) for path, body in server.received]
    assert calls[:3] == [("/generate", "a"), ("/generate", "a"), ("/flush_cache", None)]
    assert calls[3:] == [
        ("/metrics", None),
        ("/start_profile", None),
        ("/generate", "a"),
        ("/generate", "b"),
        ("/stop_profile", None),
        ("/metrics", None),
    ]
    lengths = [body["sampling_params"]["max_new_tokens"] for path, body in server.received if path == "/generate"]
    assert lengths == [32, 32, 100, 4]


def test_a_run_is_not_made_when_warming_up_fails() -> None:
    with pytest.raises(BenchmarkError, match="warming up failed: HTTP 400 from /generate: bad"):
        bench(Script(fails=lambda _: (400, "bad")), [Prompt("a", 1, 4)], warmup_requests=2)


def test_a_server_without_a_cache_to_flush_is_an_error_that_names_the_flag() -> None:
    with pytest.raises(BenchmarkError, match="--flush-cache: the server has no /flush_cache"):
        bench(Script(refused={"/flush_cache": [(404, "no such path")]}), [Prompt("a", 1, 1)], flush_cache=True)


def test_the_share_of_the_machine() -> None:
    """Two rows of 0.25 + 4 x 0.125 s, sent together; 8 and 16 prompt tokens, 4 of each cached, 5 output tokens.

    A decode step reads 1 + 2 x (12 + 2.5) x 0.01 = 1.29 GB in 0.125 s, of 20 GB/s: 51.6 %.
    12 + 4 uncached and 10 output tokens cost 2 x 0.05 T operations each, in 0.75 s, of 10 TFLOP/s: 34.67 %.
    """
    script = Script(ttft_s=lambda _: 0.25, itl_s=lambda _: 0.125, cached_tokens=lambda _: 4)
    run, _ = bench(script, [Prompt([1] * 8, 8, 5), Prompt([1] * 16, 16, 5)], roofline=ROOFLINE)
    assert run.shares is not None
    assert shares_block(run.shares).splitlines() == [
        "============== Share of the Machine ==============",
        "Device:                                  2 x abacus",
        "Memory bandwidth (GB/s):                 20.00     ",
        "Matmul rate, bfloat16 (TFLOP/s):         10.00     ",
        "Decode bandwidth share (%):              51.60     ",
        "Matmul share (%):                        34.67     ",
        "==================================================",
    ]


def test_rows_of_a_decode_step_are_those_that_decode_not_those_that_wait() -> None:
    """The first decodes from 1 to 3 s, the second from 2.5 to 4.5 s: 4 s of rows within 3.5 s."""
    script = Script(ttft_s=lambda request: (1.0, 2.5)[request], itl_s=lambda _: 0.5, cached_tokens=None)
    run, _ = bench(script, [Prompt([1], 1, 5)] * 2, roofline=ROOFLINE)
    assert run.shares is not None
    assert run.shares["decode_rows"] == 4 / 3.5
    assert run.figures["concurrency"] == 7.5 / 4.5


def test_a_run_that_is_cancelled_stops_its_profile() -> None:
    """Four one after another, a second each, stopped in the third."""

    async def main() -> None:
        server = ScriptedServer(Script(ttft_s=lambda _: 1.0))
        async with server.running():
            args = serving_args(server.url, max_concurrency=1, profile=True)
            task = asyncio.ensure_future(run_serving(args, NOTHING_TOLD, [Prompt([1], 1, 1)] * 4))
            await asyncio.sleep(2.25)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert server.received[-1] == ("/stop_profile", None)

    run_in_virtual_time(main())


async def asked(script: Script, timeout_s: float) -> tuple[ServerFacts, float]:
    """The facts, and the seconds they took."""
    async with ScriptedServer(script).running() as server:
        args = serving_args(server.url, ready_check_timeout_sec=timeout_s)
        return await ask_server(args), asyncio.get_running_loop().time()


def test_a_server_is_waited_for_until_it_answers() -> None:
    script = Script(info={"engine": COST | {"vocab_size": 7}}, refused={"/get_server_info": [(503, "loading")] * 3})
    facts, seconds = run_in_virtual_time(asked(script, 5.0))
    assert (facts, seconds) == (ServerFacts("scripted", None, 7, None), 1.5)
    script = Script(refused={"/get_server_info": [(503, "loading")] * 99})
    with pytest.raises(BenchmarkError, match=r"^not ready after 2 s: HTTP 503 from /get_server_info: loading$"):
        run_in_virtual_time(asked(script, 2.0))
