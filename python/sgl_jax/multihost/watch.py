"""Watching thread: reads every connection, sends Alive on each, and notices within seconds which hosts are gone."""

import contextlib
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable

from sgl_jax.multihost.handshake import printable
from sgl_jax.multihost.wire import Alive, Ended, HostMessage, HostsError, Link

BEAT_S = 1.0
SILENCE_S = 10.0  # a host that is silent for so long is lost: without power or network it closes no connection
START_SILENCE_S = 60.0  # while it loads and compiles, a library may keep its threads from running for a while


class Watch:
    """Calls `on_message(link, message)` and `on_lost(link, reason)` in its thread; a lost link is closed first. It is
    also lost when `on_message` raises a HostsError.

    An Ended with a reason is a loss with that reason; an Ended without one is a message.
    """

    def __init__(
        self,
        on_message: Callable[[Link, HostMessage], None],
        on_lost: Callable[[Link, str], None],
        *,
        num_finished: Callable[[], int] = lambda: 0,  # for Alive
        beat_s: float = BEAT_S,
        silence_s: float = START_SILENCE_S,
    ):
        self.silence_s = silence_s  # may be changed while it runs
        self._on_message, self._on_lost, self._num_finished = on_message, on_lost, num_finished
        self._beat_s = beat_s
        self._heard: dict[Link, float] = {}  # when each was last heard
        self._new: queue.SimpleQueue[Link] = queue.SimpleQueue()
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="sgl-jax-hosts", daemon=True)
        self._thread.start()

    def add(self, link: Link) -> None:
        self._new.put(link)
        self._wake.send(b"x")

    def close(self) -> None:
        """Stop watching and leave the links open. May be called twice, but not from the thread itself."""
        if self._ending:
            return
        self._ending = True
        self._wake.send(b"x")
        self._thread.join()
        self._wake.close()
        self._woken.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            due = time.monotonic()
            while not self._ending:
                for key, _ in selector.select(max(due - time.monotonic(), 0.0)):
                    if isinstance(key.fileobj, Link):
                        self._read(selector, key.fileobj)
                    else:
                        with contextlib.suppress(BlockingIOError):
                            self._woken.recv(1024)
                while not self._new.empty():
                    link = self._new.get()
                    selector.register(link, selectors.EVENT_READ)
                    self._heard[link] = time.monotonic()
                    self._read(selector, link)  # bytes that came with the handshake's last message wake nobody
                if time.monotonic() >= due:
                    due = time.monotonic() + self._beat_s
                    self._beat(selector)

    def _read(self, selector: selectors.BaseSelector, link: Link) -> None:
        try:
            messages = link.receive_ready()
        except (HostsError, OSError) as error:
            self._lose(selector, link, _reason(link, error))
            return
        self._heard[link] = time.monotonic()
        for message in messages:
            if isinstance(message, Ended) and message.reason:
                self._lose(selector, link, f"{link.peer} ended: {printable(message.reason)}")
                return
            try:
                self._on_message(link, message)
            except HostsError as error:
                self._lose(selector, link, str(error))
                return

    def _beat(self, selector: selectors.BaseSelector) -> None:
        # All links have been read just before, so that nobody is blamed for a pause of this process.
        for link in list(self._heard):
            silence = time.monotonic() - self._heard[link]
            if silence > self.silence_s:
                self._lose(selector, link, f"{link.peer} has said nothing for {silence:.0f} s")
                continue
            try:
                link.try_send(Alive(self._num_finished()))
            except (HostsError, OSError) as error:
                self._lose(selector, link, _reason(link, error))

    def _lose(self, selector: selectors.BaseSelector, link: Link, reason: str) -> None:
        selector.unregister(link)
        del self._heard[link]
        link.close()
        self._on_lost(link, reason)


def _reason(link: Link, error: Exception) -> str:
    return str(error) if isinstance(error, HostsError) else f"the connection to {link.peer} broke: {error}"
