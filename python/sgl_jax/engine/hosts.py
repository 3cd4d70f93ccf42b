"""The engine over several machines: how each finds the others, and the core of the one that leads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NoReturn

import numpy as np

from sgl_jax.engine.core import Core
from sgl_jax.engine.messages import Command, EngineInfo, Event
from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.multihost.address import LOOPBACK, parse_address
from sgl_jax.multihost.follower import Follower, connect
from sgl_jax.multihost.identity import identity_of
from sgl_jax.multihost.leader import Leader
from sgl_jax.multihost.wire import Identity
from sgl_jax.parallel.processes import join_processes
from sgl_jax.settings.server_args import ServerArgs

# Ends the process at once and says why, from any thread: the engine's own may hang in a collective.
type Die = Callable[[str], NoReturn]


class Alone:
    """Stands in for Leader and Follower in an engine on one machine."""

    def agree(self, value: int) -> int:
        return value

    def announce(self, program: str, vector: np.ndarray, source: str = "") -> None:
        """There is nobody to tell."""


def lead(args: ServerArgs, die: Die) -> Leader:
    """Machine 0 waits until all others are there. Raises ValueError."""
    address = parse_address(args.dist_init_addr or "")
    leader = Leader(address, args.nnodes, _identity(args), args.dist_token or "", die)
    leader.gather(args.dist_timeout)
    return leader


def follow_leader(args: ServerArgs, die: Die) -> Follower:
    """Another machine finds machine 0, which accepts it. Raises ValueError."""
    address = parse_address(args.dist_init_addr or "")
    identity = _identity(args)
    return Follower(connect(address, args.node_rank, identity, args.dist_token or "", args.dist_timeout), die)


def unite(args: ServerArgs, hosts: Leader | Follower) -> None:
    """Every machine calls it when all are there: jax is one over all of them then."""
    bind = parse_address(args.dist_init_addr or "").next_port()
    coordinator = bind
    if isinstance(hosts, Follower):
        coordinator = bind._replace(port=hosts.wait_start())
    elif bind.host in LOOPBACK:
        coordinator = bind._replace(host=LOOPBACK[bind.host])
    join_processes(str(coordinator), str(bind), args.nnodes, args.node_rank, args.dist_timeout)


def _identity(args: ServerArgs) -> Identity:
    checkpoint = open_checkpoint(args.model_path, load_format=args.load_format, downloads=args.downloads)
    configs = {"config.json": checkpoint.config, "generation_config.json": checkpoint.generation_config}
    return identity_of(args, configs, None if checkpoint.format == "dummy" else checkpoint.path)


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
