"""Side of host 0: it waits for the other hosts, tells them each program to run, and ends with them."""

import contextlib
import errno
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from sgl_jax.multihost.address import Address
from sgl_jax.multihost.handshake import RefusedError, admit
from sgl_jax.multihost.watch import SILENCE_S, Watch
from sgl_jax.multihost.wire import Alive, Ended, HostMessage, HostsError, Identity, Link, Number, Run, Start, frame

logger = logging.getLogger(__name__)

_SAY_EVERY_S = 5.0
_RETRY_S = 0.5
_MOST_GREETED = 64  # connections at a time that are in their handshake
_BLAME_S = 3.0  # longest time between a failed collective and the loss of the host that made it fail


class Leader:
    """Connections of host 0 to the other hosts.

    `die(reason)` is called, in a thread of its own, when a host is lost after all had come: it must end the process,
    since the engine's thread may hang in a collective that never ends.
    """

    def __init__(self, address: Address, nnodes: int, identity: Identity, token: str, die: Callable[[str], None]):
        self.address = address
        self._nnodes, self._identity, self._token, self._die = nnodes, identity, token, die
        self._links: dict[int, Link] = {}
        self._claimed: dict[int, Link] = {}  # hosts in their handshake included
        self._lock = threading.Lock()  # guards _links, _claimed and all below
        self._refusals: dict[str, str] = {}  # the last reason by peer's address
        self._together = self._ended = False
        self._lost = ""
        self._gone = threading.Event()
        self._numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._greeted = threading.Semaphore(_MOST_GREETED)
        self._num_announced = 0
        self._finished: dict[Link, tuple[int, float]] = {}  # programs that a host has finished, and since when
        self._stall_s = 0.0
        self._watch = Watch(self._on_message, self._on_lost)

    def gather(self, timeout_s: float) -> None:
        """Wait until every host is connected, and let them go on. Raises HostsError after `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        try:
            with self._listen(deadline) as listener:
                self._accept(listener, deadline)
        except HostsError as error:
            self.close(str(error))
            raise
        self._tell(Start(self.address.port + 1))
        logger.info("All %d hosts are here", self._nnodes)

    def _waiting_line(self) -> str:
        missing = [str(rank) for rank in range(1, self._nnodes) if rank not in self._links]
        ranks = f"node rank{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
        return f"waiting for {len(missing)} of {self._nnodes} hosts at {self.address} ({ranks})"

    def _listen(self, deadline: float) -> socket.socket:
        while True:
            try:
                family, where = self.address.resolve()
                _check_free(family, self.address.next_port())
                return socket.create_server(where[:2], family=family, backlog=128)
            except socket.gaierror as error:  # a name that a cluster has yet to publish
                if time.monotonic() > deadline:
                    raise HostsError(f"--dist-init-addr is {self.address}; the name is not known: {error}") from error
                time.sleep(_RETRY_S)
            except OSError as error:
                reason = error.strerror or str(error)
                if error.errno == errno.EADDRNOTAVAIL:
                    reason = "this machine has no such address; it must be one of host 0's, or 0.0.0.0 there"
                raise HostsError(f"--dist-init-addr is {self.address}; cannot listen there: {reason}") from error

    def _accept(self, listener: socket.socket, deadline: float) -> None:
        say = 0.0
        while True:
            with self._lock:
                if len(self._links) == self._nnodes - 1:
                    self._together = True
                    return
                line = self._waiting_line()
                refusals = "".join(f"; {reason}" for reason in self._refusals.values())
            now = time.monotonic()
            if now > deadline:
                raise HostsError(f"gave up (--dist-timeout) {line}{refusals}")
            if now >= say:
                logger.info("%s", line)
                say = now + _SAY_EVERY_S
            listener.settimeout(min(0.2, max(deadline - now, 0.001)))
            with contextlib.suppress(TimeoutError):
                connection, where = listener.accept()
                if not self._greeted.acquire(blocking=False):
                    connection.close()
                    continue
                link = Link(connection, str(Address(*where[:2])))
                threading.Thread(target=self._greet, args=(link,), name="sgl-jax-greet", daemon=True).start()

    def _greet(self, link: Link) -> None:
        peer = link.peer
        try:
            rank = admit(link, self._token, self._identity, lambda rank: self._claim(rank, link))
            logger.info("%s is here", link.peer)
            with self._lock:
                self._links[rank] = link
            self._watch.add(link)
        except (HostsError, OSError) as error:
            reason = str(error) if isinstance(error, HostsError) else f"{peer} did not finish the handshake: {error}"
            logger.warning("%s", reason)
            with self._lock:
                if isinstance(error, RefusedError) and len(self._refusals) < _MOST_GREETED:
                    self._refusals[peer.rpartition(":")[0]] = reason
                self._forget(link)
            link.close()
        finally:
            self._greeted.release()

    def _claim(self, rank: int, link: Link) -> str:
        with self._lock:
            if not 0 < rank < self._nnodes:
                return f"--node-rank is {rank}; host 0 waits for 1 to {self._nnodes - 1}"
            if rank in self._claimed:
                return f"--node-rank is {rank}; that host is here already, as {self._claimed[rank].peer}"
            if self._ended:
                return "host 0 is ending"
            self._claimed[rank] = link
            return ""

    def _forget(self, link: Link) -> None:
        self._links = {rank: other for rank, other in self._links.items() if other is not link}
        self._claimed = {rank: other for rank, other in self._claimed.items() if other is not link}

    def serve(self, stall_s: float = 0.0) -> None:
        """Treat a host as lost from now on when it is silent for SILENCE_S seconds, or has programs to run and finishes
        none for `stall_s` seconds (0: never)."""
        self._stall_s = stall_s
        self._watch.silence_s = SILENCE_S

    def agree(self, value: int) -> int:
        """Return the least of the values that all hosts give. It is a barrier: every host must call it, and each waits
        for the last."""
        least = min([value, *(self._numbers.get() for _ in self._links)])
        self._tell(Number(least))
        return least

    def announce(self, program: str, vector: np.ndarray, source: str = "") -> None:
        """Tell every host to run this program with this vector, and with a payload that each reads from the source. It
        is called right before this host runs it."""
        self._num_announced += 1
        self._tell(Run(program, vector.astype("<i4", copy=False).tobytes(), source))

    @contextlib.contextmanager
    def blaming(self) -> Iterator[None]:
        """Wrap errors of the block that follow from the loss of a host in a HostsError with the reason of the loss."""
        try:
            yield
        except Exception as error:
            if self._gone.wait(_BLAME_S):
                raise HostsError(self._lost) from error
            raise

    def close(self, reason: str = "") -> None:
        """End the other hosts, and wait some seconds for them to go. Without a reason they exit with 0."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            links = list(self._links.values())
        self._watch.close()
        for link in links:
            with contextlib.suppress(OSError):
                link.send(Ended(reason))
        deadline = time.monotonic() + _BLAME_S
        for link in links:  # jax's coordinator lives here: a host that finds it gone before leaving aborts
            with contextlib.suppress(HostsError, OSError):
                while True:
                    link.receive(max(deadline - time.monotonic(), 0.001))
            link.close()

    def _tell(self, message: HostMessage) -> None:
        data = frame(message)
        for link in self._links.values():
            link.send_frame(data)

    def _on_message(self, link: Link, message: HostMessage) -> None:
        match message:
            case Number(value=value):
                self._numbers.put(value)
            case Alive(num_finished=finished):
                self._check_progress(link, finished)

    def _check_progress(self, link: Link, finished: int) -> None:
        """Raises HostsError for a host that has had programs to run for too long."""
        now, announced = time.monotonic(), self._num_announced
        before, since = self._finished.get(link, (-1, now))
        if finished != before or finished == announced:
            self._finished[link] = finished, now
        elif self._stall_s and now - since > self._stall_s:
            done = f"{link.peer} has finished {finished} of {announced} programs"
            limit = f"--watchdog-timeout {self._stall_s:g}"
            raise HostsError(f"{done} and no further one for {now - since:.0f} s ({limit})")

    def _on_lost(self, link: Link, reason: str) -> None:
        with self._lock:
            if self._ended:
                return
            if not self._together:
                logger.warning("%s", reason)
                self._forget(link)
                return
            if self._gone.is_set():
                return
            self._lost = reason
            self._gone.set()
        for other in self._links.values():
            if other is not link:
                with contextlib.suppress(HostsError, OSError):
                    other.try_send(Ended(reason))
        self._die(reason)


def _check_free(family: socket.AddressFamily, address: Address) -> None:
    try:
        _, where = address.resolve()
        socket.create_server(where[:2], family=family).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        problem = f"port {address.port}, one above that of --dist-init-addr, is for jax's coordinator and is in use"
        raise HostsError(f"{problem}; choose another --dist-init-addr") from error
