"""The first words between host 0 and another: each proves that it has the token, then versions, flags and model are compared.

Both sides send a random number and answer the other's with HMAC-SHA256 under the token, as their own role, so that no
answer can be sent back or used again. What follows is neither encrypted nor signed: the network must be a private one.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable

from sgl_jax.multihost.host_errors import HostsError, WireError
from sgl_jax.multihost.identity import differences
from sgl_jax.multihost.wire import (
    LIMIT,
    PROTOCOL,
    Accepted,
    Answer,
    Challenge,
    Hello,
    Identity,
    Link,
    Message,
    Refused,
    Welcome,
)

TIMEOUT_S = 10.0  # for each of the other side's words
_NONCE_BYTES = 32
_TOKENS_DIFFER = "the tokens differ; give every host the same --dist-token"


class RefusedError(HostsError):
    """One side does not work with the other, and has told it why."""


def admit(link: Link, token: str, identity: Identity, claim: Callable[[int], str]) -> int:
    """Host 0's side. Returns the other's node rank, once `claim(rank)` has nothing against it ("", or why not).

    Raises RefusedError after telling the other side the same, or WireError, LinkClosed, TimeoutError, OSError.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES)
    link.send(Challenge(PROTOCOL, nonce))
    answer = _expect(link, Answer)
    if not hmac.compare_digest(answer.proof, _proof(token, b"follower", nonce, answer.nonce)):
        _refuse(link, _TOKENS_DIFFER)
    link.send(Welcome(_proof(token, b"leader", answer.nonce, nonce)))
    hello = _expect(link, Hello)
    other = f"host {hello.node_rank}"
    if found := differences(identity, hello.identity, other):
        _refuse(link, "; ".join(found))
    if reason := claim(hello.node_rank):
        _refuse(link, reason)
    link.peer = f"{other} ({link.peer})"
    link.limit = LIMIT
    link.send(Accepted())
    return hello.node_rank


def introduce(link: Link, token: str, node_rank: int, identity: Identity) -> None:
    """The other hosts' side. Raises RefusedError with host 0's reason, or WireError, LinkClosed, TimeoutError, OSError."""
    challenge = _expect(link, Challenge)
    if challenge.protocol != PROTOCOL:
        raise RefusedError(f"{link.peer} speaks version {challenge.protocol} of the protocol, and this host {PROTOCOL}")
    nonce = secrets.token_bytes(_NONCE_BYTES)
    link.send(Answer(nonce, _proof(token, b"follower", challenge.nonce, nonce)))
    welcome = _expect(link, Welcome)
    if not hmac.compare_digest(welcome.proof, _proof(token, b"leader", nonce, challenge.nonce)):
        raise RefusedError(f"{link.peer}: {_TOKENS_DIFFER}")
    link.send(Hello(node_rank, identity))
    _expect(link, Accepted)
    link.limit = LIMIT


def _expect[M: Message](link: Link, kind: type[M]) -> M:
    message = link.receive(TIMEOUT_S)
    if isinstance(message, Refused):
        raise RefusedError(f"{link.peer} refuses this host: {printable(message.message)}")
    if not isinstance(message, kind):
        raise WireError(f"{link.peer} sent {type(message).__name__} where {kind.__name__} was due")
    return message


def _refuse(link: Link, reason: str) -> None:
    link.send(Refused(reason))
    raise RefusedError(f"{link.peer} is refused: {printable(reason)}")


def printable(text: str) -> str:
    """Shorten what another host said, fit for one line of a log."""
    return "".join(c if c.isprintable() else " " for c in text[:2000])


def _proof(token: str, role: bytes, *nonces: bytes) -> bytes:
    # The first nonce is the one that is answered. Both have a fixed length: nothing can slide from one to the other.
    return hmac.digest(token.encode(), role + b"".join(nonces), "sha256")
