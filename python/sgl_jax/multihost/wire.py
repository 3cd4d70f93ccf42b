"""Messages between the hosts of one engine, and the framed TCP connection that carries them.

A frame is its length, 4 bytes with the highest first, and a msgpack map that names its type. Nothing is pickled, and a
frame longer than the limit is refused before it is read.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

import msgspec
import numpy as np

from sgl_jax.multihost.host_errors import LinkClosed, WireError

PROTOCOL = 2  # raised when a message changes; Challenge stays as it is
HANDSHAKE_LIMIT = 1 << 20  # bytes of a frame, from those who have not proved anything yet
LIMIT = 1 << 28  # bytes of a frame between hosts that know each other
_HEADER = struct.Struct(">I")
_CHUNK = 1 << 18


class _Message(msgspec.Struct, tag=True, frozen=True):
    pass


type Scalar = str | int | float | bool | None


class Identity(msgspec.Struct, frozen=True):
    """The things that all hosts must have in common."""

    versions: dict[str, str]  # by package
    flags: dict[str, Scalar]  # by option
    model: dict[str, str]  # a fingerprint by file


class Challenge(_Message, frozen=True):
    """Host 0's first word to whoever connects."""

    protocol: int
    nonce: bytes


class Answer(_Message, frozen=True):
    """Proves to host 0 that the sender has the token, and asks the same of it."""

    nonce: bytes
    proof: bytes


class Welcome(_Message, frozen=True):
    proof: bytes


class Hello(_Message, frozen=True):
    node_rank: int
    identity: Identity


class Accepted(_Message, frozen=True):
    pass


class Refused(_Message, frozen=True):
    message: str


class Start(_Message, frozen=True):
    """Every host is here: join jax's own coordinator at this port of host 0."""

    coordinator_port: int


class Alive(_Message, frozen=True):
    """Said once a second."""


class Number(_Message, frozen=True):
    """A follower's part in `agree`, and host 0's answer: the least of all."""

    value: int


class Run(_Message, frozen=True):
    """Run this program with this vector, little-endian i32, and with the payload that the receiver reads from the source
    itself, if there is one."""

    program: str
    vector: bytes
    source: str = ""


class Ended(_Message, frozen=True):
    """The sender leaves. Without a reason: because its work is done."""

    reason: str = ""


Message = Challenge | Answer | Welcome | Hello | Accepted | Refused | Start | Alive | Number | Run | Ended

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode


def run_message(program: str, vector: np.ndarray, source: str = "") -> Run:
    return Run(program, vector.astype("<i4", copy=False).tobytes(), source)


def frame(message: Message) -> bytes:
    body = _encode(message)
    return _HEADER.pack(len(body)) + body


class Link:
    """One connection. Any thread may send; one at a time receives."""

    def __init__(self, connection: socket.socket, peer: str):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer = peer  # for people: "host 1 (10.0.0.2)"
        self.limit = HANDSHAKE_LIMIT
        self._socket = connection
        self._sending = threading.Lock()
        self._buffer = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Blocks until the message is on its way. Raises OSError when the connection is gone."""
        self.send_frame(frame(message))

    def send_frame(self, data: bytes) -> None:
        """`send` of a message that is a frame already: one that goes to many."""
        with self._sending:
            self._socket.sendall(data)

    def try_send(self, message: Message) -> None:
        """Sends without ever blocking, or not at all when the connection is busy: for a word that can be left out."""
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

    def receive(self, timeout: float) -> Message:
        """The next message. Raises WireError, LinkClosed or TimeoutError (nothing whole within `timeout` seconds)."""
        deadline = time.monotonic() + timeout
        try:
            while (message := self._next()) is None:
                self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
                self._read()
            return message
        finally:
            self._socket.settimeout(None)

    def receive_ready(self) -> list[Message]:
        """The messages that are here, without waiting for more. Raises WireError, LinkClosed or OSError."""
        with contextlib.suppress(BlockingIOError):
            self._read(socket.MSG_DONTWAIT)
        messages = []
        while (message := self._next()) is not None:
            messages.append(message)
        return messages

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that is blocked in it
        self._socket.close()

    def _read(self, flags: int = 0) -> None:
        try:
            data = self._socket.recv(_CHUNK, flags)
        except ConnectionResetError:  # it closed before it had read all of ours
            data = b""
        if not data:
            raise LinkClosed(f"{self.peer} closed the connection")
        self._buffer += data

    def _next(self) -> Message | None:
        if len(self._buffer) < _HEADER.size:
            return None
        (length,) = _HEADER.unpack_from(self._buffer)
        if length > self.limit:
            raise WireError(
                f"{self.peer} sent a frame of {length} bytes; the limit is {self.limit}: it is no host of ours"
            )
        end = _HEADER.size + length
        if len(self._buffer) < end:
            return None
        body = bytes(memoryview(self._buffer)[_HEADER.size : end])
        del self._buffer[:end]
        try:
            return _decode(body)
        except msgspec.MsgspecError as error:
            raise WireError(f"{self.peer} sent what is no message of ours: {error}") from error
