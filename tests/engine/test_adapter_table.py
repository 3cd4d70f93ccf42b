"""Names of adapters on the API side, over an engine that a test plays by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_service import STORIES, HandTransport, run, settle

from fakes.fake_core import fake_info
from messages import says
from sgl_jax.engine.adapter_table import AdapterTable, folder_in
from sgl_jax.engine.generation import Conflict, EngineFailed, GenerationRequest, UnknownAdapter
from sgl_jax.engine.messages import AdapterInfo, AdapterLoaded, Command, LoadAdapter, Ready, UnloadAdapter
from sgl_jax.engine.service import GenerationService
from sgl_jax.engine.watchdog import Watchdog
from sgl_jax.request import InvalidParameter, SamplingParams


class Hand:
    """Engine whose answers a test gives one by one, in the order of the commands."""

    def __init__(self, *names: str, folder: Path | None = None, max_lora_rank: int = 16):
        self.commands: list[Any] = []
        self._waiting: list[asyncio.Future[Any]] = []
        info = fake_info(adapters=names, max_lora_rank=max_lora_rank)
        self.table = AdapterTable(info, self._ask, folder and str(folder))

    async def _ask(self, command: Callable[[int], Command], answer: type) -> Any:
        self.commands.append(command(0))
        self._waiting.append(asyncio.get_running_loop().create_future())
        return await self._waiting[-1]

    async def answer(self, answer: object) -> None:
        await settle()
        future = self._waiting.pop(0)
        future.set_exception(answer) if isinstance(answer, Exception) else future.set_result(answer)
        await settle()

    def number(self, name: str | None) -> int:
        return self.table.number(asking(name))


def asking(name: str | None) -> GenerationRequest:
    return GenerationRequest([5], SamplingParams(), adapter=name, names={"lora_path": "model"})


def adapter(number: int, name: str) -> AdapterInfo:
    return AdapterInfo(number, name, f"/{name}", 8, 4)


def refused(work: Callable[[], Any], message: str, kind: type[Exception] = InvalidParameter) -> Exception:
    with pytest.raises(kind) as caught:
        work()
    assert says(str(caught.value), message)
    return caught.value


def test_names_have_the_numbers_of_their_loads() -> None:
    hand = Hand("tales", "b:c")
    assert [hand.number(name) for name in (None, "tales", "b:c")] == [0, 1, 2]
    error = refused(lambda: hand.number("tale"), "model is tale … tales, b:c", UnknownAdapter)
    assert isinstance(error, InvalidParameter)
    assert error.param == "model"
    refused(lambda: Hand().number("a"), "model is a … none", UnknownAdapter)
    refused(lambda: Hand(*(f"a{i}" for i in range(25))).number("x"), "a0, … a19 and 5 more", UnknownAdapter)
    assert hand.commands == []


def test_a_load_and_an_unload() -> None:
    async def test() -> None:
        hand = Hand("tales")
        load = asyncio.create_task(hand.table.load("new", "/new", pinned=True))
        await hand.answer(adapter(2, "new"))
        assert await load == adapter(2, "new")
        assert hand.commands == [LoadAdapter(0, "new", "/new", pinned=True)]
        assert (hand.number("new"), hand.table.loaded[1:]) == (2, [adapter(2, "new")])
        unload = asyncio.create_task(hand.table.unload("new"))
        await settle()
        refused(lambda: hand.number("new"), "model is new … tales", UnknownAdapter)
        assert (unload.done(), hand.table.num_calls) == (False, 1)
        await hand.answer(7)
        assert (await unload, hand.table.num_calls) == (7, 0)
        assert hand.commands[1:] == [UnloadAdapter(0, 2)]
        with pytest.raises(UnknownAdapter, match="lora_name is new; the adapters are tales"):
            await hand.table.unload("new")

    run(test)


def test_a_name_is_loaded_once_at_a_time() -> None:
    async def test() -> None:
        hand = Hand("tales")
        first = asyncio.create_task(hand.table.load("new", "/new"))
        await settle()
        for second in (hand.table.load("new", "/new"), hand.table.unload("new")):
            with pytest.raises(Conflict, match="new is being loaded"):
                await second
        waiting = asyncio.create_task(hand.table.prepare([asking("new"), asking(None), asking("tales")]))
        first.cancel()  # its caller goes away; who waits for the adapter still gets it
        await settle()
        assert (hand.table.knows("new"), waiting.done()) == (True, False)
        await hand.answer(adapter(2, "new"))
        await waiting
        assert (hand.number("new"), len(hand.commands)) == (2, 1)

    run(test)


def test_a_taken_name_is_loaded_again_only_in_place() -> None:
    async def test() -> None:
        hand = Hand("tales")
        with pytest.raises(InvalidParameter) as caught:
            await hand.table.load("tales", "/other")
        assert says(str(caught.value), "lora_name is tales … /tales … load_inplace")
        failing = asyncio.create_task(hand.table.load("tales", "/broken", in_place=True))
        await hand.answer(InvalidParameter("lora_path", "/broken: no adapter_config.json"))
        with pytest.raises(InvalidParameter, match="/broken") as caught:
            await failing
        assert (caught.value.param, hand.number("tales")) == ("lora_path", 1)
        load = asyncio.create_task(hand.table.load("tales", "/other", in_place=True))
        await settle()
        assert hand.number("tales") == 1  # until the new one is there
        await hand.answer(adapter(2, "tales"))
        assert await load == adapter(2, "tales")  # without waiting for requests that use the old one
        assert (hand.number("tales"), hand.table.loaded) == (2, [adapter(2, "tales")])
        assert hand.commands[2:] == [UnloadAdapter(0, 1)]

    run(test)


def test_an_adapter_of_the_folder_is_loaded_when_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()

    async def test() -> None:
        hand = Hand(folder=tmp_path)
        assert (hand.table.knows("new"), hand.table.knows("old"), hand.table.loaded) == (True, False, [])
        both = [asyncio.create_task(hand.table.prepare([asking("new")])) for _ in range(2)]
        await hand.answer(InvalidParameter("lora_path", "no adapter_config.json"))
        for each in both:
            with pytest.raises(InvalidParameter, match="no adapter_config") as caught:
                await each
            assert caught.value.param == "model"
        both = [asyncio.create_task(hand.table.prepare([asking("new")])) for _ in range(2)]
        await hand.answer(adapter(1, "new"))
        await asyncio.gather(*both)
        assert hand.commands == [LoadAdapter(0, "new", str(tmp_path / "new"))] * 2
        assert hand.number("new") == 1
        with pytest.raises(UnknownAdapter, match="model is old; the adapters are new"):
            await hand.table.prepare([asking("old")])

    run(test)


def test_no_name_leads_out_of_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("root", "rooted", "root/own", "root/.hidden", "root/a:b", "root/deep/er"):
        (tmp_path / name).mkdir(parents=True)
    (root / "file").write_text("")
    for link, target in (("out", "../rooted"), ("up", ".."), ("in", "deep/er"), ("loop", "loop"), ("gone", "x")):
        (root / link).symlink_to(target)
    found = {name: folder_in(str(root), name) for name in ("own", "a:b", "in")}
    assert found == {"own": str(root / "own"), "a:b": str(root / "a:b"), "in": str(root / "deep/er")}
    outside = ["", ".", "..", "../rooted", "/etc", "own/", "./own", "deep/er", ".hidden", "file", "out", "up", "loop"]
    for name in [*outside, "gone", "own\0", "\udc80", "own\n", "x" * 300, "x" * 5000, str(root / "own")]:
        assert folder_in(str(root), name) is None, name


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("", "/x", "lora_name is '' … 1 to 512"),
        ("a\n", "/x", r"lora_name is 'a\n' … visible"),
        ("x" * 513, "/x", "lora_name … 1 to 512"),
        ("default", "/x", "lora_name is 'default' … served model"),
        ("a", "/x\0", r"lora_path is '/x\x00' … visible"),
        ("a", "\udc80", r"lora_path is '\udc80' … visible"),
    ],
)
def test_names_and_paths_that_no_adapter_has(name: str, path: str, message: str) -> None:
    refused(lambda: asyncio.run(Hand().table.load(name, path)), message)


def test_a_launch_that_takes_no_adapters_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    table = Hand(folder=tmp_path, max_lora_rank=0).table
    assert not table.knows("new")
    for work in (table.load("new", "/new"), table.unload("new"), table.prepare([asking("new")])):
        refused(lambda work=work: asyncio.run(work), "no LoRA adapters … --enable-lora")
    asyncio.run(table.prepare([asking(None)]))


def test_an_engine_that_reads_an_adapter_for_long_does_not_hang() -> None:
    class Transport(HandTransport):
        def start(self, on_event: Callable[[Any], None]) -> None:
            self.emit = on_event
            on_event(Ready(fake_info(max_lora_rank=16)))

    async def test() -> None:
        transport = Transport()
        service = GenerationService(transport, STORIES, watchdog=Watchdog(0.02, 0.04))
        await service.start()
        service.open()
        load = asyncio.create_task(service.adapters.load("new", "/new"))
        await asyncio.sleep(0.1)
        assert service.failure is None
        transport.emit(AdapterLoaded(transport.sent[0].call, adapter(1, "new")))
        assert (await load).number == 1
        flush = asyncio.create_task(service.flush_cache())  # takes no longer than a step
        await asyncio.wait_for(service.failed.wait(), 2)
        with pytest.raises(EngineFailed):
            await flush
        await service.close()

    run(test)
