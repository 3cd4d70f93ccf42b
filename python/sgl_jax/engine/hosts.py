"""An engine over several hosts: how each host finds the others, and the core of host 0."""

import contextlib
from collections.abc import Callable
from typing import NoReturn

import msgspec

from sgl_jax.engine.core import Core
from sgl_jax.engine.messages import Command, Event
from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.multihost.address import LOOPBACK, parse_address
from sgl_jax.multihost.follower import Follower, connect
from sgl_jax.multihost.identity import identity_of, model_files
from sgl_jax.multihost.leader import Leader
from sgl_jax.multihost.wire import Identity
from sgl_jax.parallel.processes import join_processes
from sgl_jax.settings.server_args import ServerArgs

# Ends the process with a reason, at once and from any thread, since the engine's own may hang in a collective.
type Die = Callable[[str], NoReturn]


def lead(args: ServerArgs, die: Die) -> Leader:
    """Wait, on host 0, until all other hosts are there. Raises ValueError."""
    leader = Leader(parse_address(args.dist_init_addr or ""), args.nnodes, _identity(args), args.dist_token or "", die)
    leader.gather(args.dist_timeout)
    return leader


def follow_leader(args: ServerArgs, die: Die) -> Follower:
    """Connect any other host to host 0, and wait until host 0 accepts it. Raises ValueError."""
    address, identity = parse_address(args.dist_init_addr or ""), _identity(args)
    return Follower(connect(address, args.node_rank, identity, args.dist_token or "", args.dist_timeout), die)


def unite(args: ServerArgs, hosts: Leader | Follower) -> None:
    """Make jax one program over the devices of all hosts. Every host calls it, when all are there."""
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
    dummy = checkpoint.format == "dummy"
    identity = identity_of(args, configs, None if dummy else checkpoint.path)
    path = args.speculation.draft_model_path if args.speculation else None
    if path is None:
        return identity
    draft = open_checkpoint(path, load_format="dummy" if dummy else "auto", downloads=args.downloads)
    files = model_files({"config.json": draft.config}, None if dummy else draft.path)
    of_draft = {f"the draft model's {name}": fingerprint for name, fingerprint in files.items()}
    return msgspec.structs.replace(identity, model=identity.model | of_draft)


class LeadingCore:
    """The core of host 0. Other hosts run its programs, too: it ends with them, and they end with it."""

    def __init__(self, core: Core, leader: Leader):
        self._core, self._leader = core, leader
        self.info = core.info

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
