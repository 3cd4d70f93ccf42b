"""LoRA adapters by name, on the API side: which there are, loading one and unloading one."""

import asyncio
import os
from collections.abc import Callable, Iterable
from typing import Protocol

from sgl_jax.engine.generation import Conflict, GenerationRequest, UnknownAdapter
from sgl_jax.engine.messages import (
    AdapterInfo,
    Command,
    EngineInfo,
    LoadAdapter,
    ProfileStatus,
    StateChanged,
    UnloadAdapter,
)
from sgl_jax.request import InvalidParameter
from sgl_jax.settings.adapter_paths import wrong_name

type Answer = int | ProfileStatus | AdapterInfo | StateChanged

_MOST_NAMES = 20  # in an error message


class Ask(Protocol):
    async def __call__[T: Answer](self, command: Callable[[int], Command], answer: type[T]) -> T:
        """Send a command, made for a new call's number, and return its answer."""
        ...


class AdapterTable:
    """Adapters that requests may name. A name is loaded by one call at a time, shared by all that wait for it and not
    ended by a caller that goes away. An adapter in `folder` is loaded when a request names it."""

    def __init__(self, info: EngineInfo, ask: Ask, folder: str | None):
        self._by_name = {each.name: each for each in info.adapters}
        self.enabled = info.max_lora_rank > 0  # the launch takes adapters
        self._ask, self._folder = ask, folder
        self._loading: dict[str, asyncio.Task[AdapterInfo]] = {}
        self._unloading: set[asyncio.Task[int]] = set()

    @property
    def loaded(self) -> list[AdapterInfo]:
        return list(self._by_name.values())

    @property
    def num_calls(self) -> int:
        """Number of loads and unloads that wait for the engine, which may take longer than any step."""
        return len(self._loading) + len(self._unloading)

    def names_text(self) -> str:
        """Return the names of the loaded adapters for an error message."""
        more = len(self._by_name) - _MOST_NAMES
        return ", ".join([*self._by_name][:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")

    def knows(self, name: str) -> bool:
        """Tell whether requests may use the name: its adapter is loaded, being loaded, or in the folder."""
        return name in self._by_name or name in self._loading or self._path_of(name) is not None

    def number(self, request: GenerationRequest) -> int:
        """Return the number of the request's adapter, which is loaded; 0: the model itself. Raises UnknownAdapter."""
        if request.adapter is None:
            return 0
        if (adapter := self._by_name.get(request.adapter)) is None:
            raise self._unknown(request.adapter).named(request.names)
        return adapter.number

    async def prepare(self, requests: Iterable[GenerationRequest]) -> None:
        """Wait until the requests' adapters are loaded. Raises InvalidParameter or Conflict if one cannot be."""
        for request in requests:
            if request.adapter is None or request.adapter in self._by_name:
                continue
            try:
                await asyncio.shield(self._loading.get(request.adapter) or self._load_from_folder(request.adapter))
            except InvalidParameter as error:
                raise error.named(request.names) from error

    async def load(self, name: str, path: str, pinned: bool = False, in_place: bool = False) -> AdapterInfo:
        """Load an adapter, with `in_place` also under a name that is taken: it then means the new adapter, and requests
        that run keep theirs. Raises InvalidParameter, or Conflict while the name is being loaded."""
        self._check_enabled("lora_name")
        if problem := wrong_name(name, ()):
            raise InvalidParameter("lora_name", f"lora_name is {name!r}; {problem}")
        if not path.isprintable():
            raise InvalidParameter("lora_path", f"lora_path is {path!r}; its characters must all be visible")
        self._check_loading(name)
        if (old := self._by_name.get(name)) is not None and not in_place:
            said = f"lora_name is {name}; it is loaded from {old.path}"
            raise InvalidParameter("lora_name", f"{said}: unload it first, or give load_inplace true to replace it")
        return await asyncio.shield(self._load(name, path, pinned))

    async def unload(self, name: str) -> int:
        """Forget a name at once, wait until the requests that use its adapter have ended, and return how many pages with
        its cached prefixes became free. Raises UnknownAdapter, or Conflict while the name is being loaded."""
        self._check_enabled("lora_name")
        self._check_loading(name)
        if (adapter := self._by_name.pop(name, None)) is None:
            raise self._unknown(name).named({"lora_path": "lora_name"})
        return await asyncio.shield(self._unload(adapter))

    def _load_from_folder(self, name: str) -> asyncio.Task[AdapterInfo]:
        self._check_enabled("lora_path")
        if (path := self._path_of(name)) is None:
            raise self._unknown(name)
        return self._load(name, path, pinned=False)

    def _load(self, name: str, path: str, pinned: bool) -> asyncio.Task[AdapterInfo]:
        async def load() -> AdapterInfo:
            try:
                adapter = await self._ask(lambda call: LoadAdapter(call, name, path, pinned), AdapterInfo)
            finally:
                del self._loading[name]
            if (old := self._by_name.get(name)) is not None:
                self._unload(old)
            self._by_name[name] = adapter
            return adapter

        self._loading[name] = task = asyncio.create_task(load())
        task.add_done_callback(_seen)
        return task

    def _unload(self, adapter: AdapterInfo) -> asyncio.Task[int]:
        task = asyncio.ensure_future(self._ask(lambda call: UnloadAdapter(call, adapter.number), int))
        self._unloading.add(task)
        task.add_done_callback(self._unloading.discard)
        task.add_done_callback(_seen)
        return task

    def _path_of(self, name: str) -> str | None:
        return None if self._folder is None or not self.enabled else folder_in(self._folder, name)

    def _check_enabled(self, param: str) -> None:
        if not self.enabled:
            raise InvalidParameter(
                param, f"{param}: this launch takes no LoRA adapters; --enable-lora makes it take them"
            )

    def _check_loading(self, name: str) -> None:
        if name in self._loading:
            raise Conflict(f"the adapter {name} is being loaded; wait until that has ended")

    def _unknown(self, name: str) -> UnknownAdapter:
        known = f"the adapters are {self.names_text()}" if self._by_name else "there is none"
        return UnknownAdapter("lora_path", "{lora_path} is {name}; {known}", name=name, known=known)


def folder_in(root: str, name: str) -> str | None:
    """Return the folder that a request may load by its name: it lies in `root`, and links do not lead out of it. None:
    there is no such folder."""
    if wrong_name(name, ()) or name != os.path.basename(name) or name.startswith("."):
        return None
    try:
        real_root = os.path.realpath(root)
        path = os.path.realpath(os.path.join(real_root, name))
        return path if os.path.isdir(path) and os.path.commonpath((path, real_root)) == real_root else None
    except (OSError, ValueError):  # characters that no path has
        return None


def _seen(task: asyncio.Task[AdapterInfo] | asyncio.Task[int]) -> None:
    """Take note of a task's error, which nobody waits for if its caller has gone away."""
    if not task.cancelled():
        task.exception()
