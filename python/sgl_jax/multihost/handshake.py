"""Handshake of host 0 and another host: each proves that it has the token, then host 0 compares their identities.

Both sides send a random number and answer the other's with HMAC-SHA256 under the token and their own role, so that no
answer can be sent back or used again. Later messages are neither encrypted nor signed: the network must be private.
"""

import hmac
import secrets
from collections.abc import Callable

from sgl_jax.multihost import wire
from sgl_jax.multihost.identity import differences
from sgl_jax.multihost.wire import PROTOCOL, HostMessage, HostsError, Identity, Link

TIMEOUT_S = 10.0  # for each message of the other side
_NONCE_BYTES = 32
_TOKENS_DIFFER = "the tokens differ; give every host the same --dist-token"


class RefusedError(HostsError):
    """One side refuses to work with the other, and has told it why."""


def admit(link: Link, token: str, identity: Identity, claim: Callable[[int], str]) -> int:
    """Perform host 0's side and return the other host's node rank. `claim(rank)` returns "" or why it cannot have it.

    Raises RefusedError after telling the other host the reason, or WireError, LinkClosed, TimeoutError, OSError.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES)
    link.send(wire.Challenge(PROTOCOL, nonce))
    answer = _expect(link, wire.ChallengeResponse)
    if not hmac.compare_digest(answer.proof, _proof(token, b"follower", nonce, answer.nonce)):
        _refuse(link, _TOKENS_DIFFER)
    link.send(wire.Welcome(_proof(token, b"leader", answer.nonce, nonce)))
    hello = _expect(link, wire.Hello)
    other = f"host {hello.node_rank}"
    if found := differences(identity, hello.identity, other):
        _refuse(link, "; ".join(found))
    if reason := claim(hello.node_rank):
        _refuse(link, reason)
    link.peer = f"{other} ({link.peer})"
    link.limit = wire.LIMIT
    link.send(wire.Accepted())
    return hello.node_rank


def introduce(link: Link, token: str, node_rank: int, identity: Identity) -> None:
    """Perform the other host's side. Raises RefusedError with host 0's reason, or WireError, LinkClosed, TimeoutError,
    OSError."""
    challenge = _expect(link, wire.Challenge)
    if challenge.protocol != PROTOCOL:
        raise RefusedError(f"{link.peer} speaks version {challenge.protocol} of the protocol, and this host {PROTOCOL}")
    nonce = secrets.token_bytes(_NONCE_BYTES)
    link.send(wire.ChallengeResponse(nonce, _proof(token, b"follower", challenge.nonce, nonce)))
    welcome = _expect(link, wire.Welcome)
    if not hmac.compare_digest(welcome.proof, _proof(token, b"leader", nonce, challenge.nonce)):
        raise RefusedError(f"{link.peer}: {_TOKENS_DIFFER}")
    link.send(wire.Hello(node_rank, identity))
    _expect(link, wire.Accepted)
    link.limit = wire.LIMIT


def _expect[M: HostMessage](link: Link, kind: type[M]) -> M:
    message = link.receive(TIMEOUT_S)
    if isinstance(message, wire.Refusal):
        raise RefusedError(f"{link.peer} refuses this host: {printable(message.message)}")
    return wire.checked(message, kind, link.peer)


def _refuse(link: Link, reason: str) -> None:
    link.send(wire.Refusal(reason))
    raise RefusedError(f"{link.peer} is refused: {printable(reason)}")


def printable(text: str) -> str:
    """Shorten another host's text and make it fit one line of a log."""
    return "".join(c if c.isprintable() else " " for c in text[:2000])


def _proof(token: str, role: bytes, *nonces: bytes) -> bytes:
    # The first nonce is the one that is answered. Both have a fixed length, so bytes cannot move from one to the other.
    return hmac.digest(token.encode(), role + b"".join(nonces), "sha256")
