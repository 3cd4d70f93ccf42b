"""Messages between the hosts of one engine, and the framed TCP connection that carries them.

A frame is its length, 4 bytes with the highest first, and a msgpack map that names its type. Nothing is pickled, and a
frame longer than the limit is refused before it is read.
"""

import contextlib
import socket
import struct
import threading
import time

import msgspec

PROTOCOL = 3  # raised when a message changes; Challenge stays as it is
HANDSHAKE_LIMIT = 1 << 20  # bytes of a frame from a peer that has not proved anything yet
LIMIT = 1 << 28  # bytes of a frame between hosts that know each other
_HEADER = struct.Struct(">I")
_CHUNK = 1 << 18

type Scalar = str | int | float | bool | tuple[str, ...] | None


class HostsError(ValueError):
    """The hosts cannot work together; the message is a line for the user that names the host and the reason."""


class WireError(HostsError):
    """A frame came over the wire that is none of our messages."""


class LinkClosed(HostsError):
    """The other side closed the connection."""


class Identity(msgspec.Struct, frozen=True):
    """The versions, flags and model that all hosts must have in common."""

    versions: dict[str, str]  # by package
    flags: dict[str, Scalar]  # by option
    model: dict[str, str]  # a fingerprint by file


class _HostMessage(msgspec.Struct, tag=True, frozen=True):
    """Map that names its type."""


class Challenge(_HostMessage, frozen=True):
    """Host 0's first word to whoever connects."""

    protocol: int
    nonce: bytes


class ChallengeResponse(_HostMessage, frozen=True, tag="Answer"):
    """Proves to host 0 that the sender has the token, and challenges host 0 to prove the same."""

    nonce: bytes
    proof: bytes


class Welcome(_HostMessage, frozen=True):
    """Host 0's proof that it has the token."""

    proof: bytes


class Hello(_HostMessage, frozen=True):
    node_rank: int
    identity: Identity


class Accepted(_HostMessage, frozen=True):
    pass


class Refusal(_HostMessage, frozen=True, tag="Refused"):
    message: str


class Start(_HostMessage, frozen=True):
    """Every host is here: join jax's own coordinator at this port of host 0."""

    coordinator_port: int


class Alive(_HostMessage, frozen=True):
    """Sent once a second, with how many of the announced programs the sender has finished. Host 0 sends 0."""

    num_finished: int = 0


class Number(_HostMessage, frozen=True):
    """A follower's value in `agree`, and host 0's answer: the least of all."""

    value: int


class Run(_HostMessage, frozen=True):
    """Run the program with this vector, little-endian i32. `source` names a payload that each receiver reads by itself;
    empty: there is none."""

    program: str
    vector: bytes
    source: str = ""


class Ended(_HostMessage, frozen=True):
    """The sender leaves, because its work is done or for the reason given."""

    reason: str = ""


HostMessage = (
    Challenge | ChallengeResponse | Welcome | Hello | Accepted | Refusal | Start | Alive | Number | Run | Ended
)

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(HostMessage).decode


def frame(message: HostMessage) -> bytes:
    body = _encode(message)
    return _HEADER.pack(len(body)) + body


def checked[M: HostMessage](message: HostMessage, kind: type[M], sender: str) -> M:
    """Return the message if it is of this kind. Raises WireError if not."""
    if isinstance(message, kind):
        return message
    did = "ended" if isinstance(message, Ended) else f"sent {message.__struct_config__.tag}"
    raise WireError(f"{sender} {did} where {kind.__struct_config__.tag} was due")


class Link:
    """A connection to another host. Any thread may send; one at a time receives."""

    def __init__(self, connection: socket.socket, peer: str):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer = peer  # the other host in log lines: "host 1 (10.0.0.2)"
        self.limit = HANDSHAKE_LIMIT
        self._socket = connection
        self._sending = threading.Lock()
        self._buffer = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: HostMessage) -> None:
        """Block until the message is on its way. Raises OSError when the connection is gone."""
        self.send_frame(frame(message))

    def send_frame(self, data: bytes) -> None:
        """Send a message that `frame` has encoded already, because it goes to several hosts."""
        with self._sending:
            self._socket.sendall(data)

    def try_send(self, message: HostMessage) -> None:
        """Send without ever blocking; when the connection is busy, do not send at all."""
        data = frame(message)
        if not self._sending.acquire(blocking=False):
            return
        try:
            sent = self._socket.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        finally:
            self._sending.release()
        if sent != len(data):
            raise WireError(f"{self.peer} takes no more data")

    def receive(self, timeout: float) -> HostMessage:
        """Return the next message. Raises WireError, LinkClosed or, after `timeout` seconds, TimeoutError."""
        deadline = time.monotonic() + timeout
        try:
            while (message := self._next()) is None:
                self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
                self._read()
            return message
        finally:
            self._socket.settimeout(None)

    def receive_ready(self) -> list[HostMessage]:
        """Return the messages that are here, without waiting for more. Raises WireError, LinkClosed or OSError."""
        with contextlib.suppress(BlockingIOError):
            self._read(socket.MSG_DONTWAIT)
        return list(iter(self._next, None))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that is blocked in it
        self._socket.close()

    def _read(self, flags: int = 0) -> None:
        try:
            data = self._socket.recv(_CHUNK, flags)
        except ConnectionResetError:  # the peer closed the connection before it had read everything
            data = b""
        if not data:
            raise LinkClosed(f"{self.peer} closed the connection")
        self._buffer += data

    def _next(self) -> HostMessage | None:
        if len(self._buffer) < _HEADER.size:
            return None
        (length,) = _HEADER.unpack_from(self._buffer)
        if length > self.limit:
            text = f"{self.peer} sent a frame of {length} bytes; the limit is {self.limit}: it is no host of ours"
            raise WireError(text)
        end = _HEADER.size + length
        if len(self._buffer) < end:
            return None
        body = bytes(memoryview(self._buffer)[_HEADER.size : end])
        del self._buffer[:end]
        try:
            return _decode(body)
        except msgspec.MsgspecError as error:
            raise WireError(f"{self.peer} sent what is no message of ours: {error}") from error
