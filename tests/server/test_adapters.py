"""LoRA adapters over HTTP: how requests name them, and how they are loaded and unloaded.

An answer is the prompt, with 100 added to each token for each number of the adapter.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from live_server import MODEL, LiveServer

from fakes.fake_core import FakeCore, fake_info
from messages import says
from sgl_jax.engine.messages import Generate, LoadAdapter, UnloadAdapter

ONCE = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 2}}
KEY = "secret"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("late", "broken"):
        (folder / name).mkdir()
    info = fake_info(adapters=("tales", "b:c"))
    with LiveServer(lambda: FakeCore(info, 0.002), api_key=KEY, lora_dir=str(folder)) as server:
        yield server


@pytest.fixture(scope="module")
def http(server: LiveServer) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, timeout=20, headers=headers) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with server.openai(KEY) as client:
        yield client


def error(answer: httpx.Response, status: int, message: str) -> dict[str, Any]:
    assert answer.status_code == status
    found = answer.json()["error"]
    assert says(found["message"], message)
    return found


def used(server: LiveServer) -> int:
    """Return the adapter of the last request."""
    return next(each.adapter for each in reversed(server.core.commands) if isinstance(each, Generate))


def loaded(http: httpx.Client) -> list[str]:
    return [card["id"] for card in http.get("/v1/models").json()["data"]]


@pytest.mark.parametrize(
    ("model", "number"),
    [
        ("stories", 0),
        ("default", 0),
        ("tales", 1),
        ("stories:tales", 1),
        ("default:tales", 1),
        ("b:c", 2),
        ("stories:b:c", 2),
    ],
)
def test_model_names_an_adapter(server: LiveServer, client: openai.OpenAI, model: str, number: int) -> None:
    chat = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "a"}], max_tokens=1)
    assert (chat.model, used(server)) == (model, number)
    text = client.completions.create(model=model, prompt=[5, 6], max_tokens=2, logprobs=0)
    assert (text.model, used(server)) == (model, number)
    stream = client.completions.create(model=model, prompt=[5], max_tokens=1, stream=True)
    assert ({chunk.model for chunk in stream}, used(server)) == ({model}, number)


def test_lora_path_names_an_adapter(server: LiveServer, http: httpx.Client) -> None:
    def ids(lora_path: object, **body: object) -> list[list[int]]:
        answer = http.post("/generate", json=ONCE | {"lora_path": lora_path} | body).json()
        return [each["output_ids"] for each in (answer if isinstance(answer, list) else [answer])]

    assert [ids(name) for name in (None, "tales", "b:c")] == [[[5, 6]], [[105, 106]], [[205, 206]]]
    several = {"input_ids": [[5, 6], [7, 8]]}
    assert ids(["tales", None], **several) == [[105, 106], [7, 8]]
    assert ids("b:c", **several) == [[205, 206], [207, 208]]


def test_unknown_names_get_a_404_that_lists_the_known_ones(client: openai.OpenAI, http: httpx.Client) -> None:
    for model in ("tale", "stories:tale", "", "stories:", "../late", "late/", "Tales"):
        for path, body in (
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
            ("/tokenize", {"prompt": "a"}),
            ("/detokenize", {"tokens": [5]}),
        ):
            text = f"the model {model} does not exist … stories … tales, b:c"
            found = error(http.post(path, json=body | {"model": model}), 404, text)
            assert (found["param"], found["code"]) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("tale")
    for body in (
        {"lora_path": "tale"},
        {"lora_path": ["tales", "tale"], "input_ids": [[5], [6]]},
        {"lora_path": "../late"},
    ):
        found = error(http.post("/generate", json=ONCE | body), 404, "lora_path is … tales, b:c")
        assert (found["param"], found["code"]) == ("lora_path", "model_not_found")


@pytest.mark.parametrize(
    ("lora_path", "message"),
    [
        ("", "lora_path … 1 character"),
        (7, "lora_path … string"),
        (["tales"] * 3, "lora_path … 3 entries for 1 prompts"),
        ([], "lora_path … 0 entries for 1 prompts"),
        ([7], "lora_path"),
    ],
)
def test_a_lora_path_that_is_no_name_is_refused(http: httpx.Client, lora_path: object, message: str) -> None:
    found = error(http.post("/generate", json=ONCE | {"lora_path": lora_path}), 400, message)
    assert found["param"].startswith("lora_path")


def test_models_are_listed_with_their_parent(client: openai.OpenAI, http: httpx.Client) -> None:
    cards = {card["id"]: (card["root"], card["parent"]) for card in http.get("/v1/models").json()["data"]}
    assert {name: cards[name] for name in ("stories", "tales", "b:c")} == {
        "stories": (MODEL, None),
        "tales": ("/tales", "stories"),
        "b:c": ("/b:c", "stories"),
    }
    assert client.models.retrieve("tales").parent == "stories"  # type: ignore[attr-defined]
    for model in ("tales", "stories:b:c"):
        assert http.post("/tokenize", json={"model": model, "prompt": "a"}).status_code == 200
        assert http.post("/detokenize", json={"model": model, "tokens": [5]}).status_code == 200


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_loading_and_unloading(server: LiveServer, http: httpx.Client, prefix: str) -> None:
    load, unload = f"{prefix}/load_lora_adapter", f"{prefix}/unload_lora_adapter"
    new = {"lora_name": "new", "lora_path": "/new"}
    answer = http.post(load, json=new | {"pinned": True})
    assert (answer.status_code, answer.json()["success"], answer.json()["loaded_adapters"]["new"]) == (
        200,
        True,
        "/new",
    )
    assert server.core.commands[-1] == LoadAdapter(server.core.commands[-1].call, "new", "/new", pinned=True)
    http.post("/generate", json=ONCE | {"lora_path": "new"}).raise_for_status()
    first = used(server)
    error(http.post(load, json=new), 400, "lora_name is new … /new … load_inplace")
    found = error(http.post(load, json={"lora_name": "x", "lora_path": "/broken"}), 400, "/broken … adapter_config")
    assert (found["param"], "x" in loaded(http)) == ("lora_path", False)
    again = http.post(load, json=new | {"load_inplace": True, "lora_path": "/newer"})
    assert again.json()["loaded_adapters"]["new"] == "/newer"
    http.post("/generate", json=ONCE | {"lora_path": "new"}).raise_for_status()
    assert used(server) == first + 1
    assert UnloadAdapter(server.core.commands[-2].call, first) in server.core.commands
    assert "new" in loaded(http)
    answer = http.post(unload, json={"lora_name": "new"})
    assert (answer.status_code, "new" in answer.json()["loaded_adapters"], "new" in loaded(http)) == (200, False, False)
    error(http.post("/generate", json=ONCE | {"lora_path": "new"}), 404, "lora_path is new … tales")
    assert error(http.post(unload, json={"lora_name": "new"}), 404, "lora_name is new … tales")["param"] == "lora_name"


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/load_lora_adapter", {"lora_name": "a"}, "lora_path is missing"),
        ("/v1/load_lora_adapter", {"lora_name": "", "lora_path": "/a"}, "lora_name … 1 character"),
        ("/v1/load_lora_adapter", {"lora_name": "stories", "lora_path": "/a"}, "lora_name is stories … served model"),
        ("/v1/load_lora_adapter", {"lora_name": "a\n", "lora_path": "/a"}, "lora_name … visible"),
        (
            "/v1/load_lora_adapter",
            {"lora_name": "a", "lora_path": "/a", "is_3d_lora_weight": True},
            "is_3d_lora_weight",
        ),
        ("/load_lora_adapter", {"lora_name": "a", "lora_path": "/a", "added_tokens_config": {}}, "added_tokens_config"),
        ("/v1/unload_lora_adapter", {"lora_name": "tales", "lora_int_id": 1}, "lora_int_id"),
        ("/unload_lora_adapter", {}, "lora_name is missing"),
    ],
)
def test_what_cannot_be_loaded_or_unloaded(http: httpx.Client, path: str, body: dict, message: str) -> None:
    error(http.post(path, json=body), 400, message)
    assert "tales" in loaded(http)


def test_adapters_are_loaded_by_who_has_the_key(server: LiveServer) -> None:
    body = {"lora_name": "tales", "lora_path": "/new"}
    for path in ("load", "unload"):
        for prefix in ("/v1/", "/"):
            answer = httpx.post(f"{server.url}{prefix}{path}_lora_adapter", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_an_adapter_in_the_folder_is_loaded_by_its_name(server: LiveServer, http: httpx.Client) -> None:
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(http.post("/v1/completions", json={"model": "late", "prompt": "a", "max_tokens": 1}))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 4
    loads = [each for each in server.core.commands if isinstance(each, LoadAdapter) and each.name == "late"]
    assert [(each.path, each.pinned) for each in loads] == [(f"{server.args.lora_dir}/late", False)]
    assert "late" in loaded(http)
    for body in ({"model": "broken", "prompt": "a"}, {"model": "stories:broken", "prompt": "a"}):
        found = error(http.post("/v1/completions", json=body), 400, "broken … adapter_config")
        assert found["param"] == "model"
    error(http.post("/generate", json=ONCE | {"lora_path": "broken"}), 400, "broken … adapter_config")


def test_requests_that_run_keep_their_adapter(server: LiveServer, http: httpx.Client) -> None:
    http.post("/load_lora_adapter", json={"lora_name": "passing", "lora_path": "/passing"}).raise_for_status()
    body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}, "lora_path": "passing"}
    usual, server.core.step_seconds = server.core.step_seconds, 0.05  # the answer would take 20 s
    answers: list[Any] = []
    with http.stream("POST", "/generate", json=body | {"stream": True}) as running:
        lines = running.iter_lines()
        next(lines)
        unloading = threading.Thread(
            target=lambda: answers.append(http.post("/unload_lora_adapter", json={"lora_name": "passing"}))
        )
        unloading.start()
        while not any(isinstance(each, UnloadAdapter) for each in server.core.commands[-3:]):
            assert unloading.is_alive()
        error(http.post("/generate", json=body), 404, "lora_path is passing")
        assert answers == []
        server.core.step_seconds = usual
        last = [line for line in lines if line][-2]
    unloading.join()
    assert '"completion_tokens":400' in last
    assert answers[0].status_code == 200


def test_metrics_and_the_log_name_adapters(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sgl_jax.server.edge"):
        http.post("/generate", json=ONCE | {"lora_path": "b:c"})
        http.post("/generate", json={"input_ids": [[5], [6], [7]], "lora_path": ["b:c", "tales", None]})
        http.post("/generate", json=ONCE)
        metrics = http.get("/metrics").text
    named = [re.findall(r" adapter=(\S+)", line) for line in caplog.messages]
    assert named == [["b%3Ac"], ["b%3Ac", "tales"], []]
    assert f"sgl_jax_lora_adapters {len(loaded(http)) - 1:.1f}" in metrics.splitlines()
    assert "sgl_jax_lora_adapters_on_device 0.0" in metrics
    assert "sgl_jax_lora_adapter_loads_total 0.0" in metrics


def test_a_launch_without_adapters_names_the_flag() -> None:
    with LiveServer() as server, server.http() as http:
        error(http.post("/generate", json=ONCE | {"lora_path": "a"}), 400, "no LoRA adapters … --enable-lora")
        assert http.post("/generate", json=ONCE | {"lora_path": None}).json()["output_ids"] == [5, 6]
        for path in ("/v1/load_lora_adapter", "/load_lora_adapter"):
            error(http.post(path, json={"lora_name": "a", "lora_path": "/a"}), 400, "--enable-lora")
        error(http.post("/unload_lora_adapter", json={"lora_name": "a"}), 400, "--enable-lora")
        asked = {"prompt": "a", "model": "stories:a"}
        error(http.post("/v1/completions", json=asked), 404, "stories:a … stories … --enable-lora")
        found = error(http.post("/v1/completions", json=asked | {"model": "a"}), 404, "the model a … stories")
        assert "lora" not in found["message"]
        assert http.get("/v1/models").json()["data"][0]["parent"] is None


def test_an_engine_that_loads_knows_no_names_yet() -> None:
    with LiveServer(open_service=False) as server, server.http() as http:
        for path, body in (
            ("/v1/models", None),
            ("/v1/completions", {"prompt": "a", "model": "tales"}),
            ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/a"}),
        ):
            answer = http.get(path) if body is None else http.post(path, json=body)
            error(answer, 503, "starting")
