"""The engine process's ends of the sockets to the API process (engine/transport.py has the others)."""

from __future__ import annotations

from typing import Any

import msgspec
import zmq

from sgl_jax.engine.messages import Command, Event


class ZmqInbox:
    """The engine's end for commands."""

    def __init__(self, context: zmq.Context[Any], address: str):
        self._socket = context.socket(zmq.PULL)
        self._socket.set_hwm(0)
        self._socket.bind(address)
        self._decode = msgspec.msgpack.Decoder(Command).decode

    def get(self, block: bool) -> Command | None:
        try:
            return self._decode(self._socket.recv(0 if block else zmq.NOBLOCK))
        except zmq.Again:
            return None


class ZmqOutbox:
    """The engine's end for events."""

    def __init__(self, context: zmq.Context[Any], address: str):
        self._socket = context.socket(zmq.PUSH)
        self._socket.set_hwm(0)
        self._socket.connect(address)
        self._encode = msgspec.msgpack.Encoder().encode

    def send(self, event: Event) -> None:
        self._socket.send(self._encode(event))
