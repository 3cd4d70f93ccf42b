"""Work of `python -m sgl_jax chat`: find who answers, and chat."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing

from sgl_jax.settings.flag_parser import FlagError, Parser
from sgl_jax.settings.server_args import environment
from sgl_jax.tools.benchmark.terminal import BAD_USE, INTERRUPTED, SOME_FAILED
from sgl_jax.tools.chat.chat_loop import ChatLoop
from sgl_jax.tools.chat.peers import ChatError, EnginePeer, Peer, ServerPeer

_URL = "http://127.0.0.1:30000"


def main(argv: Sequence[str] | None = None, prog: str = "python -m sgl_jax chat") -> int:
    """Chat until the input ends. Returns the exit code."""
    try:
        args, rest = _parser(prog).parse_known_args(argv)
        with closing(_peer(args, rest)) as peer:
            return ChatLoop(peer).run()
    except (FlagError, ChatError) as error:
        print(f"chat: error: {error}", file=sys.stderr)
        return BAD_USE if isinstance(error, FlagError) else SOME_FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def _peer(args: argparse.Namespace, rest: Sequence[str]) -> Peer:
    """Return the server, or an engine if flags of one are given."""
    if rest:
        for flag, given in (("--url", args.url), ("--api-key", args.api_key)):
            if given is not None:
                raise FlagError(flag, f"{rest[0]} is for an engine in this process; leave it or {flag} out")
        return EnginePeer(rest, args.model_name)
    url = args.url or _URL
    if not url.startswith(("http://", "https://")):
        raise FlagError("--url", f"--url is {url}; it must begin with http:// or https://")
    variables = environment()
    key = args.api_key or variables.get("SGL_JAX_API_KEY") or variables.get("OPENAI_API_KEY")
    return ServerPeer(url, key, args.model_name)


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} [--url URL] [--api-key KEY] [--model-name NAME]\n       {prog} --model-path PATH [server flags]",
        description="Chat with a server that runs, or with a model that is loaded in this process. /help lists commands. "
        "Without a terminal each line is a question, and only answers are written.",
        allow_abbrev=False,
    )
    parser.add_argument("--url", metavar="URL", help=f"the server (default: {_URL})")
    text = "the server's key (default: SGL_JAX_API_KEY or OPENAI_API_KEY of the environment)"
    parser.add_argument("--api-key", metavar="KEY", help=text)
    text = "the model or adapter that requests name (default: the first of /v1/models)"
    parser.add_argument("--model-name", metavar="NAME", help=text)
    return parser
