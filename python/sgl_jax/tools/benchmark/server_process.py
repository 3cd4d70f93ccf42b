"""A server of the benchmark's own: started from server flags, waited for, and stopped whatever happens."""

import contextlib
import http.client
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from sgl_jax.tools.benchmark.arguments import START_TIMEOUT_S, server_arguments
from sgl_jax.tools.benchmark.terminal import BenchmarkError

_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.1
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_STDERR = 2  # the benchmark's standard output is its result


@dataclass(frozen=True)
class StartedServer:
    url: str
    api_key: str | None
    start_seconds: float  # from starting the process until /ready says yes
    process: subprocess.Popen[bytes]

    def check(self) -> None:
        """Raises BenchmarkError when the server has ended."""
        if (code := self.process.poll()) is not None:
            raise BenchmarkError(f"the server ended with code {code}; its last words are above")


@contextlib.contextmanager
def started_server(flags: Sequence[str], timeout_s: float = START_TIMEOUT_S) -> Iterator[StartedServer]:
    """Run `python -m sgl_jax.launch_server` with these flags, on a free port unless --port is among them, until the block ends.

    Its output goes to standard error, from warnings on unless the log level is set. SIGTERM, SIGHUP and Ctrl-C
    end the block too. Raises BenchmarkError for a flag that is refused, and when the server ends before it is ready or is
    not ready after `timeout_s` seconds.
    """
    args = server_arguments(flags)
    host = _ANY_ADDRESS.get(args.host, args.host)
    is_chosen = any(word.partition("=")[0] == "--port" for word in flags)
    port = _free_port(args.host, args.port if is_chosen else 0)
    quiet = [] if "log_level" in args.changed() else ["--log-level", "warning"]
    command = [sys.executable, "-m", "sgl_jax.launch_server", *flags, *quiet, "--port", str(port)]
    start = time.perf_counter()
    handlers = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        # In a process group of its own: Ctrl-C in a terminal reaches the benchmark alone, which then stops the server.
        process = subprocess.Popen(command, stdout=_STDERR, process_group=0)
        try:
            _wait_ready(process, host, port, start + timeout_s)
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            yield StartedServer(url, args.api_key, time.perf_counter() - start, process)
        finally:
            try:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_STOP_TIMEOUT_S)
            finally:  # also when a second Ctrl-C interrupts the wait
                process.kill()
                process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    """Handle a signal by an exception, so that the block with the server ends."""
    raise SystemExit(128 + number)


def _free_port(host: str, port: int) -> int:
    """Return the port itself, or any free one for 0. Another server on it would be measured in place of ours."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise BenchmarkError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
        return listener.getsockname()[1]


def _wait_ready(process: subprocess.Popen[bytes], host: str, port: int, deadline: float) -> None:
    while True:
        if (code := process.poll()) is not None:
            raise BenchmarkError(f"the server ended with code {code} before it was ready; its last words are above")
        connection = http.client.HTTPConnection(host, port, timeout=5)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        if time.perf_counter() > deadline:
            raise BenchmarkError("the server was not ready in time; give it longer with --start-timeout SECONDS")
        time.sleep(_POLL_S)
