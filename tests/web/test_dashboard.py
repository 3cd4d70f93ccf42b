"""The dashboard in a browser: its numbers move, its states are those of the server, and it reads Prometheus' format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from live_server import LiveServer

from fakes.fake_core import FakeCore, fake_info
from sgl_jax.engine.messages import Starting

if TYPE_CHECKING:
    from playwright.sync_api import Page

type Visit = Callable[..., Page]

HISTOGRAM = """# TYPE sgl_jax_x histogram
sgl_jax_x_bucket{le="0.1"} %d
sgl_jax_x_bucket{le="0.2"} %d
sgl_jax_x_bucket{le="+Inf"} %d
"""


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer(lambda: FakeCore(fake_info(adapters=("poet",)), step_seconds=0.01)) as live:
        yield live


@pytest.fixture(scope="module")
def parsing(server: LiveServer, browser: Any) -> Iterator[Page]:
    """A page in which the module of numbers can be called."""
    page = browser.new_page()
    page.goto(f"{server.url}/web/dashboard_data.js")
    yield page
    page.close()


def call(page: Page, function: str, *arguments: object) -> Any:
    return page.evaluate(
        f"async (given) => {{ const data = await import('/web/dashboard_data.js'); return ({function})(data, ...given); }}",
        list(arguments),
    )


def output(page: Page, key: str) -> str:
    return page.locator(f'output[data-key="{key}"]').inner_text()


def shown(page: Page, key: str, pattern: str) -> None:
    page.locator(f'output[data-key="{key}"]', has_text=re.compile(pattern)).wait_for(state="attached")


def status(page: Page, expected: str) -> None:
    page.locator("[data-testid=status]", has_text=re.compile(f"^{expected}$")).wait_for()


def test_numbers_move_when_requests_are_answered(server: LiveServer, visit: Visit) -> None:
    page = visit(f"{server.url}/dashboard")
    status(page, "ready")
    shown(page, "running", "^0$")
    assert output(page, "ttft50") == "–"
    body = {"text": "Once upon", "sampling_params": {"max_new_tokens": 250, "ignore_eos": True}}
    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(httpx.post, f"{server.url}/generate", json=body, timeout=30) for _ in range(4)]
        shown(page, "running", "^[1-4]$")
        shown(page, "generated", "[1-9]")
        shown(page, "hits", "[1-9].* %$")
        shown(page, "itl95", "s$")
        assert {answer.result().status_code for answer in answers} == {200}
    httpx.post(f"{server.url}/generate", json={})
    shown(page, "refused", "[1-9]")
    shown(page, "adapters", "^1$")
    launch = page.locator(".launch").inner_text()
    assert "FakeForCausalLM" in launch
    assert "8,192 tokens in pages of 16: 16 full contexts" in launch


def test_the_pointer_shows_the_numbers_of_its_time_in_every_panel(server: LiveServer, visit: Visit) -> None:
    page = visit(f"{server.url}/dashboard", color_scheme="dark")
    page.locator("canvas").nth(8).wait_for(state="attached")
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light dark"
    dark = page.evaluate("getComputedStyle(document.querySelector('.line1')).color")
    page.emulate_media(color_scheme="light")
    assert page.evaluate("getComputedStyle(document.querySelector('.line1')).color") != dark
    shown(page, "running", "^0$")
    cursors = page.locator(".u-cursor-x:not(.u-off)")
    for x in range(20, 220, 10):  # a chart that was just drawn anew learns of the pointer when it moves
        page.locator(".u-over").first.hover(position={"x": x, "y": 20})
        if cursors.count() > 3:
            break
        page.wait_for_timeout(200)
    assert cursors.count() > 3


def test_a_key_is_asked_for_and_kept_as_the_chat_keeps_it(visits: Any) -> None:
    with LiveServer(api_key="secret") as server:
        page = visits.open(f"{server.url}/dashboard")
        page.get_by_label("API key").fill("ключ")
        page.get_by_role("button", name="Use").click()
        assert page.locator("input:invalid").count() == 1
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Use").click()
        page.get_by_text("The server does not take this key.").wait_for()
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Use").click()
        status(page, "ready")
        assert page.evaluate("sessionStorage['sgl_jax:/:key']") == "secret"
        page.close()
    visits.forgive("401")


def test_a_file_of_limits_is_checked(server: LiveServer, visit: Visit, tmp_path: Path) -> None:
    page = visit(f"{server.url}/dashboard")
    file = tmp_path / "limits.json"
    file.write_text("not JSON")
    page.get_by_label("File").set_input_files(file)
    page.get_by_role("alert").filter(has_text="limits.json is not a file that measure_limits wrote.").wait_for()
    file.write_text(json.dumps({"memory_gb_per_s": 20, "device_kind": "other", "num_devices": 2}))
    page.get_by_label("File").set_input_files(file)
    page.get_by_text("The file is of 2 × other.").wait_for()
    assert page.get_by_role("alert").count() == 0


def test_starting_paused_and_stopped_are_told_apart(visits: Any) -> None:
    with LiveServer(open_service=False) as server:
        server.in_loop(lambda: server.service._on_event(Starting(0.45, 3, 9, compiles=True, seconds_left=40)))
        page = visits.open(f"{server.url}/dashboard")
        status(page, "starting")
        page.get_by_text(
            "weights 45%, programs 3 of 9, compiling: the first start takes longest, about 40 s left"
        ).wait_for()
        assert page.get_by_label("programs").evaluate("each => each.value / each.max") == pytest.approx(1 / 3)
    status(page, "stopped")
    page.close()
    visits.forgive("503", "ERR_")


def test_a_pause_is_said(server: LiveServer, visit: Visit) -> None:
    server.in_loop(lambda: setattr(server.service.trainer, "holds", True))
    page = visit(f"{server.url}/dashboard")
    status(page, "paused")
    server.in_loop(lambda: setattr(server.service.trainer, "holds", False))
    status(page, "ready")


def test_text_is_read_as_prometheus_writes_it(parsing: Page) -> None:
    text = (
        '# HELP a b\na 1\nsgl_jax_b{x="1",y="q\\"}\\\\ ,\\n"} 2.5e+06\nsgl_jax_b{x="2"} NaN\n\nc{le="+Inf"} +Inf 17\n'
    )
    found = call(parsing, "({ parse }, text) => parse(text)", text)
    assert found["a"] == [{"labels": {}, "value": 1}]
    assert found["b"][0] == {"labels": {"x": "1", "y": 'q"}\\ ,\n'}, "value": 2_500_000}
    assert found["b"][1]["value"] != found["b"][1]["value"]
    assert found["c"] == [{"labels": {"le": "+Inf"}, "value": float("inf")}]


@pytest.mark.parametrize(
    ("before", "now", "q", "expected"),
    [
        ((0, 0, 0), (10, 10, 10), 0.5, 0.05),
        ((5, 5, 5), (5, 15, 15), 0.5, 0.15),  # earlier values do not count
        ((0, 0, 0), (1, 2, 10), 0.95, 0.2),  # above the last bound, which is all that is known
        ((7, 8, 9), (7, 8, 9), 0.5, None),
        ((7, 8, 9), (2, 2, 2), 0.5, 0.05),  # the server has begun anew
    ],
)
def test_percentiles_are_those_between_two_scrapes(
    parsing: Page, before: tuple[int, ...], now: tuple[int, ...], q: float, expected: float | None
) -> None:
    function = "({ parse, quantile }, before, now, q) => quantile(parse(before), parse(now), 'x', q)"
    assert call(parsing, function, HISTOGRAM % before, HISTOGRAM % now, q) == (expected and pytest.approx(expected))


def test_a_step_is_held_against_the_limits_of_the_machine(parsing: Page) -> None:
    function = """({ parse, point }, before, now, engine, limits) =>
        point({ at: 1, metrics: parse(before) }, { at: 3, metrics: parse(now) }, engine, limits)"""
    names = ("decode_steps_total", "decode_step_seconds_total", "generation_tokens_total", "kv_usage_ratio")
    texts = [
        "\n".join(f"sgl_jax_{n} {v}" for n, v in zip(names, values, strict=True))
        for values in ((5, 1, 0, 0), (15, 3, 40, 0.5))
    ]
    engine = {"weight_bytes": 10**9, "max_total_tokens": 1000, "kv_bytes_per_token": 2 * 10**6}
    found = call(parsing, function, *texts, engine, {"memory_gb_per_s": 20})
    assert found["generated"] == 20
    assert found["decode"] == pytest.approx(0.2)
    assert found["least"] == pytest.approx(0.1)  # 2 GB at 20 GB/s
    assert found["bandwidth"] == pytest.approx(1e10)


def test_an_hour_is_kept_and_its_beginning_thinned(parsing: Page) -> None:
    function = """({ History }) => { const kept = new History(); for (let t = 0; t < 9000; t++) kept.add({ t });
        const times = kept.points.map((each) => each.t); return [times[0], times.at(-1), times.length, times.at(-600)]; }"""
    assert call(parsing, function) == [5400, 8999, 1100, 8400]


def test_a_scrape_from_before_a_pause_is_not_held_against_now(parsing: Page) -> None:
    function = "({ recent }, times) => recent(times.map(([t, at]) => ({ t, at }))).map(({ t }) => t)"
    assert call(parsing, function, [[t, t] for t in range(9)]) == [3, 4, 5, 6, 7, 8]
    assert call(parsing, function, [[1, 1], [2, 2], [30, 30], [31, 31]]) == [30, 31]
    assert call(parsing, function, [[1, 1], [2, 2], [900, 3]]) == [900]  # the machine slept


def test_a_counter_that_fell_tells_a_new_server(parsing: Page) -> None:
    function = "({ parse, beganAnew }, before, now) => beganAnew(parse(before), parse(now))"
    assert not call(parsing, function, "a_total 5\nb 9\n", "a_total 6\nb 1\n")
    assert call(parsing, function, 'a_total{x="1"} 5\n', "b_total 1\n")
