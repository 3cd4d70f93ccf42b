"""The layers around the application: request ids and log lines, pages of other sites, names, and how paths are read."""

from __future__ import annotations

import gzip
import json
import logging
import re
import time
from collections.abc import Iterator

import httpx
import pytest
from live_server import LiveServer
from raw_http import ask

from messages import says
from sgl_jax.settings.flag_parser import FlagError
from sgl_jax.settings.server_args import ServerArgs

CHAT = "/v1/chat/completions"
BODY = {"text": "Once", "sampling_params": {"max_new_tokens": 2}}
EVIL = "https://evil.example"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


@pytest.fixture(scope="module")
def keyed() -> Iterator[LiveServer]:
    with LiveServer(api_key="secret", allowed_origins="https://chat.example, https://b.example:8443") as server:
        yield server


def error(answer: httpx.Response) -> dict:
    return answer.json()["error"]


# --- pages of other sites ---------------------------------------------------------------------------------------------

OURS = (
    "http://localhost",
    "http://localhost:3000",
    "https://app.localhost:8080",
    "http://127.0.0.1:5173",
    "http://127.8.8.8",
    "http://[::1]:3000",
    "tauri://localhost",
    "app://obsidian.md",
)
FOREIGN = (
    EVIL,
    "null",
    "http://localhost.evil.example",
    "http://127.0.0.1.evil.example",
    "http://evil.example#.localhost",
    "http://evil.example/.localhost",
    "http://localhost:3000@evil.example",
    "http://10.0.0.1",
    "chrome-extension://abc",
    "",
    "http://127.0.0.1:3000, " + EVIL,
)


@pytest.mark.parametrize("origin", OURS)
def test_pages_of_this_machine_may_call(http: httpx.Client, origin: str) -> None:
    asked = http.options(CHAT, headers=PREFLIGHT | {"Origin": origin})
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == origin
    assert asked.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "POST" in asked.headers["access-control-allow-methods"]
    for path, body in (
        ("/generate", BODY),
        ("/generate", BODY | {"stream": True}),
        ("/generate", {}),
        ("/nothing", {}),
    ):
        answer = http.post(path, json=body, headers={"Origin": origin})
        assert answer.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize("origin", FOREIGN)
@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("OPTIONS", CHAT, PREFLIGHT),
        ("POST", "/flush_cache", {}),
        ("POST", "/flush_cache", {"Content-Type": "text/plain"}),
        ("POST", "/abort_request", {"Content-Type": "application/x-www-form-urlencoded"}),
        ("POST", "/generate", {"Content-Type": "application/json"}),
        ("GET", "/v1/models", {}),
    ],
)
def test_without_a_key_pages_of_other_sites_are_refused(
    http: httpx.Client, method: str, path: str, headers: dict, origin: str
) -> None:
    answer = http.request(method, path, content=b"{}", headers=headers | {"Origin": origin})
    assert answer.status_code == 403
    assert error(answer)["code"] == "origin_not_allowed"
    assert says(error(answer)["message"], f"{origin} … --allowed-origins")
    assert "access-control-allow-origin" not in answer.headers


def test_a_page_of_this_server_may_call_it(live: LiveServer, http: httpx.Client) -> None:
    assert http.post("/flush_cache", headers={"Origin": live.url}).status_code == 200
    named = {"Origin": "http://gpu-1:30000", "Host": "gpu-1:30000"}
    assert http.post("/flush_cache", headers=named).status_code == 200


def test_with_a_key_pages_are_told_what_they_may_and_the_key_decides(keyed: LiveServer) -> None:
    key = {"Authorization": "Bearer secret"}
    with keyed.http() as http:
        for origin in ("https://chat.example", "https://b.example:8443", "http://localhost:3000"):
            assert http.options(CHAT, headers=PREFLIGHT | {"Origin": origin}).status_code == 200
            unknown = http.post("/generate", json=BODY, headers={"Origin": origin})
            assert (unknown.status_code, unknown.headers["access-control-allow-origin"]) == (401, origin)
        for origin in (EVIL, "https://b.example", "http://chat.example"):
            asked = http.options(CHAT, headers=PREFLIGHT | {"Origin": origin})
            assert (asked.status_code, error(asked)["code"]) == (403, "origin_not_allowed")
            answer = http.post("/generate", json=BODY, headers=key | {"Origin": origin})
            assert answer.status_code == 200
            assert "access-control-allow-origin" not in answer.headers
        odd = http.options(CHAT, headers={"Origin": OURS[0], "Access-Control-Request-Method": "TRACE"})
        assert (odd.status_code, error(odd)["code"]) == (400, "cors")
        assert http.options(CHAT).status_code == 401  # no preflight


def test_every_origin_can_be_allowed() -> None:
    with LiveServer(allowed_origins="*") as server, server.http() as http:
        for origin in (EVIL, "null"):
            assert http.options(CHAT, headers=PREFLIGHT | {"Origin": origin}).status_code == 200
            answer = http.post("/generate", json=BODY, headers={"Origin": origin})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("allowed_origins", '["*"]'),
        ("allowed_origins", "https://a.example/"),
        ("allowed_origins", "a.example"),
        ("allowed_origins", "https://a.example,"),
        ("allowed_hosts", "a.example:80"),
        ("allowed_hosts", "http://a.example"),
        ("max_request_bytes", 1023),
    ],
)
def test_flags_say_what_they_take(flag: str, value: object) -> None:
    with pytest.raises(FlagError) as raised:
        ServerArgs(model_path="a", **{flag: value})
    assert says(str(raised.value), f"--{flag.replace('_', '-')} … {value} … must be")


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:30000", 200),
        ("localhost.", 200),
        ("a.localhost:1", 200),
        ("127.0.0.1:30000", 200),
        ("10.0.0.5", 200),
        ("[::1]:30000", 200),
        ("[::1]", 200),
        ("gpu-1:30000", 200),
        ("evil.example", 403),
        ("evil.example:30000", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("[evil.example]", 403),
    ],
)
def test_a_local_server_has_local_names_only(http: httpx.Client, host: str, status: int) -> None:
    answer = http.get("/v1/models", headers={"Host": host})
    assert answer.status_code == status
    if status == 403:
        assert says(error(answer)["message"], f"{host} … --allowed-hosts")
    assert http.get("/health", headers={"Host": host}).status_code == 200  # probes have names of their own


def test_allowed_hosts_are_names_of_the_server_and_a_key_or_a_network_needs_none() -> None:
    other = {"Host": "api.example"}
    with LiveServer(allowed_hosts="api.example") as server, server.http() as http:
        assert http.get("/v1/models", headers=other).status_code == 200
        assert http.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
    with LiveServer(host="0.0.0.0") as server, server.http() as http:
        assert http.get("/v1/models", headers=other).status_code == 200
    with LiveServer(api_key="secret") as server, server.http() as http:
        assert http.get("/v1/models", headers=other | {"Authorization": "Bearer secret"}).status_code == 200


def test_state_is_not_changed_by_a_link(http: httpx.Client) -> None:
    for path in ("/generate", "/abort_request", "/flush_cache", "/tokenize", "/detokenize", CHAT, "/v1/completions"):
        answer = http.get(path)
        assert (answer.status_code, answer.headers["allow"]) == (405, "OPTIONS, POST")


# --- request ids and log lines ----------------------------------------------------------------------------------------


def lines(caplog: pytest.LogCaptureFixture, count: int) -> list[str]:
    """Return the lines, of which so many come; each is written a moment after its answer."""
    deadline, found = time.monotonic() + 20, []
    while len(found) < count and time.monotonic() < deadline:
        time.sleep(0.005)
        found = [record.getMessage() for record in caplog.records if record.name == "sgl_jax.server.edge"]
    return found


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "sgl_jax")
    return caplog


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "prompt", "output"),
    [
        ("/generate", {"text": "Once", "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}, 2, 2),
        ("/generate", {"text": ["a", "b"], "sampling_params": {"max_new_tokens": 1, "n": 2}}, 4, 4),
        ("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 4, "n": 2, "ignore_eos": True}, 3, 8),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "ignore_eos": True}, None, 3),
    ],
)
def test_an_answer_has_the_id_of_its_request_and_a_line(
    http: httpx.Client,
    log: pytest.LogCaptureFixture,
    path: str,
    body: dict,
    prompt: int | None,
    output: int,
    stream: bool,
) -> None:
    answer = http.post(path, json=body | {"stream": stream}, headers={"X-Request-Id": "trace/1:a"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (200, "trace/1:a")
    http.get("/health")
    [line] = lines(log, 1)
    tokens = rf"{r'\d+' if prompt is None else prompt}\+{output} tokens"
    pattern = rf'127\.0\.0\.1:\d+ - "POST {path} HTTP/1\.1" 200 id=trace/1:a {tokens} \d+\.\d\d\d s'
    assert re.fullmatch(pattern, line)


def test_every_answer_has_an_id(http: httpx.Client, keyed: LiveServer) -> None:
    found = [
        http.get(path).headers["x-request-id"] for path in ("/v1/models", "/v1/models", "/nothing", "/health", CHAT)
    ]
    found.append(http.options(CHAT, headers=PREFLIGHT | {"Origin": EVIL}).headers["x-request-id"])
    found.append(httpx.get(f"{keyed.url}/v1/models").headers["x-request-id"])
    assert len(set(found)) == len(found)
    assert all(re.fullmatch(r"[0-9a-f]{32}", each) for each in found)


@pytest.mark.parametrize("given", ["", "a b", 'a"b', "a" * 129, "é", "a\tb"])
def test_an_id_that_cannot_be_given_back_is_refused(http: httpx.Client, given: str) -> None:
    answer = http.get("/v1/models", headers={"X-Request-Id": given.encode()})
    assert answer.status_code == 400
    assert says(error(answer)["message"], "x-request-id … 128")
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


def test_nothing_a_client_sends_makes_a_line_of_its_own(live: LiveServer, log: pytest.LogCaptureFixture) -> None:
    for target in (b'/a"%20200', b"/%0d%0aINFO", b'/a?b=%0a\xc2\x85"', b"/\x1b[31m", b"/" + b"a" * 5000):
        ask(live, b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    shown = lines(log, 3)
    assert len(shown) == 3  # the parser takes no control characters
    assert all(line.isascii() or "…" in line for line in shown)
    assert all(line.count('"') == 2 and line.isprintable() and len(line) < 700 for line in shown)


def test_an_error_of_ours_has_one_traceback_and_an_answer_like_others(
    live: LiveServer, http: httpx.Client, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> int:
        raise RuntimeError("lost")

    monkeypatch.setattr(live.service, "abort_all", fail)
    headers = {"Origin": "http://localhost:1", "X-Request-Id": "a"}
    answer = http.post("/abort_request", json={"abort_all": True}, headers=headers)
    assert (answer.status_code, error(answer)["type"]) == (500, "server_error")
    assert answer.headers["access-control-allow-origin"] == "http://localhost:1"
    assert answer.headers["x-request-id"] == "a"
    assert "lost" not in answer.text
    assert [record.name for record in log.records if record.exc_info] == ["sgl_jax.server.error_envelope"]
    assert " 500 id=a " in lines(log, 1)[-1]


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "x-gzip", "gzip, gzip", "klingon"])
def test_a_compressed_body_is_a_415_that_says_what_is_taken(http: httpx.Client, coding: str) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": coding}
    answer = http.post("/generate", content=gzip.compress(json.dumps(BODY).encode()), headers=headers)
    assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "identity")
    assert says(error(answer)["message"], f"content-encoding … {coding}")


@pytest.mark.parametrize("coding", ["identity", "Identity", ""])
def test_a_body_as_it_is_may_say_so(http: httpx.Client, coding: str) -> None:
    assert http.post("/generate", json=BODY, headers={"Content-Encoding": coding}).status_code == 200


@pytest.mark.parametrize(
    ("content", "type", "status"),
    [
        (b"\xef\xbb\xbf" + json.dumps(BODY).encode(), "application/json", 200),
        (json.dumps(BODY).encode(), "application/json; charset=utf-8", 200),
        (json.dumps(BODY).encode(), "application/json; charset=klingon", 200),  # RFC 8259: JSON has no charset
        (json.dumps(BODY).encode("utf-16"), "application/json", 200),
        ('{"text": "é"}'.encode("latin-1"), "application/json; charset=iso-8859-1", 400),
        (b"", "application/json", 400),
        (b"  ", "application/json", 400),
        (b"[" * 200_000, "application/json", 400),
        (json.dumps(BODY).encode(), "", 400),
        (json.dumps(BODY).encode(), "text/plain", 400),
        (b"text=Once", "application/x-www-form-urlencoded", 400),
    ],
    ids=range(11),
)
def test_bodies_are_json_in_unicode(http: httpx.Client, content: bytes, type: str, status: int) -> None:
    answer = http.post("/generate", content=content, headers={"Content-Type": type})
    assert answer.status_code == status
    if status == 400:
        assert "JSON" in error(answer)["message"]


def test_bodies_that_are_being_answered_have_a_limit_together() -> None:
    large = BODY | {"text": "a" * 70_000}
    with LiveServer(max_request_bytes=2**20) as server, server.http() as http:
        guard = server.app._app.app  # RequestLog has Pages, which have the Guard
        guard._num_bytes = 16 * 2**20
        answer = http.post("/generate", json=large)
        assert (answer.status_code, error(answer)["code"]) == (503, "too_many_bytes")
        assert answer.headers["retry-after"]
        assert http.post("/generate", json=BODY).status_code == 200
        guard._num_bytes = 0
        assert http.post("/generate", json=large).status_code == 400  # too long for the context
        assert guard._num_bytes == 0


# --- paths and methods ------------------------------------------------------------------------------------------------


def test_a_slash_behind_a_path_changes_nothing(http: httpx.Client) -> None:
    assert http.get("/v1/models/").json() == http.get("/v1/models").json()
    assert http.get("/v1/models/stories/").json()["id"] == "stories"
    assert http.get("/health//").status_code == 200
    assert (
        http.post("/generate/", json=BODY).json()["output_ids"]
        == http.post("/generate", json=BODY).json()["output_ids"]
    )
    assert http.get("/v1/models/other/").status_code == 404


@pytest.mark.parametrize("name", ["org/name", "/models/name/", "./name"])
def test_a_model_is_found_with_and_without_a_slash_behind_its_name(name: str) -> None:
    with LiveServer(served_model_name=name) as server:
        for asked in (name.rstrip("/"), name.rstrip("/") + "/"):
            answer = ask(server, f"GET /v1/models/{asked} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            assert (answer.status, json.loads(answer.body)["id"]) == (200, name)
            body = {"model": asked, "prompt": "a", "max_tokens": 1}
            assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200


def test_head_is_taken_wherever_get_is(http: httpx.Client) -> None:
    paths = [path for path, methods in http.get("/openapi.json").json()["paths"].items() if "get" in methods]
    for path in (*paths, "/docs", "/openapi.json", "/v1/models/"):
        asked = path.replace("{model}", "stories")
        got, head = http.get(asked), http.head(asked)
        assert (head.status_code, head.content) == (got.status_code, b"")
        assert head.headers["content-type"] == got.headers["content-type"]
        if path not in ("/metrics", "/get_server_info"):
            assert head.headers["content-length"] == got.headers["content-length"]
    assert (http.head(CHAT).status_code, http.head("/nothing").status_code) == (405, 404)


def test_options_says_what_a_path_takes(http: httpx.Client) -> None:
    for path, allowed in ((CHAT, "OPTIONS, POST"), ("/v1/models/", "GET, HEAD, OPTIONS")):
        answer = http.options(path)
        assert (answer.status_code, answer.headers["allow"], answer.content) == (204, allowed, b"")
        wrong = http.delete(path)
        assert (wrong.status_code, wrong.headers["allow"]) == (405, allowed)
        assert allowed in error(wrong)["message"]
    assert http.options("/nothing").status_code == 404


@pytest.mark.parametrize(
    ("path", "feature"),
    [
        ("/v1/audio/transcriptions", "audio"),
        ("/v1/images/generations/", "images"),
        ("/load_lora_adapter_from_tensors", "tensors"),
        ("/api/chat", "Ollama"),
    ],
)
def test_paths_that_are_not_built_say_so(http: httpx.Client, path: str, feature: str) -> None:
    answer = http.post(path, json={})
    assert (answer.status_code, error(answer)["code"]) == (404, "unsupported_path")
    assert says(error(answer)["message"], f"{path.rstrip('/')} … {feature} … not built")
    assert error(http.get("/v1/responsesX"))["code"] == "not_found"
