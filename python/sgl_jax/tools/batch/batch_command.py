"""Work of `python -m sgl_jax.run_batch`: start a server or take one that runs, and send it the requests of a file."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import aiohttp
import msgspec

from sgl_jax.settings.flag_parser import FlagError, Parser
from sgl_jax.settings.server_args import ServerArgs, environment
from sgl_jax.tools.batch.batch_file import (
    BatchAnswer,
    BatchFileError,
    BatchRequest,
    answered,
    done,
    failed,
    line_of,
    read_requests,
)
from sgl_jax.tools.benchmark.terminal import BAD_USE, INTERRUPTED, SOME_FAILED, request_progress

_POLL_S = 0.2
_MOST_TRIES, _MOST_S = 120, 600.0  # for a request, while the server is full
_LEAST_WAIT_S, _MOST_WAIT_S = 1.0, 30.0  # between two tries; the server says how long in Retry-After
_GAVE_UP = "server_full"  # code of the error of a request that was tried too often


class NoServer(Exception):
    """The server did not start, or is gone."""


def main(argv: Sequence[str] | None = None, prog: str = "python -m sgl_jax.run_batch") -> int:
    """Answer a file's requests. Returns the exit code: 1 if some failed."""
    try:
        args, rest = _parser(prog).parse_known_args(argv)
        if args.base_url is not None and rest:
            raise FlagError(rest[0], f"{rest[0]} is for a server that is started here; leave it or --base-url out")
        key = environment().get("OPENAI_API_KEY") if args.base_url else ServerArgs.from_cli(rest).api_key
        return asyncio.run(_run(args, rest, key))
    except (FlagError, BatchFileError, NoServer) as error:
        print(f"run_batch: error: {error}", file=sys.stderr)
        return SOME_FAILED if isinstance(error, NoServer) else BAD_USE
    except KeyboardInterrupt:
        print("run_batch: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return INTERRUPTED


async def _run(args: argparse.Namespace, rest: Sequence[str], key: str | None) -> int:
    lines = [*read_requests(args.input_file)]
    finished = answered(args.output_file)
    requests = [each for each in lines if isinstance(each, BatchRequest) and each.custom_id not in finished]
    mistakes = [each for each in lines if isinstance(each, BatchAnswer)]
    number_failed = len(mistakes)
    with args.output_file.open("ab") as file, request_progress(len(requests)) as advance:
        file.writelines(map(line_of, mistakes))
        file.flush()
        if not requests:
            return SOME_FAILED if mistakes else 0
        async with _server(args.base_url, rest) as url, _session(url, key) as session:
            waiting = iter(requests)
            given_up = Counter[str]()

            async def send() -> int:
                count = 0
                for request in waiting:
                    answer = await _answer(session, request)
                    file.write(line_of(answer))
                    file.flush()
                    advance()
                    given_up.update([answer.error["code"]] if answer.error else [])
                    count += answer.response is None or answer.response["status_code"] != 200
                return count

            number_failed += sum(await asyncio.gather(*(send() for _ in range(args.concurrency))))
    said = f"{len(requests)} answered, {len(finished)} had been before, {number_failed} failed"
    if number := given_up[_GAVE_UP]:
        said += (
            f" ({number} of them given up after {_MOST_TRIES} tries or {_MOST_S:.0f} s, since the server stayed full)"
        )
    print(f"run_batch: {said}: {args.output_file}", file=sys.stderr)
    return SOME_FAILED if number_failed else 0


async def _answer(session: aiohttp.ClientSession, request: BatchRequest) -> BatchAnswer:
    """Send a request, again while the server says that it is full. Raises NoServer if it is gone."""
    tries, started = 0, time.monotonic()
    while True:
        try:
            async with session.post(request.url, data=msgspec.json.encode(request.body)) as response:
                tries += 1
                content = await response.read()
                if response.status not in (429, 503):
                    request_id = response.headers.get("x-request-id", "")
                    return done(request, response.status, request_id, msgspec.json.decode(content))
                wait = _wait_s(response.headers.get("retry-after", ""))
                spent = time.monotonic() - started
                if tries >= _MOST_TRIES or spent + wait > _MOST_S:
                    return failed(request.custom_id, _GAVE_UP, _gave_up(response.status, content, tries, spent))
            await asyncio.sleep(wait)
        except aiohttp.ClientConnectorError as error:
            raise NoServer(f"no server answers: {error}; the same command goes on where it stopped") from error
        except (aiohttp.ClientError, msgspec.DecodeError) as error:
            return failed(request.custom_id, "no_answer", str(error) or type(error).__name__)


def _wait_s(retry_after: str) -> float:
    """Return the seconds until the next try. A server may name a date, too, which counts as nothing said."""
    return min(max(float(retry_after) if retry_after.isdecimal() else 0.0, _LEAST_WAIT_S), _MOST_WAIT_S)


def _gave_up(status: int, content: bytes, tries: int, seconds: float) -> str:
    said = content[:300].decode("utf-8", "replace")
    limits = f"the limits are {_MOST_TRIES} tries and {_MOST_S:.0f} s"
    return f"the server answered {status} to each of {tries} tries in {seconds:.0f} s; {limits}: {said}"


@contextlib.asynccontextmanager
async def _server(base_url: str | None, flags: Sequence[str]) -> AsyncIterator[str]:
    """Give the address of a server that answers: the one that is named, or one started with these flags until the end."""
    if base_url is not None:
        yield base_url
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "sgl_jax.launch_server", *flags, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command)
    try:
        url = f"http://127.0.0.1:{port}"
        async with aiohttp.ClientSession(url) as session:
            while not await _is_ready(session):
                if process.poll() is not None:
                    raise NoServer(f"the server ended with code {process.returncode} before it was ready")
                await asyncio.sleep(_POLL_S)
        yield url
    finally:
        process.terminate()
        process.wait()


async def _is_ready(session: aiohttp.ClientSession) -> bool:
    with contextlib.suppress(aiohttp.ClientError):
        async with session.get("/ready") as response:
            return response.status == 200
    return False


def _session(url: str, key: str | None) -> aiohttp.ClientSession:
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    no_limit = aiohttp.ClientTimeout(total=None)
    return aiohttp.ClientSession(url, headers=headers, connector=aiohttp.TCPConnector(limit=0), timeout=no_limit)


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description="Answer a file of requests in the form of OpenAI's batch API.",
        epilog="Every flag of the server is taken as well (python -m sgl_jax.launch_server --help), unless --base-url is given.",
        allow_abbrev=False,
    )
    parser.add_argument("-i", "--input-file", type=Path, required=True, metavar="FILE", help="a request a line")
    text = "an answer a line, in the order in which they come; requests that it answers already are left out"
    parser.add_argument("-o", "--output-file", type=Path, required=True, metavar="FILE", help=text)
    text = "a server that runs, instead of one that is started here; OPENAI_API_KEY holds its key"
    parser.add_argument("--base-url", metavar="URL", help=text)
    text = "requests that are sent at a time (default: %(default)s); the server's scheduler makes batches of them"
    parser.add_argument("--concurrency", type=_count, default=256, metavar="N", help=text)
    return parser


def _count(text: str) -> int:
    if not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)
