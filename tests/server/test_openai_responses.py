"""OpenAI's Responses API. The template makes the last message the whole prompt, which the fake engine repeats as its answer."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live_server import LiveServer

from fakes.fake_core import FakeCore
from messages import says

TEMPLATE = str(Path(__file__).parent / "tool_template.jinja")
TOOLS = [
    {"type": "function", "name": name, "parameters": {"type": "object", "properties": {"a": {}}}, "strict": False}
    for name in ("first", "second")
]
CALL = '<tool_call>\n{"name": "first", "arguments": {"a": [1, "é"]}}\n</tool_call>'
ANSWER = f"<think>\nHm é.\n</think>\n\nLet me see.\n{CALL}"


@pytest.fixture(scope="module")
def live(repeating: LiveServer) -> LiveServer:
    return repeating


def plain(response: Any) -> dict[str, Any]:
    """Return a response without what differs each time."""
    found = response.model_dump()
    for item in found["output"]:
        item.pop("id")
        item.pop("call_id", None)
    usage = found["usage"]
    usage.pop("input_tokens_details")
    return {name: value for name, value in found.items() if name not in ("id", "created_at", "completed_at")}


def test_a_stream_is_the_whole_response_in_events(client: openai.OpenAI) -> None:
    asked = {"model": "stories", "input": ANSWER, "tools": TOOLS, "metadata": {"a": "b"}, "temperature": 0.5}
    whole, events = client.responses.create(**asked), list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    final = events[-1].response
    assert plain(final) == plain(whole)
    assert (final.status, final.metadata, final.temperature) == ("completed", {"a": "b"}, 0.5)
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    kinds = [event.type for event in events if not event.type.endswith(".delta")]
    in_part = ["response.content_part.added", "{}.done", "response.content_part.done"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        *(each.format("response.reasoning_text") for each in in_part),
        "response.output_item.done",
        "response.output_item.added",
        *(each.format("response.output_text") for each in in_part),
        "response.output_item.done",
        "response.output_item.added",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    for i, item in enumerate(final.output):
        of_item = [event for event in events if getattr(event, "output_index", None) == i]
        ids = {event.item_id for event in of_item if hasattr(event, "item_id")} | {
            of_item[0].item.id,
            of_item[-1].item.id,
        }
        assert ids == {item.id}
        assert of_item[-1].item == item
        text = "".join(event.delta for event in of_item if event.type.endswith(".delta"))
        assert text == (item.arguments if item.type == "function_call" else item.content[0].text)
    assert final.output_text == "Let me see."
    assert final.output[2].call_id.startswith("call_")
    assert final.usage.output_tokens_details.reasoning_tokens > 0
    assert final.usage.total_tokens == final.usage.input_tokens + final.usage.output_tokens


def test_a_conversation_goes_on_from_a_stored_response(client: openai.OpenAI) -> None:
    first = client.responses.create(model="stories", input=CALL, tools=TOOLS, instructions="Be kind.")
    assert client.responses.retrieve(first.id) == first
    output = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "ok"}
    second = client.responses.create(model="stories", input=[output], previous_response_id=first.id, tools=TOOLS)
    assert second.previous_response_id == first.id
    third = client.responses.create(model="stories", input="Bye.", previous_response_id=second.id)
    assert third.output_text.strip() == "Bye."
    client.responses.delete(first.id)
    for call in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            call(first.id)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model="stories", input="a", previous_response_id=first.id)
    assert caught.value.param == "previous_response_id"
    unstored = client.responses.create(model="stories", input="a", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unstored.id)


def test_items_of_a_conversation_are_messages(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
        "{% for c in m.tool_calls or [] %}[{{ c.function.name }}{{ c.function.arguments.a }}]{% endfor %}|{% endfor %}{{ tools or '' }}"
    )
    items: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "input_text", "text": "x"}, {"type": "input_text", "text": "y"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "z", "annotations": []}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": '{"a": 2}'},
        {"type": "function_call_output", "call_id": "1", "output": "o"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "p"}]},
        {"role": "developer", "content": "d"},
    ]
    with LiveServer(lambda: FakeCore(step_seconds=0.001), chat_template=str(template)) as live, live.openai() as client:
        response = client.responses.create(model="stories", input=items, instructions="s")
    text = "system:s|user:x\ny|assistant:z(t)[f1][g2]|tool:o|tool:p|developer:d|"
    assert response.output_text.replace("system:d", "developer:d").strip() == text


def test_a_length_that_is_reached_is_said(client: openai.OpenAI) -> None:
    response = client.responses.create(model="stories", input="a b c d e", max_output_tokens=2)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete"
    *_, last = client.responses.create(model="stories", input="a b c d e", max_output_tokens=2, stream=True)
    assert last.type == "response.incomplete"


@pytest.mark.parametrize("stream", [True, False])
def test_a_running_response_can_be_cancelled(stream: bool) -> None:
    with LiveServer(lambda: FakeCore(step_seconds=0.05), chat_template=TEMPLATE) as live, live.openai() as client:
        ended: list[Any] = []
        text = "a long story that takes a while to be told " * 4
        if stream:
            events = iter(client.responses.create(model="stories", input=text, stream=True))
            response_id = next(events).response.id
            cancelled = client.responses.cancel(response_id)
            ended += [list(events)[-1].response]
        else:
            asking = threading.Thread(target=lambda: ended.append(client.responses.create(model="stories", input=text)))
            asking.start()
            while not (running := [rid for rid in live.service._choices.keys_of if rid.startswith("resp_")]):
                pass
            cancelled = client.responses.cancel(running[0])
            asking.join()
        assert (cancelled.status, cancelled.incomplete_details.reason) == ("cancelled", "cancelled")
        assert ended[0].status == "cancelled"
        assert ended[0].id == cancelled.id
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            client.responses.cancel(cancelled.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.cancel("resp_0")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_image"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "not supported"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"tools": [{"type": "mcp", "server_label": "a"}]}, "mcp"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "a"}, "conversation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "third"}}, "third"),
        ({"nonsense": 1}, "nonsense"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(http: httpx.Client, more: dict[str, Any], said: str) -> None:
    response = http.post("/v1/responses", json={"input": "a"} | more)
    assert response.status_code == 400
    assert says(response.json()["error"]["message"], said), response.text


def test_a_body_that_no_answer_can_repeat_is_refused(http: httpx.Client) -> None:
    body, kind = rb'{"input": "a", "metadata": {"a": "\ud800"}}', {"content-type": "application/json"}
    response = http.post("/v1/responses", content=body, headers=kind)
    assert response.status_code == 400
    assert says(response.json()["error"]["message"], "surrogate")


def test_items_of_a_stored_response_can_be_referred_to(client: openai.OpenAI) -> None:
    first = client.responses.create(model="stories", input="Hello there.")
    reference = {"type": "item_reference", "id": first.output[0].id}
    second = client.responses.create(model="stories", input=[{"role": "user", "content": "Hm."}, reference])
    assert second.output_text.strip() == "Hello there."  # the last message, which the template shows
    for unknown in ("msg_0", "rs_0"):
        with pytest.raises(openai.NotFoundError, match=unknown):
            client.responses.create(model="stories", input=[{"type": "item_reference", "id": unknown}])


def test_what_an_agent_sends_is_taken(http: httpx.Client, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "instructions": "Be kind.",
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "b"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "c"}]},
        ],
        "tools": TOOLS,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "store": False,
        "text": {"verbosity": "medium"},
        "client_metadata": {"x": "y"},
        "access_programs": None,
        "prompt_cache_key": "k",
    }
    with (
        LiveServer(
            lambda: FakeCore(step_seconds=0.001),
            chat_template="{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}{{ tools or '' }}",
        ) as live,
        live.http() as other,
    ):
        response = other.post("/v1/responses", json=asked | {"tools": []})
    assert response.status_code == 200, response.text
    text = response.json()["output"][0]["content"][0]["text"]
    assert text.strip() == "system:Be kind.\n\na|user:b\n\nc|"
    answer = client.responses.create(model="stories", input=ANSWER, tools=TOOLS)
    items = [item.model_dump() for item in answer.output]
    output = {"type": "function_call_output", "call_id": answer.output[2].call_id, "output": "ok"}
    assert client.responses.create(model="stories", input=[*items, output], tools=TOOLS).status == "completed"


def test_a_stored_response_is_given_as_it_is(http: httpx.Client) -> None:
    found = http.post("/v1/responses", json={"input": "a"}).json()
    refused = http.get(f"/v1/responses/{found['id']}?stream=true")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stream")


def test_items_of_an_input_are_listed(client: openai.OpenAI, http: httpx.Client) -> None:
    items: list[dict[str, Any]] = [
        {"role": "developer", "content": "d"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "z", "annotations": []}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", "id": "fc_mine"},
        {"type": "function_call_output", "call_id": "1", "output": "o"},
    ]
    response = client.responses.create(model="stories", input=items)
    found = list(client.responses.input_items.list(response.id, order="asc", limit=2))  # the client asks for each page
    assert [each.type for each in found] == [each.get("type", "message") for each in items]
    assert len({each.id for each in found}) == 5
    assert found[3].id == "fc_mine"
    assert [found[i].content[0].model_dump(exclude_none=True) for i in range(2)] == [
        {"type": "input_text", "text": "d"},
        {"type": "output_text", "text": "z", "annotations": []},
    ]
    assert list(client.responses.input_items.list(response.id)) == found[::-1]
    page = client.responses.input_items.list(response.id, order="asc", limit=1, after="fc_mine")
    assert (page.data, page.has_more) == (found[4:], False)
    [only] = client.responses.input_items.list(client.responses.create(model="stories", input="Hi.").id)
    assert (only.role, only.content[0].text) == ("user", "Hi.")
    path = f"/v1/responses/{response.id}/input_items"
    for name, value in (("limit", "0"), ("limit", "x"), ("order", "up"), ("after", "msg_0"), ("include", "a")):
        refused = http.get(path, params={name: value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)
    assert http.get("/v1/responses/resp_0/input_items").status_code == 404


def test_items_whose_id_came_before_get_new_ones(client: openai.OpenAI) -> None:
    items: Any = [{"type": "message", "id": "msg_a", "role": "user", "content": text} for text in "abcde"]
    response = client.responses.create(model="stories", input=items)
    pages = itertools.islice(client.responses.input_items.list(response.id, order="asc", limit=1), 20)
    found: list[Any] = list(pages)
    assert [each.content[0].text for each in found] == [*"abcde"]
    assert found[0].id == "msg_a"
    assert len({each.id for each in found}) == 5


def test_a_running_response_is_found() -> None:
    with LiveServer(lambda: FakeCore(step_seconds=0.05), chat_template=TEMPLATE) as live, live.openai() as client:

        def begun(**more: Any) -> tuple[Any, str]:
            events = iter(client.responses.create(model="stories", input="a long story " * 4, stream=True, **more))
            return events, next(events).response.id

        events, running = begun()
        assert client.responses.retrieve(running).status == "in_progress"
        assert len(client.responses.input_items.list(running).data) == 1
        with pytest.raises(openai.ConflictError, match="in_progress"):
            client.responses.create(model="stories", input="a", previous_response_id=running)
        final = list(events)[-1].response
        assert client.responses.retrieve(running) == final
        deleted, unstored = begun(), begun(store=False)
        client.responses.delete(deleted[1])
        for _, each in (deleted, unstored):
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(each)
        for events, each in (deleted, unstored):
            assert list(events)[-1].type == "response.completed"
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(each)


def test_old_responses_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgl_jax.server.stored_responses._MOST", 2)
    with LiveServer(FakeCore, chat_template=TEMPLATE) as live, live.openai() as client:
        ids = [client.responses.create(model="stories", input="a").id for _ in range(3)]
        assert client.responses.retrieve(ids[2]).id == ids[2]
        with pytest.raises(openai.NotFoundError, match="latest 2"):
            client.responses.retrieve(ids[0])
