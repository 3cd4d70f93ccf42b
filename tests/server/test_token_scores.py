"""SGLang's /score: probabilities of named tokens after query and item, of a fake engine whose logprobs are known."""

from __future__ import annotations

import math
from typing import Any

import httpx
import pytest
from live_server import LiveServer, tokenizer

from sgl_jax.engine.messages import Generate


def sent(live: LiveServer) -> list[Generate]:
    return [each for each in live.core.commands if isinstance(each, Generate)]


def test_probabilities_of_labels_after_each_item(live: LiveServer, http: httpx.Client) -> None:
    """The best tokens are the forced one and the 19 after it: the third label needs a request of its own."""
    before = len(sent(live))
    body = {"query": [5, 6], "items": [[7], [8, 9]], "label_token_ids": [10, 12, 300], "model": "stories"}
    found = http.post("/v1/score", json=body).json()
    best, third, forced = math.exp(-1 / 8), math.exp(-1 / 8 - 2), math.exp(-1 / 8)
    assert found["scores"] == [pytest.approx([best, third, forced])] * 2
    assert (found["object"], found["model"]) == ("scoring", "stories")
    assert found["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    requests = sent(live)[before:]
    assert [each.prompt_ids for each in requests] == [[5, 6, 7], [5, 6, 8, 9]] * 2
    assert [[*each.params.logit_bias] for each in requests] == [[10], [10], [300], [300]]
    assert {each.params.max_tokens for each in requests} == {1}


def test_texts_are_joined_and_scores_may_be_among_themselves(live: LiveServer, http: httpx.Client) -> None:
    body = {"query": "Is it so? ", "items": "Once", "label_token_ids": [10, 11], "apply_softmax": True, "priority": 0}
    [scores] = http.post("/score", json=body).json()["scores"]
    assert scores == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))])
    assert sent(live)[-1].prompt_ids == tokenizer().encode("Is it so? Once")
    http.post("/score", json=body | {"item_first": True})
    assert sent(live)[-1].prompt_ids == tokenizer().encode("OnceIs it so? ")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"label_token_ids": [512]}, "label_token_ids"),
        ({"label_token_ids": []}, "label_token_ids"),
        ({"query": None}, "query"),
        ({"items": None}, "items"),
        ({"items": [[5]]}, "query"),
        ({"items": ["a", "word " * 600]}, "items[1]"),
        ({"text_1": "a"}, "text_1"),
        ({"use_activation": True}, "use_activation"),
        ({"priority": 1}, "priority"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(http: httpx.Client, more: dict[str, Any], param: str) -> None:
    answer = http.post("/score", json={"query": "a", "items": ["b"], "label_token_ids": [5], **more})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_more_items_than_the_queue_takes_are_refused_and_labels_wait() -> None:
    with LiveServer(max_queued_requests=2) as server, server.http() as http:
        body = {"query": "a", "items": ["b", "c"], "label_token_ids": [5, 100, 200, 300]}
        assert len(http.post("/score", json=body).json()["scores"]) == 2
        refused = http.post("/score", json=body | {"items": ["a", "b", "c"]}).json()["error"]
    assert refused["param"] == "items"
