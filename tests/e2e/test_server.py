"""The real server on the real default model: golden tokens over HTTP, prefix reuse, quiet when idle, nothing compiled."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

START_TIMEOUT_S = 600

pytestmark = pytest.mark.timeout(900)


@dataclass
class Server:
    process: subprocess.Popen
    url: str
    log: Path

    @functools.cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def post(self, path: str, **body) -> dict:
        answer = httpx.post(f"{self.url}{path}", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def metric(self, name: str) -> float:
        found = re.search(rf"^{name} (\S+)$", httpx.get(f"{self.url}/metrics").text, re.MULTILINE)
        assert found, name
        return float(found[1])


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = folder / "log"
    flags = ["--dtype", "float32", "--port", str(port), "--chunked-prefill-size", "64", "--max-running-requests", "32"]
    flags += ["--max-total-tokens", "16384", "--compilation-cache-dir", str(folder / "cache")]
    with log.open("w") as out:
        command = [sys.executable, "-m", "sgl_jax.launch_server", "--model-path", str(smollm2), *flags]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    server = Server(process, f"http://127.0.0.1:{port}", log)
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            if httpx.get(f"{server.url}/ready").status_code == 200:
                break
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    yield server
    server.client.close()
    process.terminate()
    assert process.wait(30) == 0, log.read_text()


@pytest.fixture(scope="module")
def cases(golden) -> list[dict]:
    return json.loads((golden / "smollm2-135m-instruct.json").read_text())["cases"]


def greedy_ids(server: Server, prompt_ids: list[int], n: int = 64) -> list[int]:
    params = {"temperature": 0, "max_new_tokens": n, "ignore_eos": True}
    return server.post("/generate", input_ids=prompt_ids, sampling_params=params)["output_ids"]


def test_start_up_says_what_it_does_and_ready_comes_last(server):
    log = server.log.read_text()
    for beside in ("Weights loaded", "[1/"):  # weights are read while programs compile, so either may be first
        said = ["model", "Arguments:", "KV cache", beside, "The server is fired up and ready to roll!"]
        at = [log.index(line) for line in said]
        assert at == sorted(at)


def test_greedy_ids_are_golden(server, cases):
    for case in cases:
        assert greedy_ids(server, case["prompt_ids"]) == case["output_ids_64_ignore_eos"]


def test_chat_renders_the_template_and_answers_like_the_reference(server, cases):
    for case in (case for case in cases if case["messages"]):
        answer = server.client.chat.completions.create(
            model="default", messages=case["messages"], temperature=0, max_completion_tokens=64
        )
        expected = case["output_text"]
        assert answer.usage.prompt_tokens == len(case["prompt_ids"])
        text = answer.choices[0].message.content
        assert text == expected or (case["first_eos_index"] is None and text.startswith(expected))


def test_logprobs_are_golden(server, cases):
    for case in cases:
        answer = server.client.completions.create(
            model="default", prompt=case["prompt_ids"], temperature=0, max_tokens=8, logprobs=5,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        top = server.post(
            "/generate",
            input_ids=case["prompt_ids"],
            sampling_params={"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
            return_logprob=True,
            top_logprobs_num=5,
        )["meta_info"]["output_top_logprobs"]
        for step, (ours, reference) in enumerate(zip(top, case["top5_logprobs_first8"], strict=True)):
            assert [entry[1] for entry in ours] == [token for token, _ in reference]
            assert [entry[0] for entry in ours] == pytest.approx([value for _, value in reference], abs=2e-3)
            assert answer.choices[0].logprobs.token_logprobs[step] == pytest.approx(
                dict(map(tuple, reference))[case["output_ids_64_ignore_eos"][step]], abs=2e-3
            )


def test_streaming_gives_the_same_text(server, cases):
    client = server.client
    whole = client.completions.create(model="default", prompt=cases[0]["prompt_ids"], temperature=0, max_tokens=40)
    with client.completions.create(
        model="default", prompt=cases[0]["prompt_ids"], temperature=0, max_tokens=40, stream=True
    ) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_tokens_are_the_same_among_32_others(server, cases):
    others = [[(i * 977 + j * 131) % 40000 + 100 for j in range(10 + 5 * i)] for i in range(32)]
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        noise = [pool.submit(greedy_ids, server, other, 24) for other in others]
        ours = [pool.submit(greedy_ids, server, case["prompt_ids"]) for case in cases]
        assert [f.result() for f in ours] == [case["output_ids_64_ignore_eos"] for case in cases]
        assert all(len(f.result()) == 24 for f in noise)


def test_a_shared_prefix_of_512_tokens_is_computed_once(server):
    def cached(*last: int) -> int:
        prompt = [*((7 * i) % 30000 + 200 for i in range(512)), *last]
        answer = server.post("/v1/completions", prompt=prompt, max_tokens=2, temperature=0)
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    before = server.metric("sgl_jax_prefix_cache_hit_tokens_total")
    assert cached(1000, 1001) == 0
    found = cached(2000, 2001)
    assert found >= 496
    assert server.metric("sgl_jax_prefix_cache_hit_tokens_total") == before + found


def test_any_mix_of_parameters_compiles_nothing(server):
    mixes = [
        {"temperature": 0},
        {"temperature": 1.0, "top_p": 0.9, "seed": 3},
        {"temperature": 1.5, "top_k": 5000, "min_p": 0.0001},
        {"temperature": 0.7, "presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
        {"logit_bias": {"100": 5}, "min_tokens": 4},
        {"logprobs": 5, "echo": True},
        {"n": 3, "temperature": 1.0, "stop": ["zebra"]},
    ]
    with concurrent.futures.ThreadPoolExecutor(len(mixes)) as pool:
        calls = [
            pool.submit(server.post, "/v1/completions", prompt="Once upon a time", max_tokens=8, **mix) for mix in mixes
        ]
        answers = [call.result() for call in calls]
    assert [len(a["choices"]) for a in answers] == [1, 1, 1, 1, 1, 1, 3]
    assert server.metric("sgl_jax_compiles_after_ready_total") == 0


def test_a_client_that_leaves_gives_its_pages_back(server):
    body = {"prompt": "Once", "max_tokens": 2000, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()  # kept alive: dropping it would close the connection
        next(lines)
        deadline = time.monotonic() + 10
        while server.metric("sgl_jax_num_requests_running") == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    while server.metric("sgl_jax_num_requests_running") or server.metric("sgl_jax_kv_usage_ratio"):
        assert time.monotonic() < deadline + 10, "the request went on without its client"
        time.sleep(0.05)


def cpu_seconds(pid: int) -> float:
    """Read the CPU seconds of a process and its children from /proc."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(cpu_seconds(int(child)) for child in children)


def test_idle_uses_under_2_percent_of_a_core(server):
    while httpx.get(f"{server.url}/get_server_info").json()["internal_states"][0]["num_compiling"]:
        time.sleep(0.5)
    time.sleep(1)
    before, start = cpu_seconds(server.process.pid), time.monotonic()
    time.sleep(4)
    used = (cpu_seconds(server.process.pid) - before) / (time.monotonic() - start)
    assert used < 0.02, f"{used:.1%} of a core"
