"""Life cycle of the server: bind, start the engine process, and serve it (server/api_process.py).

The modules of the API are imported once the engine process has started, since both import for about a second.
"""

import contextlib
import errno
import logging
import os
import socket
import sys

from sgl_jax.engine.process import CORE_FACTORY
from sgl_jax.engine.transport import NoSockets, ProcessTransport
from sgl_jax.observability.request_tracer import TracingUnavailable, check_installed
from sgl_jax.settings.hub import HubError, refuse_no_model
from sgl_jax.settings.server_args import ServerArgs

logger = logging.getLogger(__name__)

FAILED = 1  # exit code
_BACKLOG = 2048
_PORT_ERRORS = frozenset({errno.EADDRINUSE, errno.EACCES})  # all others are about the address


def serve(server_args: ServerArgs, core_factory: str = CORE_FACTORY) -> int:
    """Serve until told to stop, or until the engine dies. Returns the exit code.

    `core_factory` ("module:function") builds the engine core in the engine process, from `server_args`.
    """
    try:
        listener = _bind(server_args.host, server_args.port)
    except OSError as error:
        where = f"{server_args.host}:{server_args.port}"
        # create_server's own text repeats the address; a name that is not known has a number below 0.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        flag = "--port" if error.errno in _PORT_ERRORS else "--host"
        print(f"sgl_jax: error: cannot listen on {where}: {reason}; choose another {flag}", file=sys.stderr)
        return FAILED
    for risk in server_args.warnings():
        logger.warning("%s", risk)
    with contextlib.closing(listener):
        try:
            refuse_no_model(server_args.model_path)
            if server_args.otlp_traces_endpoint is not None:
                check_installed()
            transport = ProcessTransport(server_args, core_factory)
        except (HubError, NoSockets, TracingUnavailable) as error:
            print(f"sgl_jax: error: {error}", file=sys.stderr)
            return FAILED
        try:
            from sgl_jax.server.api_process import run

            return run(server_args, transport, listener)
        finally:
            transport.kill()


def _bind(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    return socket.create_server(address, family=family, backlog=_BACKLOG, dualstack_ipv6=both)
