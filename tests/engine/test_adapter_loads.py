"""Adapters on the engine's side: every request is answered by the version that was loaded when it came.

The fake device mixes the number of the load that is in a row's slot into its KV, so a wrong slot, a stale prefix or a slot
that was given away too early gives wrong tokens.
"""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings

from fakes.fake_adapters import FakeCopy, FakeHosts
from messages import says
from sgl_jax.engine.adapter_loads import Adapters
from sgl_jax.engine.messages import Abort, AdapterLoaded, AdapterUnloaded, LoadAdapter, Refused, UnloadAdapter
from sgl_jax.scheduler.adapter_slots import MOST_PASSED
from simulated import Client, make_core

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9]


def make_client(slots: int = 2, *, hosts: FakeHosts | None = None, **options) -> Client:
    return Client(make_core(adapters=Adapters(hosts or FakeHosts(), slots), vocab_size=64, eos=63, **options))


def load(
    client: Client, path: str = "a", *, name: str = "name", pinned: bool = False, call: int = 1
) -> AdapterLoaded | Refused:
    client.core.handle(LoadAdapter(call, name, path, pinned))
    client.run()
    said = client.said.pop()
    assert isinstance(said, AdapterLoaded | Refused)
    return said


def loaded(client: Client, **options) -> int:
    said = load(client, **options)
    assert isinstance(said, AdapterLoaded)
    return said.adapter.number


def test_requests_of_several_adapters_and_of_the_model_run_in_one_step() -> None:
    client = make_client()
    first, second = loaded(client), loaded(client)
    for key, adapter in enumerate((0, first, second, first), 1):
        client.submit(key, PROMPT, adapter=adapter, max_tokens=6, temperature=0.0, ignore_eos=True)
    client.run()
    for answer in client.answers.values():
        answer.check(64)
    assert client.tokens[2] == client.tokens[4]
    assert len({tuple(tokens) for tokens in client.tokens.values()}) == 3
    plans = client.core.runner.plans
    assert max(len(plan.rows) for plan in plans) == 4
    assert sum(len(plan.adapter_loads) for plan in plans) == 2


def test_a_prefix_is_reused_by_its_own_load_alone_and_freed_at_the_unload() -> None:
    client = make_client(page_size=4)
    number = loaded(client)
    for key, adapter in ((1, number), (2, number), (3, 0)):
        client.submit(key, PROMPT, adapter=adapter, max_tokens=2)
        client.run()
    cached = [client.answers[key].prompt.num_cached_tokens for key in (1, 2, 3)]
    assert cached == [0, 8, 0]
    client.core.handle(UnloadAdapter(7, number))
    client.run()
    assert client.said.pop() == AdapterUnloaded(7, 2)
    again = loaded(client)
    client.submit(4, PROMPT, adapter=again, max_tokens=2)
    client.run()
    assert client.answers[4].prompt.num_cached_tokens == 0
    for answer in client.answers.values():
        answer.check(64)


def test_an_unload_waits_for_the_requests_that_use_the_adapter() -> None:
    client = make_client()
    number = loaded(client)
    client.submit(1, PROMPT, adapter=number, max_tokens=20, ignore_eos=True)
    client.step()
    client.core.handle(UnloadAdapter(5, number))
    for _ in range(5):
        client.step()
    assert client.said == []
    client.run()
    assert isinstance(client.said.pop(), AdapterUnloaded)
    client.answers[1].check(64)


def test_a_load_is_refused_for_what_is_wrong_with_its_files_or_for_want_of_unpinned_slots() -> None:
    client = make_client(slots=2)
    assert load(client, "bad files", call=3) == Refused(3, "bad files is bad", "lora_path")
    assert isinstance(load(client, pinned=True), AdapterLoaded)
    assert isinstance(load(client, pinned=True), AdapterLoaded)  # in the place of the one with its name
    refused = load(client, name="another", pinned=True)
    assert isinstance(refused, Refused)
    assert says(refused.message, "2 of 2 slots are pinned … raise --max-loras-per-batch")


def test_a_pinned_adapter_keeps_its_slot() -> None:
    client = make_client(slots=2)
    pinned = loaded(client, pinned=True)
    others = [loaded(client) for _ in range(4)]
    for key, adapter in enumerate([pinned, *others, pinned], 1):
        client.submit(key, PROMPT, adapter=adapter, max_tokens=1)
        client.run()
    loads = [int(each.source.split()[0]) for plan in client.core.runner.plans for each in plan.adapter_loads]
    assert loads == [pinned, *others]


def test_the_least_recently_used_slot_is_given_away() -> None:
    client = make_client(slots=2, hosts=FakeHosts(limit=4))
    a, b, c = (loaded(client) for _ in range(3))
    for key, adapter in enumerate([a, b, a, c, a, b], 1):
        client.submit(key, PROMPT, adapter=adapter, max_tokens=1)
        client.run()
    loads = [each for plan in client.core.runner.plans for each in plan.adapter_loads]
    assert [(each.slot, int(each.source.split()[0])) for each in loads] == [(0, a), (1, b), (1, c), (1, b)]


def test_requests_of_an_adapter_that_can_no_longer_be_read_are_told_why() -> None:
    hosts = FakeHosts(limit=1)
    client = make_client(slots=1, hosts=hosts)
    first, _ = loaded(client, path="x"), loaded(client, path="y")
    hosts.find_adapter = lambda source: FakeCopy(error="gone")
    client.submit(1, PROMPT, adapter=first, max_tokens=4)
    client.run()
    reason = client.answers[1].reason
    assert reason is not None
    assert (reason.type, reason.message) == ("abort", "gone")


def test_a_request_without_a_slot_lets_only_so_many_pass() -> None:
    client = make_client(slots=1, rows=4)
    busy, patient = loaded(client), loaded(client)
    keys = iter(range(1, 1000))
    for _ in range(3):
        client.submit(next(keys), PROMPT, adapter=busy, max_tokens=9, ignore_eos=True)
    client.step()
    waiting = next(keys)
    client.submit(waiting, PROMPT, adapter=patient, max_tokens=3, ignore_eos=True)
    for _ in range(400):
        if client.answers[waiting].reason is not None:
            break
        if sum(answer.reason is None for answer in client.answers.values()) < 4:
            client.submit(next(keys), PROMPT, adapter=busy, max_tokens=9, ignore_eos=True)
        client.step()
    passed = sum(key > waiting and bool(answer.tokens) for key, answer in client.answers.items())
    assert client.answers[waiting].reason is not None
    assert MOST_PASSED - 4 <= passed <= MOST_PASSED + 4
    client.run()
    for answer in client.answers.values():
        answer.check(64)


type Act = tuple[str, int, int]  # an act, the name it is about, and the steps before it


@settings(max_examples=120, deadline=None)
@given(
    acts=st.lists(
        st.tuples(
            st.sampled_from(["load", "unload", "ask", "ask", "ask", "abort"]), st.integers(0, 4), st.integers(0, 6)
        ),
        min_size=4,
        max_size=40,
    ),
    slots=st.integers(1, 3),
    room=st.integers(1, 4),
    overlap=st.booleans(),
    width=st.sampled_from([1, 3]),
    pages=st.integers(12, 30),
    ranks=st.sampled_from([1, 2]),
)
def test_every_request_is_answered_by_the_version_that_was_loaded_when_it_came(
    acts: list[Act], slots: int, room: int, overlap: bool, width: int, pages: int, ranks: int
) -> None:
    hosts = FakeHosts(looks=2, limit=max(room, slots))
    options = {"overlap": overlap, "num_usable_pages": pages, "width": lambda n: width, "ranks": ranks}
    client = make_client(slots, hosts=hosts, page_size=4, context_length=40, **options)
    versions: dict[int, int] = {}  # name -> number
    keys, calls = iter(range(1, 1000)), iter(range(1, 1000))
    for act, name, steps in acts:
        for _ in range(steps):
            client.step()
        if act == "load" and name not in versions:
            versions[name] = loaded_beside(client, next(calls))
        elif act == "unload" and name in versions:
            client.core.handle(UnloadAdapter(next(calls), versions.pop(name)))
        elif act == "ask":
            params = {"max_tokens": 1 + 3 * name, "ignore_eos": True}
            client.submit(next(keys), PROMPT, adapter=versions.get(name, 0), **params)
        elif act == "abort" and client.answers:
            client.core.handle(Abort([max(client.answers)]))
    client.run()
    for answer in client.answers.values():
        answer.check(64)
    unloads = [each for each in client.said if isinstance(each, AdapterUnloaded)]
    assert len(client.said) == len(unloads)
    assert client.core.scheduler.adapters.num_used <= slots


def loaded_beside(client: Client, call: int) -> int:
    """Load an adapter while requests run."""
    client.core.handle(LoadAdapter(call, "name", "path"))
    for _ in range(100):
        client.step()
        for said in client.said:
            if isinstance(said, AdapterLoaded) and said.call == call:
                client.said.remove(said)
                return said.adapter.number
    raise AssertionError("the adapter was never loaded")
