"""The engine over several machines: how each finds the others, and the core of the one that leads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from sgl_jax.engine.core import Core
from sgl_jax.engine.messages import Command, EngineInfo, Event
from sgl_jax.models.checkpoint import fetch
from sgl_jax.multihost.address import ANY, parse_address
from sgl_jax.multihost.follower import Follower, connect
from sgl_jax.multihost.identity import identity_of
from sgl_jax.multihost.leader import Leader
from sgl_jax.parallel.processes import join_processes
from sgl_jax.server_args import ServerArgs

# Ends the process at once and says why, from any thread: the engine's own may hang in a collective.
type Die = Callable[[str], NoReturn]


class Alone:
    """What Leader and Follower are to an engine on one machine."""

    def agree(self, value: int) -> int:
        return value


def lead(args: ServerArgs, die: Die) -> Leader:
    """Waits for the other machines; jax is one over all of them then. Raises ValueError."""
    address = parse_address(args.dist_init_addr or "")
    leader = Leader(address, args.nnodes, identity_of(args, _model(args)), args.dist_token or "", die)
    leader.gather(args.dist_timeout)
    bind = address.next_port()
    here = bind._replace(host="127.0.0.1" if bind.host == ANY[0] else "::1") if bind.host in ANY else bind
    join_processes(str(here), str(bind), args.nnodes, 0, args.dist_timeout)
    return leader


def find_leader(args: ServerArgs, die: Die) -> Follower:
    """A machine that is not the first finds machine 0, which accepts it. Raises ValueError."""
    address = parse_address(args.dist_init_addr or "")
    identity = identity_of(args, _model(args))
    return Follower(connect(address, args.node_rank, identity, args.dist_token or "", args.dist_timeout), die)


def join(args: ServerArgs, follower: Follower) -> None:
    """Waits until every machine is there; jax is one over all of them then."""
    coordinator = str(parse_address(args.dist_init_addr or "")._replace(port=follower.wait_start()))
    join_processes(coordinator, coordinator, args.nnodes, args.node_rank, args.dist_timeout)


def _model(args: ServerArgs) -> Path:
    return fetch(args.model_path, download_dir=args.download_dir, weights=args.load_format != "dummy")


class LeadingCore:
    """A core whose programs run on other machines, too: it ends with them, and they with it."""

    def __init__(self, core: Core, leader: Leader):
        self._core, self._leader = core, leader

    @property
    def info(self) -> EngineInfo:
        return self._core.info

    @property
    def busy(self) -> bool:
        return self._core.busy

    def handle(self, command: Command) -> None:
        with self._leader.blaming():
            self._core.handle(command)

    def step(self) -> list[Event]:
        with self._leader.blaming():
            return self._core.step()

    def close(self, reason: str = "") -> None:
        with contextlib.suppress(Exception) if reason else contextlib.nullcontext():
            self._core.close()
        self._leader.close(reason)
