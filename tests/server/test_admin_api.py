"""Models, information, health and metrics."""

from __future__ import annotations

import re

import httpx
import msgspec
import openai
import pytest
from live_server import MODEL, TEMPLATE, LiveServer

import sgl_jax
from fakes.fake_core import FakeCore
from sgl_jax.engine.messages import Stats
from sgl_jax.observability.peer_metrics import NAMES


def test_models(client: openai.OpenAI, http: httpx.Client) -> None:
    card = client.models.retrieve("stories")
    assert (card.id, card.object, card.owned_by) == ("stories", "model", "sgl_jax")
    assert http.get("/v1/models").json()["data"][0]["max_model_len"] == 512


def test_a_model_id_may_have_slashes() -> None:
    with LiveServer(served_model_name="org/model") as server, server.openai() as client:
        assert client.models.retrieve("org/model").id == "org/model"


def test_information(http: httpx.Client) -> None:
    assert http.get("/version").json() == {"version": sgl_jax.__version__}
    model = http.get("/get_model_info").json()
    assert (model["model_path"], model["is_generation"], model["context_length"]) == (MODEL, True, 512)
    http.post("/generate", json={"text": "a"})
    server = http.get("/get_server_info").json()
    assert server["tokenizer_path"] == MODEL
    assert server["internal_states"][0]["last_gen_throughput"] == 0  # nothing runs now
    assert "avg_spec_accept_length" not in server["internal_states"][0]
    assert server["stream_interval"] == 1
    assert server["max_total_num_tokens"] == 16 * 512


def test_health(http: httpx.Client) -> None:
    for path in ("/health", "/ready", "/health_generate", "/ping"):
        assert http.get(path).status_code == 200
    assert http.post("/ping").status_code == 200
    with LiveServer(open_service=False, api_key="k") as starting, starting.http() as other:
        assert [other.get(path).status_code for path in ("/health", "/ping", "/load")] == [200, 503, 401]


def test_load_counts_what_is_not_answered() -> None:
    with LiveServer(lambda: FakeCore(step_seconds=0.01)) as server, server.http() as http:
        assert http.get("/load").json() == {"server_load": 0}
        body = {
            "text": "Once upon",
            "stream": True,
            "sampling_params": {"n": 3, "max_new_tokens": 200, "ignore_eos": True},
        }
        with http.stream("POST", "/generate", json=body) as answer:
            lines = answer.iter_lines()
            for _ in range(9):  # events of all three
                next(lines)
            assert httpx.get(f"{server.url}/load").json() == {"server_load": 3}
            [found] = httpx.get(f"{server.url}/get_load").json()
        assert (found["dp_rank"], found["num_reqs"], found["num_waiting_reqs"]) == (0, 3, 0)
        assert found["num_tokens"] >= 3 * 4


def test_the_tokenizer_is_described_without_a_path(http: httpx.Client) -> None:
    answer = http.get("/tokenizer_info")
    found = answer.json()
    names = ("bos_token", "eos_token", "unk_token", "tokenizer_class", "model_max_length", "vocab_size")
    assert [found[name] for name in names] == ["<s>", "</s>", "<unk>", "PreTrainedTokenizerFast", 512, 512]
    assert found["chat_template"] == TEMPLATE.read_text()
    assert found["added_tokens_decoder"]["1"] == {"content": "<s>", "special": True}
    assert MODEL not in answer.text


def test_metrics_count_what_happened() -> None:
    with LiveServer() as server, server.http() as http:
        for _ in range(2):
            http.post("/generate", json={"text": "Once upon", "sampling_params": {"n": 2}})
        http.post("/generate", json={"text": "Once upon", "sampling_params": {"max_new_tokens": 1}})
        http.post("/generate", json={})
        for path in ("/metrics", "/health", "/dashboard"):  # which do not count
            http.get(path)
        answer = http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        values = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
        expected = {
            f'sgl_jax_build_info{{model_name="stories",version="{sgl_jax.__version__}"}}': 1,
            "sgl_jax_num_requests_running": 0,
            "sgl_jax_num_requests_waiting": 0,
            "sgl_jax_prompt_tokens_total": 15,
            "sgl_jax_generation_tokens_total": 17,
            "sgl_jax_prefix_cache_hit_tokens_total": 8,
            "sgl_jax_preemptions_total": 0,
            "sgl_jax_compiles_after_ready_total": 0,
            "sgl_jax_generation_paused": 0,
            'sgl_jax_http_responses_total{status="200"}': 3,
            'sgl_jax_http_responses_total{status="400"}': 1,
            'sgl_jax_requests_finished_total{reason="stop"}': 4,
            'sgl_jax_requests_finished_total{reason="length"}': 1,
            "sgl_jax_time_to_first_token_seconds_count": 5,
            "sgl_jax_inter_token_latency_seconds_count": 12,
            "sgl_jax_e2e_request_latency_seconds_count": 5,
            'sgl_jax_e2e_request_latency_seconds_bucket{le="+Inf"}': 5,
        }
        assert {name: float(values[name]) for name in expected} == expected
        assert "spec_" not in answer.text
        head = http.head("/metrics")
        assert (head.status_code, head.text) == (200, "")


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        (
            "vllm",
            {
                'num_requests_running{engine="0",model_name="stories"}': 0,
                'kv_cache_usage_perc{engine="0",model_name="stories"}': 0,
                'prefix_cache_queries_total{engine="0",model_name="stories"}': 6,
                'prefix_cache_hits_total{engine="0",model_name="stories"}': 2,
                'prompt_tokens_total{engine="0",model_name="stories"}': 6,
                'request_success_total{engine="0",finished_reason="stop",model_name="stories"}': 2,
                'e2e_request_latency_seconds_bucket{engine="0",le="+Inf",model_name="stories"}': 2,
                'time_to_first_token_seconds_count{engine="0",model_name="stories"}': 2,
            },
        ),
        (
            "sglang",
            {
                'num_running_reqs{model_name="stories"}': 0,
                'num_queue_reqs{model_name="stories"}': 0,
                'token_usage{model_name="stories"}': 0,
                'cache_hit_rate{model_name="stories"}': 1 / 3,
                'generation_tokens_total{model_name="stories"}': 8,
                'inter_token_latency_seconds_count{model_name="stories"}': 6,
            },
        ),
    ],
)
def test_metrics_have_the_names_of_another_engine_too(peer: str, expected: dict[str, float]) -> None:
    with LiveServer(metrics_compat=peer) as server, server.http() as http:
        http.post("/generate", json={"text": "Once upon", "sampling_params": {"n": 2}})
        text = http.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values["sgl_jax_num_requests_running"] == "0.0"
    assert {name: float(values[f"{peer}:{name}"]) for name in expected} == expected
    shown = {re.sub(r"_total$", "", line.split(" ")[2]) for line in text.splitlines() if line.startswith("# TYPE")}
    drafts = {name for name in NAMES[peer] if name.startswith("spec_")}
    assert {f"{peer}:{name}" for name in NAMES[peer].keys() - drafts} <= shown


class Speculating(FakeCore):
    def _stats(self) -> Stats:
        counts = {"draft_steps": 4, "drafted_tokens": 12, "accepted_drafts": 6, "accepted_per_position": [3, 2, 1]}
        return msgspec.structs.replace(super()._stats(), spec_accept_length=2.25, spec_accept_rate=0.375, **counts)


def test_a_launch_that_speculates_has_numbers_of_its_drafts() -> None:
    with LiveServer(Speculating, metrics_compat="vllm") as server, server.http() as http:
        http.post("/generate", json={"text": "Once upon"})
        lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith("sgl_jax_spec_")]
        assert {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)} == {
            "sgl_jax_spec_accept_length": 2.25,
            "sgl_jax_spec_accept_rate": 0.375,
            "sgl_jax_spec_decode_num_drafts_total": 4,
            "sgl_jax_spec_decode_num_draft_tokens_total": 12,
            "sgl_jax_spec_decode_num_accepted_tokens_total": 6,
            'sgl_jax_spec_decode_num_accepted_tokens_per_pos_total{position="0"}': 3,
            'sgl_jax_spec_decode_num_accepted_tokens_per_pos_total{position="1"}': 2,
            'sgl_jax_spec_decode_num_accepted_tokens_per_pos_total{position="2"}': 1,
        }
        assert "\nvllm:spec_decode_num_drafts_total{" in http.get("/metrics").text
        assert http.get("/get_server_info").json()["internal_states"][0]["avg_spec_accept_length"] == 2.5
