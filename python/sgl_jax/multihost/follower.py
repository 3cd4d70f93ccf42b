"""Side of every host but host 0: it connects to host 0, proves that it belongs, and receives the programs to run."""

import contextlib
import logging
import queue
import socket
import time
from collections.abc import Callable, Iterator

import numpy as np

from sgl_jax.multihost import wire
from sgl_jax.multihost.address import Address
from sgl_jax.multihost.handshake import introduce
from sgl_jax.multihost.watch import SILENCE_S, Watch
from sgl_jax.multihost.wire import HostMessage, HostsError, Identity, Link, LinkClosed, checked

logger = logging.getLogger(__name__)

_SAY_EVERY_S = 5.0
_RETRY_S = 0.5
_CONNECT_S = 5.0


class Follower:
    """Connection of this host to host 0.

    `die(reason)` is called, in a thread of its own, when host 0 is lost or ends for a reason; it must end the process.
    """

    def __init__(self, link: Link, die: Callable[[str], None]):
        self._link, self._die = link, die
        self._ended = False
        self.num_finished = 0  # programs that `runs` has yielded and that are finished
        self._messages: queue.SimpleQueue[HostMessage] = queue.SimpleQueue()
        self._watch = Watch(self._on_message, self._on_lost, num_finished=lambda: self.num_finished)
        self._watch.add(link)

    def wait_start(self) -> int:
        """Wait until every host is there, and return the port of jax's coordinator."""
        return checked(self._messages.get(), wire.Start, self._link.peer).coordinator_port

    def agree(self, value: int) -> int:
        """Return the least of the values that all hosts give. It is a barrier: every host must call it, and each waits
        for the last."""
        self._link.send(wire.Number(value))
        return checked(self._messages.get(), wire.Number, self._link.peer).value

    def runs(self) -> Iterator[tuple[str, np.ndarray, str]]:
        """Yield a program, its vector and the source of its payload ("": none) for each run that host 0 announces."""
        self._watch.silence_s = SILENCE_S
        while True:
            message = self._messages.get()
            if isinstance(message, wire.Ended):
                return
            run = checked(message, wire.Run, self._link.peer)
            yield run.program, np.frombuffer(run.vector, "<i4"), run.source

    def close(self, reason: str = "") -> None:
        """Leave. Host 0 treats it as a loss with this reason, unless it has said itself that the work is done."""
        self._ended = True
        self._watch.close()
        if reason:
            with contextlib.suppress(HostsError, OSError):
                self._link.try_send(wire.Ended(reason))
        self._link.close()

    def _on_message(self, link: Link, message: HostMessage) -> None:
        self._ended = self._ended or isinstance(message, wire.Ended)
        if not isinstance(message, wire.Alive):
            self._messages.put(message)

    def _on_lost(self, link: Link, reason: str) -> None:
        if not self._ended:
            self._die(reason)


def connect(address: Address, node_rank: int, identity: Identity, token: str, timeout_s: float) -> Link:
    """Return a connection to host 0 that both sides trust; try for `timeout_s` seconds while nobody answers there.

    Raises HostsError when the time is over, or when host 0 refuses this host or this host refuses it.
    """
    deadline = time.monotonic() + timeout_s
    say = 0.0
    while True:
        try:
            _, where = address.resolve()
            link = Link(socket.create_connection(where[:2], timeout=_CONNECT_S), f"host 0 ({address})")
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
