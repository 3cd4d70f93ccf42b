"""`python -m sgl_jax.launch_server --model-path …`: parse the flags, set up the log, serve."""

import logging
import sys
from collections.abc import Sequence

from sgl_jax.observability import log
from sgl_jax.settings.flag_parser import FlagError
from sgl_jax.settings.server_args import ServerArgs

BAD_FLAG = 2  # exit code


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until told to stop. Returns the exit code."""
    try:
        server_args = ServerArgs.from_cli(argv)
    except FlagError as error:
        print(f"sgl_jax: error: {error}", file=sys.stderr)
        return BAD_FLAG
    log.setup(server_args.log_level)
    logger = logging.getLogger(__name__)
    for flag, message in server_args.notices().items():
        log.once(logger, flag, message)

    if server_args.compile_only:
        from sgl_jax.planning.compile_command import compile_here

        return compile_here(server_args)

    if server_args.node_rank > 0:
        from sgl_jax.engine.follower_loop import follow

        follow(server_args)

    from sgl_jax.server.lifecycle import serve

    return serve(server_args)


if __name__ == "__main__":
    sys.exit(main())
