"""HOST:PORT of host 0, as --dist-init-addr gives it."""

from __future__ import annotations

import socket
from typing import NamedTuple

LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # by wildcard address, the address at which a host reaches itself


class Address(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def resolve(self) -> tuple[socket.AddressFamily, tuple]:
        """Return family and address to bind or connect to. Raises OSError while the name is not known."""
        family, _, _, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
        return family, address

    def next_port(self) -> Address:
        """Return the address of jax's own coordinator: one port above."""
        return self._replace(port=self.port + 1)


def parse_address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return Address(host.removeprefix("[").removesuffix("]"), int(port))
