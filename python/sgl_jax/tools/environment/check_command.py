"""Work of `python -m sgl_jax.check_env`: look at the machine, print the report, and run the self-test if asked."""

import argparse
import concurrent.futures
import contextlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sgl_jax import __version__
from sgl_jax.settings.flag_parser import FlagError, Parser
from sgl_jax.settings.server_args import environment
from sgl_jax.tools.environment import machine, packages, probing
from sgl_jax.tools.environment.environment_report import render
from sgl_jax.tools.environment.facts import PLATFORMS, Facts, Report
from sgl_jax.tools.environment.verdicts import judge, notices

# Variables that change what jax, the accelerators' runtimes, downloads or this program do.
_MATTER = re.compile(
    r"(JAX|XLA|LIBTPU|TPU|CLOUD_TPU|MEGASCALE|PJRT|CUDA|NVIDIA|NCCL|ROCR|HIP|SGL_JAX|OMP|TF_CPP)_\w+"
    r"|(HF|HUGGING_?FACE|MODELSCOPE)_\w+"
    r"|LD_LIBRARY_PATH|LD_PRELOAD|PYTHONPATH|XDG_CACHE_HOME|TMPDIR"
)
_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH")
_SECRET = re.compile(r"\b(hf_\w{8,}|sk-[\w-]{8,}|gh[pousr]_\w{8,}|AKIA\w{8,})|(?<=://)[^/\s@]+(?=@)")


def check_env(timeout_s: float = probing.TIMEOUT_S) -> Report:
    """Look, print the report to the standard output, and return it. `timeout_s` bounds the trying of a platform."""
    report = look(environment(), timeout_s)
    _say(render(report))
    return report


def look(environ: Mapping[str, str], timeout_s: float = probing.TIMEOUT_S) -> Report:
    """Find out what this machine has. Nothing is raised for something missing or broken: the report says so."""
    seen = Facts(packages.collect(), machine.look(environ), machine.tpus(), machine.gpus(), environ=environ)
    with concurrent.futures.ThreadPoolExecutor() as threads, contextlib.ExitStack() as at_exit:
        tried = [threads.submit(probing.probe, each, seen, timeout_s, at_exit) for each in PLATFORMS]
        facts = replace(seen, probes=tuple(each.result() for each in tried))
    return Report(__version__, judge(facts), notices(facts), replace(facts, environ=variables(environ)))


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Pick the variables that matter, and hide the values of those that are secret by their name."""
    chosen = {name: value for name, value in sorted(environ.items()) if _MATTER.fullmatch(name)}
    return {name: "(set, hidden)" if text and _SECRET_NAME.search(name) else text for name, text in chosen.items()}


def public(text: str, home: str) -> str:
    """Return the text without secrets, as far as they show, and with the home directory as ~: it may be published."""
    text = _SECRET.sub("(hidden)", text)
    home = home.rstrip("/")
    return re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text) if home else text


def main(argv: Sequence[str] | None = None, prog: str = "python -m sgl_jax.check_env") -> int:
    """Return the exit code: 0 when a platform, or the one asked for, is usable, else 1; 2 for a mistake in the use."""
    try:
        options = _parser(prog).read(argv)
    except FlagError as error:
        print(f"check_env: error: {error}", file=sys.stderr)
        return 2
    if sys.stderr.isatty():
        print(f"trying the platforms out, for {options.timeout:g} s at most ...", file=sys.stderr)
    usable = check_env(options.timeout).usable
    # Without --platform it is the best usable one, which a server would take.
    platform = options.platform or next(iter(usable), None)
    if platform not in usable:
        return 1
    if not options.selftest:
        return 0
    from sgl_jax.tools.selftest.numerics import selftest  # imports jax, which a machine may not have

    return 0 if selftest(platform, _say) else 1


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description="What this machine has for serving: versions, devices, and a verdict on TPU, GPU and CPU.",
        epilog="Exit code: 0 when a platform is usable (with --platform, that one) and no self-test failed, else 1.",
        allow_abbrev=False,
    )
    parser.add_argument("--platform", choices=PLATFORMS, help="the platform that must be usable (default: any)")
    text = "how long trying a platform out may take (default: %(default)g)"
    parser.add_argument("--timeout", type=seconds, default=probing.TIMEOUT_S, metavar="SECONDS", help=text)
    text = "then check kernels against references on the platform's devices, and run steps of a model; takes minutes"
    parser.add_argument("--selftest", action="store_true", help=text)
    return parser


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value


def _say(text: str) -> None:
    """Print a text without secrets, with the characters that the standard output cannot hold escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    text = public(text, os.path.expanduser("~"))
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
