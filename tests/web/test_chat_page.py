"""Tests of the chat page in a browser. The server's model repeats the last message, thoughts and calls in Qwen's format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from live_server import LiveServer

from fakes.fake_core import FakeCore

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page, Route

    from conftest import Visits

SERVER_TESTS = Path(__file__).parents[1] / "server"
LONG = "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 7  # 229 tokens; prompt and answer fit into the context
REPEAT = {"chat_template": str(SERVER_TESTS / "tool_template.jinja"), "reasoning_parser": "qwen3"}


@pytest.fixture(scope="module")
def repeating() -> Iterator[LiveServer]:
    with LiveServer(lambda: FakeCore(step_seconds=0.001), **REPEAT) as server:
        yield server


@pytest.fixture
def slow(repeating: LiveServer) -> Iterator[LiveServer]:
    """Take 30 ms per token, so that there is time to stop."""
    repeating.core.step_seconds = 0.03
    yield repeating
    repeating.core.step_seconds = 0.001


@pytest.fixture
def page(visit: Callable[..., Page], repeating: LiveServer) -> Page:
    return visit(repeating.url)


def send(page: Page, text: str) -> Locator:
    """Send a message and return its answer, which has ended."""
    count = page.get_by_label("assistant").count()
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")
    answer = page.get_by_label("assistant").nth(count)
    ended(answer)
    return answer


def ended(answer: Locator) -> None:
    answer.get_by_role("button", name="Regenerate").wait_for()


def answers(page: Page) -> list[str]:
    return [text.strip() for text in page.locator(".assistant .markdown").all_inner_texts()]


def last_request(server: LiveServer) -> Any:
    return [command for command in server.core.commands if type(command).__name__ == "Generate"][-1]


# --- chat, history, branches ------------------------------------------------------------------------------------------


def test_an_answer_comes_with_its_figures_and_survives_a_reload(page: Page) -> None:
    figures = send(page, "Hi **there**").locator(".figures").inner_text()
    assert re.fullmatch(
        r"\d+ tokens · [\d.]+ tokens/s · first after \d+ ms · prompt \d+, 0 cached · \d+ of 512 in context · stop",
        figures,
    )
    assert page.locator(".markdown strong").inner_text() == "there"
    page.reload()
    assert answers(page) == ["Hi there"]
    assert page.locator(".list .title").inner_text() == "Hi **there**"
    cached = send(page, "Hi **there**").locator(".figures").inner_text()
    assert int(re.findall(r"(\d+) cached", cached)[0]) > 0


def test_shift_enter_writes_a_new_line(page: Page) -> None:
    page.get_by_label("Message").fill("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    page.get_by_label("assistant").wait_for()
    assert page.locator(".user .text").inner_text() == "one\ntwo"


def test_an_answer_streams_and_escape_stops_it(visit: Callable[..., Page], slow: LiveServer) -> None:
    page = visit(slow.url)
    text = LONG
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")
    page.locator(".assistant .markdown").filter(has_text="a b c").wait_for()
    page.keyboard.press("Escape")
    ended(page.get_by_label("assistant"))
    assert 5 <= len(answers(page)[0]) < len(text) - 20
    assert page.locator(".figures").inner_text() == "stopped"
    page.get_by_role("button", name="Send").wait_for()


def test_another_answer_and_an_edit_are_branches(page: Page) -> None:
    answer = send(page, "first")
    answer.get_by_role("button", name="Regenerate").click()
    page.get_by_text("2/2").wait_for()
    ended(page.get_by_label("assistant"))
    page.get_by_label("Previous branch").click()
    page.get_by_text("1/2").wait_for()
    page.get_by_label("Message").press("ArrowUp")
    page.get_by_label("Edit", exact=True).fill("second")
    page.keyboard.press("Enter")
    page.locator(".user").get_by_text("2/2").wait_for()
    ended(page.get_by_label("assistant"))
    assert answers(page) == ["second"]
    page.locator(".user").get_by_label("Previous branch").click()
    assert answers(page) == ["first"]
    page.reload()
    assert answers(page) == ["first"]
    page.get_by_label("assistant").get_by_role("button", name="Edit").click()
    page.get_by_label("Edit", exact=True).fill("mine")
    page.get_by_role("button", name="Save").click()
    assert answers(page) == ["mine"]
    page.locator(".assistant").get_by_text("3/3").wait_for()


def test_an_answer_is_kept_when_the_page_goes_while_another_conversation_is_shown(
    visit: Callable[..., Page], slow: LiveServer
) -> None:
    page = visit(slow.url)
    page.get_by_label("Message").fill(LONG)
    page.keyboard.press("Enter")
    page.locator(".assistant .markdown").filter(has_text="a b c").wait_for()
    page.get_by_role("button", name="New chat").click()
    page.reload()
    page.locator(".list .title").click()
    assert answers(page)[0].startswith("a b c")


def test_what_failed_is_tried_again_beside_what_came_later(visits: Visits, page: Page) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_label("Message").fill("one")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Try again").wait_for()
    page.unroute("**/v1/chat/completions")
    send(page, "two")
    page.get_by_role("button", name="Try again").click()
    page.get_by_text("2/2").wait_for()
    ended(page.get_by_label("assistant"))
    page.get_by_label("Previous branch").click()
    assert page.locator(".user .text").all_inner_texts() == ["one", "two"]
    visits.forgive("ERR_FAILED")


def test_the_chosen_model_is_waited_for(page: Page) -> None:
    page.evaluate("localStorage['sgl_jax:/:settings'] = JSON.stringify({ model: 'second' })")
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/v1/models", hold)
    page.reload()
    page.get_by_label("Message").fill("hi")
    page.keyboard.press("Enter")
    page.locator(".cursor").wait_for()
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body="data: [DONE]\n\n"))
    with page.expect_request("**/v1/chat/completions") as asked:
        models = [{"id": name, "max_model_len": 512} for name in ("first", "second")]
        held[0].fulfill(json={"data": models})
    assert json.loads(asked.value.post_data or "")["model"] == "second"


def test_a_full_store_is_said(page: Page) -> None:
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('full'); }; }")
    send(page, "hi")
    page.get_by_role("alert").filter(has_text="store is full").wait_for()


def test_conversations_are_found_deleted_and_brought_back(page: Page) -> None:
    send(page, "apples")
    page.get_by_role("button", name="New chat").click()
    send(page, "pears")
    titles = page.locator(".list .title")
    page.get_by_label("Search").fill("APP")
    assert titles.all_inner_texts() == ["apples"]
    titles.click()
    assert answers(page) == ["apples"]
    page.get_by_label("Delete apples").click()
    page.get_by_label("Search").fill("")
    assert titles.all_inner_texts() == ["pears"]
    page.get_by_role("button", name="Undo").click()
    page.reload()
    assert sorted(page.locator(".list .title").all_inner_texts()) == ["apples", "pears"]


def test_a_file_carries_conversations_to_another_browser(
    visit: Callable[..., Page], repeating: LiveServer, tmp_path: Path
) -> None:
    page = visit(repeating.url)
    send(page, "carry me")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    file = tmp_path / "chats.json"
    download.value.save_as(file)
    other = visit(repeating.url)
    other.get_by_label("Import").set_input_files(file)
    other.get_by_role("button", name="carry me", exact=True).click()
    assert answers(other) == ["carry me"]
    broken = json.loads(file.read_text())
    next(iter(broken["conversations"][0]["turns"].values()))["content"] = {"not": "a text"}
    file.write_text(json.dumps(broken))
    other.get_by_label("Import").set_input_files(file)
    other.get_by_text("A conversation of the file is damaged.").wait_for()


# --- what answers may not do ------------------------------------------------------------------------------------------

HOSTILE = """<img src=x onerror=alert(1)> <script>alert(2)</script>
[link](javascript:alert(3)) ![pixel](https://evil.example/p.png) <style>body{display:none}</style>
<form action=//evil.example><input></form> <p style="position:fixed">x</p> <iframe src=//evil.example></iframe>

<svg onload=alert(4)><a href="https://evil.example">ok</a></svg>
```js"onclick=alert(5)
1 < 2
```"""


def test_hostile_output_is_only_text(page: Page) -> None:
    answer = send(page, HOSTILE)
    page.wait_for_timeout(200)
    inside = "img, script, style, form, input, iframe, svg, [style], [onclick], [onerror], [onload]"
    assert answer.locator(".markdown").locator(inside).count() == 0
    links = answer.locator(".markdown a")
    assert [link.get_attribute("href") for link in links.all() if link.get_attribute("href")] == [
        "https://evil.example/p.png"
    ]
    assert {link.get_attribute("rel") for link in links.all()} == {"noopener noreferrer"}
    assert "<img src=x onerror=alert(1)>" in answer.inner_text()


def test_code_can_be_copied(visit: Callable[..., Page], repeating: LiveServer) -> None:
    page = visit(repeating.url, permissions=["clipboard-read", "clipboard-write"])
    send(page, "```python\nprint(1)\n```").locator("pre .copy").click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "print(1)\n"


# --- thoughts, calls, grammar, parameters -----------------------------------------------------------------------------


def test_a_thought_is_folded_and_a_call_takes_its_result(page: Page, repeating: LiveServer) -> None:
    thinking = send(page, "<think>secret</think>open")
    assert answers(page) == ["open"]
    assert not thinking.get_by_text("secret").is_visible()
    thinking.get_by_text("Thought").click()
    assert thinking.get_by_text("secret").is_visible()
    page.get_by_role("button", name="Settings").click()
    page.get_by_text("All parameters").click()
    page.get_by_label("tools").fill('[{"type": "function", "function": {"name": "add"}}]')
    call = send(page, '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>')
    assert call.locator(".call code").inner_text() == "add"
    assert json.loads(call.locator(".call pre").inner_text()) == {"x": 1}
    assert page.get_by_label("Message").get_attribute("placeholder") == "Result of add"
    send(page, "it is 3")
    assert page.locator(".tool .text").inner_text() == "it is 3"
    assert answers(page)[-1] == "it is 3"


def test_parameters_are_those_of_the_api(visits: Visits, page: Page, repeating: LiveServer) -> None:
    page.get_by_role("button", name="Settings").click()
    first = page.locator(".settings > .field code")
    first.first.wait_for()
    assert first.all_inner_texts()[:4] == ["temperature", "top_p", "top_k", "min_p"]
    page.get_by_label("temperature").fill("0.5")
    page.get_by_label("top_k", exact=True).fill("7")
    page.get_by_label("stop", exact=True).fill('["x", "y"]')
    page.get_by_text("All parameters").click()
    page.get_by_label("ignore_eos").select_option("true")
    page.get_by_label("max_tokens", exact=True).fill("3")
    send(page, "Hello there")
    params = last_request(repeating).params
    assert (params.temperature, params.top_k, params.max_tokens, params.ignore_eos) == (0.5, 7, 3, True)
    page.get_by_label("temperature").fill("-1")
    page.get_by_label("Message").fill("again")
    page.keyboard.press("Enter")
    page.get_by_role("alert").filter(has_text="temperature: Input should be greater").wait_for()
    visits.forgive("400")


def test_an_answer_follows_a_schema(page: Page, repeating: LiveServer) -> None:
    page.get_by_role("button", name="Settings").click()
    box = page.get_by_label("JSON schema of the answer")
    box.fill("{")
    page.get_by_role("alert").filter(has_text="The JSON schema is not valid JSON").wait_for()
    box.fill('{"type": "object", "properties": {"weight": {"type": "number"}}}')
    send(page, "{}")
    assert "weight" in repr(last_request(repeating).params)


# --- probabilities and prompts ----------------------------------------------------------------------------------------


def test_an_alternative_begins_a_branch(page: Page, repeating: LiveServer) -> None:
    page.get_by_label("Probabilities").check()
    send(page, "Once upon a time")
    tokens = page.locator(".token")
    assert tokens.all_inner_texts()[:2] == [" Once", " upon"]
    tokens.nth(1).hover()
    choices = page.get_by_label("Alternatives").get_by_role("button")
    assert choices.count() == 6
    assert [choices.nth(0).locator(part).inner_text() for part in ("code", "span")] == ["␣upon", "77.9 %"]
    other = choices.nth(1).locator("code").inner_text().replace("␣", " ")
    choices.nth(1).click()
    page.locator(".assistant").get_by_text("2/2").wait_for()
    ended(page.get_by_label("assistant"))
    page.get_by_label("Probabilities").uncheck()
    assert answers(page)[0].startswith(f"Once{other}")
    page.get_by_label("Probabilities").check()
    tokens.nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator(".alternatives button:focus").count() == 1
    page.keyboard.press("Escape")
    page.locator(".alternatives").wait_for(state="detached")
    page.keyboard.press("ArrowLeft")
    page.locator(".alternatives").wait_for()
    page.get_by_label("Message").focus()
    page.locator(".alternatives").wait_for(state="detached")


def test_a_prompt_is_shown_by_token_with_what_was_cached(page: Page) -> None:
    send(page, "Once upon a time")
    again = send(page, "Once upon a time")
    again.get_by_role("button", name="Prompt").click()
    pieces = page.locator(".piece")
    pieces.first.wait_for()
    assert "".join(pieces.all_inner_texts()).strip() == "Once upon a time"
    assert page.locator(".piece.cached").count() == pieces.count() - 1
    page.get_by_role("button", name="Template").click()
    assert "messages[-1].content" in page.locator("dialog pre").inner_text()
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="detached")


def test_a_prompt_is_shown_with_the_parameters_that_change_it(page: Page) -> None:
    send(page, "hi")
    tools = [{"type": "function", "function": {"name": "add"}}]
    params = {"tools": json.dumps(tools), "temperature": "0.5"}
    page.evaluate("params => { localStorage['sgl_jax:/:settings'] = JSON.stringify({ params }); }", params)
    page.reload()
    with page.expect_request("**/tokenize") as asked:
        page.get_by_label("assistant").get_by_role("button", name="Prompt").click()
    body = json.loads(asked.value.post_data or "")
    assert body["tools"] == tools
    assert "temperature" not in body
    page.locator(".piece").first.wait_for()


# --- models without a template, keys, errors --------------------------------------------------------------------------


def test_a_model_without_template_completes_text(visit: Callable[..., Page]) -> None:
    with LiveServer(chat_template=None) as server:
        page = visit(server.url)
        page.get_by_text("Write a text for the model to continue.").wait_for()
        page.get_by_label("Probabilities").check()
        page.get_by_label("Message").fill("Once upon")
        page.keyboard.press("Enter")
        ended(page.get_by_label("assistant"))
        assert page.locator(".token").all_inner_texts()[1:3] == [" Once", " upon"]
        page.locator(".token").nth(2).hover()
        page.get_by_label("Alternatives").get_by_role("button").nth(1).click()
        page.get_by_text("2/2").wait_for()
        ended(page.get_by_label("assistant"))


def test_the_key_is_asked_for_and_a_start_waited_for(visits: Visits) -> None:
    with LiveServer(open_service=False, api_key="secret", **REPEAT) as server:
        page = visits.open(server.url)
        field = page.get_by_label("API key of this server")
        field.fill("ключ")
        page.keyboard.press("Enter")
        assert page.locator("input:invalid").count() == 1
        field.fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_role("alert").filter(has_text="The server does not take this key.").wait_for()
        field.fill("secret")
        page.keyboard.press("Enter")
        page.get_by_text("the engine is still starting Trying again…").wait_for()
        server.in_loop(lambda: server.loop.create_task(opened(server)))
        page.get_by_text("Trying again").wait_for(state="detached")
        send(page, "with key")
        page.reload()
        send(page, "still")
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
        visits.forgive("401", "503")


async def opened(server: LiveServer) -> None:
    await server.service.start()
    server.service.open()


def test_a_lost_connection_is_said_and_tried_again(visits: Visits, page: Page) -> None:
    send(page, "one")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_label("Message").fill("two")
    page.keyboard.press("Enter")
    page.get_by_role("alert").filter(has_text="No connection to the server.").wait_for()
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body='data: {"choices": []}\n\n'))
    page.get_by_role("button", name="Try again").click()
    page.get_by_role("alert").filter(has_text="The connection to the server was lost.").wait_for()
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    ended(page.get_by_label("assistant").nth(1))
    assert answers(page)[-1] == "two"
    visits.forgive("ERR_FAILED")


# --- looks ------------------------------------------------------------------------------------------------------------


def test_it_is_dark_where_the_system_is_or_the_user_says_so(visit: Callable[..., Page], repeating: LiveServer) -> None:
    page = visit(repeating.url, color_scheme="dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(colour)
    page.get_by_role("button", name="Light").click()
    light = page.evaluate(colour)
    assert light != dark
    page.reload()
    assert page.evaluate(colour) == light
    page.emulate_media(color_scheme="light")
    page.get_by_role("button", name="Dark").click()
    assert page.evaluate(colour) == dark


def test_a_phone_shows_all_of_it(visit: Callable[..., Page], repeating: LiveServer) -> None:
    page = visit(repeating.url, viewport={"width": 360, "height": 640}, has_touch=True)
    send(page, "word " * 20 + "\n\n`" + "x" * 60 + "`")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert not page.get_by_role("button", name="New chat").is_visible()
    page.get_by_role("button", name="Conversations").tap()
    page.get_by_role("button", name="New chat").tap()
    assert not page.get_by_role("button", name="New chat").is_visible()
    page.get_by_role("button", name="Settings").tap()
    page.get_by_label("temperature").fill("1")


def test_little_stands_before_the_first_paint(page: Page) -> None:
    """How long it takes is the machine's doing, and only bounded; what it waits for is the page's."""
    page.evaluate(
        """() => new Promise((done) => new PerformanceObserver((found) =>
            found.getEntriesByName('first-contentful-paint').length && done()).observe({type: 'paint', buffered: true}))"""
    )
    paint, requests, size, blocking = page.evaluate(
        """() => { const paint = performance.getEntriesByName('first-contentful-paint')[0].startTime;
            const files = performance.getEntriesByType('resource').filter((each) => each.responseEnd <= paint && each.name.includes('/web/'));
            return [paint, files.length, files.reduce((sum, each) => sum + each.encodedBodySize, 0),
                document.querySelectorAll('script:not([type=module], [defer])').length]; }"""
    )
    assert 0 < requests <= 18
    assert 0 < size <= 60_000
    assert blocking == 0
    assert paint <= 3000
