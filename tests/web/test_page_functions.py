"""Functions of the pages, called in one page of a browser: what is kept, what is read, what an answer may contain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from live_server import LiveServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

USER = {"id": "u", "parent": "root", "role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def shared(browser: Browser) -> Iterator[Page]:
    with LiveServer() as server:
        page = browser.new_page()
        page.goto(f"{server.url}/web/kept.js")
        page.add_script_tag(url=f"{server.url}/web/vendor/purify.js")
        yield page
        page.close()


@pytest.fixture
def page(shared: Page) -> Page:
    shared.evaluate("localStorage.clear(); sessionStorage.clear()")
    return shared


def call(page: Page, module: str, body: str, *arguments: object) -> Any:
    """Run the body of a function: `m` is the module, `given` are the arguments."""
    function = f"async (given) => {{ const m = await import('/web/{module}.js'); {body} }}"
    return page.evaluate(function, list(arguments))


def chat(*turns: dict[str, Any]) -> dict[str, object]:
    found = {turn["id"]: turn for turn in turns}
    chosen = {turn["parent"]: turn["id"] for turn in turns}
    return {"id": "c", "title": "t", "system": "", "used": 1, "turns": found, "chosen": chosen}


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_two_tabs_keep_the_turns_of_both(page: Page) -> None:
    body = """const [a, b] = [given[0], structuredClone(given[0])];
        m.add(a, 'u', { role: 'assistant', content: 'A', finish: 'stop' });
        m.add(b, 'u', { role: 'assistant', content: 'B', finish: 'stop' });
        m.save(a); m.save(b);
        return Object.values(m.readAll()[0].turns).map(({ content }) => content).sort();"""
    assert call(page, "store", body, chat(USER)) == ["A", "B", "hi"]


def test_a_tab_that_saw_the_beginning_of_an_answer_does_not_undo_its_end(page: Page) -> None:
    body = """const turn = (content, finish) => ({ ...given[0], turns: { x: { ...given[0].turns.u, id: 'x', content, finish } } });
        m.save(turn('beginning and end', 'stop')); m.save(turn('beginning'));
        return m.readAll()[0].turns.x.content;"""
    assert call(page, "store", body, chat(USER)) == "beginning and end"


def test_a_failed_turn_is_discarded_unless_others_hang_from_it(page: Page) -> None:
    failed = {"id": "f", "parent": "u", "role": "assistant", "content": "", "error": "lost"}
    later = {"id": "l", "parent": "f", "role": "user", "content": "more"}
    body = """const [chat, turn] = given; m.save(chat); m.discard(chat, turn); m.save(chat);
        return Object.keys(m.readAll()[0].turns);"""
    assert call(page, "store", body, chat(USER, failed), failed) == ["u"]
    page.evaluate("localStorage.clear()")
    assert call(page, "store", body, chat(USER, failed, later), failed) == ["u", "f", "l"]


def test_files_are_checked(page: Page) -> None:
    body = """const file = JSON.stringify({ format: 'sgl_jax-chats-1', conversations: [given[0]] });
        try { const [found] = m.imported(file); return [Object.keys(found.turns), m.path(found).length, found.turns.u?.stats]; }
        catch (error) { return error.message; }"""
    damaged = {**USER, "stats": {"rate": None}}
    assert call(page, "store", body, chat(damaged)) == [["u"], 1, None]
    circle = [{**USER, "id": "a", "parent": "b"}, {**USER, "id": "b", "parent": "a"}]
    assert call(page, "store", body, chat(USER, *circle)) == [["u", "a", "b"], 1, None]
    root = {**USER, "id": "root"}
    assert call(page, "store", body, chat(root)) == "A conversation of the file is damaged."
    assert call(page, "store", "try { m.imported('{') } catch (error) { return error.message; }").startswith(
        "The file is"
    )


def test_keys_are_kept_by_the_path_of_the_server(page: Page) -> None:
    body = """m.key.set('tab', false); const first = [m.key.get(), m.key.isRemembered()];
        m.key.set('kept', true); return [...first, m.key.isRemembered(), Object.keys(localStorage), Object.keys(sessionStorage)];"""
    assert call(page, "api", body) == ["tab", False, True, ["sgl_jax:/web/:key"], []]


def test_a_full_store_keeps_nothing_and_stops_nothing(page: Page) -> None:
    full = "Storage.prototype.setItem = () => { throw new Error('full'); };"
    page.evaluate(f"() => {{ window.whole = Storage.prototype.setItem; {full} }}")
    try:
        assert call(page, "store", "return m.save(given[0])", chat(USER)) is False
        assert call(page, "api", "m.key.set('held', true); return m.key.get()") == "held"
        body = "const before = m.theme(); m.toggleTheme(); return [before, m.theme(), document.documentElement.dataset.theme]"
        assert call(page, "theme", body) == ["light", "dark", "dark"]
    finally:
        page.evaluate("() => { Storage.prototype.setItem = window.whole; }")


# --- what is sent and read --------------------------------------------------------------------------------------------


def test_a_wrong_key_is_told_from_none(page: Page) -> None:
    body = """const asked = [], real = window.fetch;
        m.key.set('', false);
        window.fetch = async (path, { headers }) => new Response('{}', { status: headers.Authorization === 'Bearer right' ? 200 : 401 });
        const on = { waiting() {}, key: async (wrong) => { asked.push(wrong); m.key.set(asked.length > 1 ? 'right' : 'bad', false); return true; } };
        try { await m.call('x', { on }); } finally { window.fetch = real; m.key.set('', false); }
        return asked;"""
    assert call(page, "api", body) == ["", "The server does not take this key."]


def test_a_rate_is_a_number(page: Page) -> None:
    body = """const real = window.fetch, turn = { content: '' };
        const event = { choices: [], usage: { prompt_tokens: 3, completion_tokens: 0 } };
        window.fetch = async () => new Response(`data: ${JSON.stringify(event)}\\n\\ndata: [DONE]\\n\\n`);
        try { await m.generate(turn, {}, { on: { waiting() {} }, special: new Set(), changed() {} }); } finally { window.fetch = real; }
        return turn.stats.rate;"""
    assert call(page, "generate", body) == 0


def test_only_what_may_be_a_list_is_read_as_one(page: Page) -> None:
    body = """const text = { type: 'string' }, list = { type: 'array', items: text };
        const properties = { stop: { anyOf: [text, list, { type: 'null' }] }, regex: { anyOf: [text, { type: 'null' }] } };
        const fields = m.fieldsOf({ components: { schemas: { ChatCompletionRequest: { properties } } } }, false);
        return m.paramsOf(fields, { params: { stop: '["x", "y"]', regex: '[A-Z]{3}' }, schema: '' });"""
    assert call(page, "settings", body) == {"stop": ["x", "y"], "regex": "[A-Z]{3}"}


def test_only_a_token_that_begins_inside_a_character_is_amid_one(page: Page) -> None:
    body = """const read = m.scoreReader(new Set());
        const content = given[0].map((bytes) => ({ token: 'x', logprob: -1, top_logprobs: [], bytes }));
        return read({ content }).map(({ amid = false }) => amid);"""
    tokens = [[0xFF], [97], [0xE4, 0xB8], [0xAD], [98], [0xE4], [99], [100]]
    assert call(page, "tokens", body, tokens) == [False, False, False, True, False, False, True, False]


def test_an_alternative_of_only_space_begins_no_answer_of_a_chat(page: Page) -> None:
    body = """const token = { text: 'Hi', at: 0 }, turn = { tokens: [token], content: 'Hi' };
        const begin = (text, plain) => m.beginning(turn, token, text, { special: new Set(), plain });
        return [begin(' ', false), begin('\\n', false), begin(' ', true), begin('Ho', false)];"""
    assert call(page, "tokens", body) == [None, None, " ", "Ho"]


def test_lists_keep_their_start_and_tables_their_columns(page: Page) -> None:
    body = "const place = document.createElement('p'); place.append(m.rendered(given[0])); return place.innerHTML;"
    found = call(page, "markdown", body, "3. x\n\n|a|\n|:-:|\n|b|\n")
    assert '<ol start="3">' in found
    assert '<td align="center">b</td>' in found
