"""Responses that can be retrieved and gone on from, in this process's memory."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from sgl_jax.request import Json
from sgl_jax.server.chat_turns import Fields
from sgl_jax.server.error_envelope import ApiError
from sgl_jax.server.openai_responses_types import ConversationItem, InputItem, ItemReference

_MOST, _MOST_BYTES = 1000, 256 << 20

type Response = dict[str, Json]


class Stored(msgspec.Struct):
    """A response as it is shown, and the conversation up to its end, without instructions."""

    response: Response
    messages: list[Fields]
    items: dict[str, ConversationItem]  # its output, by id
    input: list[Fields]  # items, with their ids
    size: int


@dataclass
class Running:
    """A response that is being generated."""

    shown: Callable[[], Response]  # makes the response as it is now
    input: list[Fields]
    is_stored: bool  # it is kept when it ends, and until then found
    ending: asyncio.Future[Response | None]


class StoredResponses:
    """The latest responses; older ones are forgotten."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, Stored] = OrderedDict()
        self._running: dict[str, Running] = {}
        self._num_bytes = 0

    def begin(self, response_id: str, shown: Callable[[], Response], given: list[Fields], is_stored: bool) -> None:
        """Note a response that is being generated, and its input."""
        self._running[response_id] = Running(shown, given, is_stored, asyncio.get_running_loop().create_future())

    def end(self, response_id: str, response: Response | None) -> None:
        """Say how a response that began has ended. None: nobody waits for it any more."""
        self._running.pop(response_id).ending.set_result(response)

    def keep(
        self, response_id: str, response: Response, messages: list[Fields], items: Sequence[ConversationItem]
    ) -> None:
        """Store a response that ends, unless it is not to be stored, or has been deleted meanwhile."""
        if not (running := self._running[response_id]).is_stored:
            return
        size = len(msgspec.json.encode((response, messages, running.input)))
        by_id = {each.id: each for each in items if each.id}
        self._found[response_id] = Stored(response, messages, by_id, running.input, size)
        self._num_bytes += size
        while len(self._found) > _MOST or (self._num_bytes > _MOST_BYTES and len(self._found) > 1):
            self._num_bytes -= self._found.popitem(last=False)[1].size

    def get(self, response_id: str, param: str | None = None) -> Stored:
        """Return a response that has ended. Raises ApiError for one that is not there."""
        if self._is_running(response_id):
            raise ApiError(
                409, "the response is in_progress; go on from it when it has ended", param=param, code="conflict"
            )
        if (found := self._found.get(response_id)) is None:
            text = f"there is no response {response_id[:100]}; the latest {_MOST} that were stored are kept"
            raise ApiError(404, text, param=param, code="response_not_found")
        return found

    def _is_running(self, response_id: str) -> bool:
        running = self._running.get(response_id)
        return running is not None and running.is_stored

    def shown(self, response_id: str) -> Response:
        """Return a response as it is now. Raises ApiError for one that is not there."""
        return self._running[response_id].shown() if self._is_running(response_id) else self.get(response_id).response

    def input(self, response_id: str) -> list[Fields]:
        """Return the items of a response's input. Raises ApiError for one that is not there."""
        return self._running[response_id].input if self._is_running(response_id) else self.get(response_id).input

    def resolved(self, given: str | Sequence[InputItem]) -> str | list[ConversationItem]:
        """Return an input with the items that it refers to. Raises ApiError for one that is not there."""
        if isinstance(given, str):
            return given
        return [self._item(each.id) if isinstance(each, ItemReference) else each for each in given]

    def _item(self, item_id: str) -> ConversationItem:
        found = (stored.items[item_id] for stored in reversed(self._found.values()) if item_id in stored.items)
        if (item := next(found, None)) is None:
            raise ApiError(404, f"there is no item {item_id[:100]}", param="input", code="item_not_found")
        return item

    def delete(self, response_id: str) -> None:
        """Forget a response; one that is being generated goes to its client alone. Raises ApiError for one that is not
        there."""
        if self._is_running(response_id):
            self._running[response_id].is_stored = False
            return
        self._num_bytes -= self.get(response_id).size
        del self._found[response_id]

    async def cancelled(self, response_id: str, abort: Callable[[], object]) -> Response:
        """Abort a response that is being generated, and return it when it has ended. Raises ApiError for one that is not."""
        if (running := self._running.get(response_id)) is None:
            status = self.get(response_id).response["status"]
            raise ApiError(400, f"the response is {status}; only one that is being generated can be cancelled")
        abort()
        return await asyncio.shield(running.ending) or self.get(response_id).response
