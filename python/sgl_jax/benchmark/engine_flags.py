"""The flags of tools that run an engine in their own process: the tool's own, and all of the server's."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Collection, Sequence
from typing import Any

from sgl_jax.benchmark.errors import BenchmarkError
from sgl_jax.observability import log
from sgl_jax.server_args import FLAGS, SERVER, ServerArgs, ServerArgsError

logger = logging.getLogger(__name__)


def read_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, ServerArgs]:
    """What `parser` does not know must be a flag of the server. Raises BenchmarkError for one that is refused."""
    args, rest = parser.parse_known_args(argv)
    try:
        return args, ServerArgs.from_cli(rest)
    except ServerArgsError as error:
        raise BenchmarkError(str(error)) from None


def start_log(server_args: ServerArgs, without_effect: Collection[str] = ()) -> None:
    """The engine's log on standard error, beginning with the flags that change nothing here.

    Those are the HTTP server's, and the fields that `without_effect` names.
    """
    log.setup(server_args.log_level)
    for flag, message in server_args.notices().items():
        log.once(logger, flag, message)
    changed = server_args.changed()
    for each in FLAGS:
        if each.name in changed and (each.about.group == SERVER or each.name in without_effect):
            log.once(logger, each.option, f"{each.option} has no effect: this tool has no part that it is about.")


def engine_options(server_args: ServerArgs) -> dict[str, Any]:
    """What `sgl_jax.Engine` is to be called with: the flags that differ from their defaults, without the HTTP server's."""
    values = {each: getattr(server_args, each.name) for each in FLAGS}
    return {
        each.name: value for each, value in values.items() if not each.is_default(value) and each.about.group != SERVER
    }
