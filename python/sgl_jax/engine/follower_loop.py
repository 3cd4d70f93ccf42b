"""The engine on every host but host 0: it loads its shard of the model and runs the programs that host 0 announces.

It has no HTTP server, no scheduler and no tokenizer. It ends with host 0, and host 0 ends with it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NoReturn

from sgl_jax.settings.server_args import ServerArgs

if TYPE_CHECKING:
    from sgl_jax.multihost.follower import Follower

logger = logging.getLogger(__name__)

OK, FAILED = 0, 1  # exit codes
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def follow(args: ServerArgs) -> NoReturn:
    """Work until host 0 ends, then exit: with 0 after a signal or if host 0 ended as it should, else with 1."""
    # A thread that is blocked in a collective runs no signal handler, so a thread of its own waits for signals. Threads
    # inherit the mask, which is therefore set before any library starts one.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    hosts: list[Follower] = []
    threading.Thread(target=_end_on_signal, args=(hosts,), name="sgl-jax-signals", daemon=True).start()

    from sgl_jax.engine.hosts import follow_leader, unite
    from sgl_jax.engine.loop import one_line
    from sgl_jax.engine.startup import build_device_side

    try:
        hosts.append(follow_leader(args, _die))  # from here on host 0 is told why this host ends
        logger.info("Connected to host 0 at %s as node rank %d", args.dist_init_addr, args.node_rank)
        unite(args, hosts[0])
        runner = build_device_side(args, hosts[0]).runner
        logger.info("Ready: this host runs what host 0 tells it to")
        finisher = ThreadPoolExecutor(1, thread_name_prefix="sgl-jax-finished")
        for program, vector, source in hosts[0].runs():
            finisher.submit(_finish, hosts[0], runner.execute(program, vector, source))
    except Exception as error:
        if not isinstance(error, ValueError | OSError):  # for these two the message is enough
            logger.exception("the engine failed")
        for each in hosts:
            each.close(one_line(error))
        _die(one_line(error))
    logger.info("Host 0 has ended")
    _exit(OK)


def _finish(host: Follower, result: object) -> None:
    """Wait for a program's result, in a thread, since the next program is started meanwhile."""
    import jax

    jax.block_until_ready(result)
    host.num_finished += 1


def _end_on_signal(hosts: list[Follower]) -> None:
    name = signal.Signals(signal.sigwait(_SIGNALS)).name
    logger.info("Told to stop by %s", name)
    for each in hosts:
        each.close(f"it was told to stop by {name}")
    _exit(OK)


def _die(reason: str) -> NoReturn:
    print(f"sgl_jax: error: {reason}", file=sys.stderr)
    _exit(FAILED)


def _exit(code: int) -> NoReturn:
    # Threads may be inside a device runtime, or in a collective that never ends, so nothing waits for them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
