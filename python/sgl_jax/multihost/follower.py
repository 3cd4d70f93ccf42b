"""A host that is not host 0: finds it, proves that it belongs, and runs what it is told."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import time
from collections.abc import Callable, Iterator

import numpy as np

from sgl_jax.multihost.address import Address
from sgl_jax.multihost.handshake import introduce
from sgl_jax.multihost.host_errors import HostsError, LinkClosed
from sgl_jax.multihost.watch import SILENCE_S, Watch
from sgl_jax.multihost.wire import Ended, Identity, Link, Message, Number, Run, Start

logger = logging.getLogger(__name__)

_SAY_EVERY_S = 5.0
_RETRY_S = 0.5
_CONNECT_S = 5.0


class Follower:
    """`die(reason)` is called, in a thread of its own, when host 0 is lost or ends for a reason; it is to end the process."""

    def __init__(self, link: Link, die: Callable[[str], None]):
        self._link, self._die = link, die
        self._ended = False
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._watch = Watch(self._on_message, self._on_lost)
        self._watch.add(link)

    def wait_start(self) -> int:
        """Returns when every host is there: the port of jax's coordinator."""
        return self._expect(Start).coordinator_port

    def agree(self, value: int) -> int:
        """The least of what all hosts give. Every host calls it at the same point, and none goes on before the last."""
        self._link.send(Number(value))
        return self._expect(Number).value

    def announce(self, program: str, vector: np.ndarray, source: str = "") -> None:
        """Nobody waits for what a follower runs: host 0 has told everyone."""

    def runs(self) -> Iterator[tuple[str, np.ndarray, str]]:
        """Programs, vectors and sources of payloads ("": none), in the order in which every host runs them, until host 0
        says that it was the last."""
        self._watch.silence_s = SILENCE_S
        while True:
            message = self._messages.get()
            if isinstance(message, Ended):
                return
            if not isinstance(message, Run):
                raise HostsError(f"{self._link.peer} sent {type(message).__name__} where Run was due")
            yield message.program, np.frombuffer(message.vector, "<i4"), message.source

    def close(self, reason: str = "") -> None:
        """Leaves. Host 0 takes it for a loss, with this reason, unless it said itself that the work is done."""
        self._ended = True
        self._watch.close()
        if reason:
            with contextlib.suppress(HostsError, OSError):
                self._link.try_send(Ended(reason))
        self._link.close()

    def _expect[M: Message](self, kind: type[M]) -> M:
        message = self._messages.get()
        if not isinstance(message, kind):
            what = "ended" if isinstance(message, Ended) else f"sent {type(message).__name__}"
            raise HostsError(f"{self._link.peer} {what} where {kind.__name__} was due")
        return message

    def _on_message(self, link: Link, message: Message) -> None:
        self._ended = self._ended or isinstance(message, Ended)
        self._messages.put(message)

    def _on_lost(self, link: Link, reason: str) -> None:
        if not self._ended:
            self._die(reason)


def connect(address: Address, node_rank: int, identity: Identity, token: str, timeout_s: float) -> Link:
    """A connection to host 0 that both sides trust. Tries again while nobody answers there, for `timeout_s` seconds.

    Raises HostsError: the time is over, or host 0 refuses this one (or this one refuses it).
    """
    deadline = time.monotonic() + timeout_s
    say = 0.0
    while True:
        try:
            link = _connected(address)
            try:
                introduce(link, token, node_rank, identity)
            except BaseException:
                link.close()
                raise
            return link
        except (OSError, LinkClosed) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        now = time.monotonic()
        line = f"waiting for host 0 at {address}: {reason}"
        if now > deadline:
            raise HostsError(f"gave up (--dist-timeout) {line}")
        if now >= say:
            logger.info("%s", line)
            say = now + _SAY_EVERY_S
        time.sleep(min(_RETRY_S, max(deadline - now, 0.0) + 0.01))


def _connected(address: Address) -> Link:
    family, where = address.resolve()
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(_CONNECT_S)
        connection.connect(where)
    except OSError:
        connection.close()
        raise
    return Link(connection, f"host 0 ({address})")
