"""`python -m sgl_jax.launch_server --model-path …`: parse the flags, set up the log, serve."""

import sys
from collections.abc import Sequence

FAILED, BAD_FLAG, INTERRUPTED = 1, 2, 130  # exit codes; 130 is a shell's for a program that Ctrl-C ended


def main(argv: Sequence[str] | None = None, prog: str = "python -m sgl_jax.launch_server") -> int:
    """Serves until told to stop. Returns the exit code. `prog` is the command that was typed."""
    try:
        return _run(argv, prog)
    except KeyboardInterrupt:  # while the flags are read or modules are imported; later the server handles signals
        return INTERRUPTED


def _run(argv: Sequence[str] | None, prog: str) -> int:
    import logging

    from sgl_jax.observability import log
    from sgl_jax.settings.flag_parser import FlagError
    from sgl_jax.settings.hub import HubError
    from sgl_jax.settings.server_args import ServerArgs

    try:
        server_args = ServerArgs.from_cli(argv, prog=prog)
        log.setup(server_args.log_level)
        logger = logging.getLogger("sgl_jax.launch_server")  # __name__ may be __main__, whose lines are not shown
        from sgl_jax import __version__

        logger.info("sgl_jax %s, starting", __version__)
        from sgl_jax.settings.speculators import with_verifier

        server_args = with_verifier(server_args)
    except (FlagError, HubError) as error:
        print(f"sgl_jax: error: {error}", file=sys.stderr)
        return BAD_FLAG if isinstance(error, FlagError) else FAILED
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
