"""`python -m sgl_jax.check_env`: what this machine has for serving, whether TPU, GPU and CPU can be used, and if not,
why and what to do. Works whatever is missing, jax included; also as `check_env.check_env()`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from sgl_jax import __version__
from sgl_jax.settings.flag_parser import FlagError, Parser
from sgl_jax.settings.server_args import ENV_PREFIX, default_compilation_cache_dir, environment
from sgl_jax.tools.environment import machine, packages, probing
from sgl_jax.tools.environment.environment_report import render
from sgl_jax.tools.environment.facts import PLATFORMS, Facts, Gpus, Machine, Platform, Probe, Report, Tpus
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
    """Look, print the report to the standard output, and return it. `timeout_s` bounds the trying out of a platform."""
    report = look(environment(), timeout_s)
    encoding = sys.stdout.encoding or "utf-8"
    text = public(render(report), os.path.expanduser("~"))
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()
    return report


def look(environ: Mapping[str, str], timeout_s: float = probing.TIMEOUT_S) -> Report:
    """Find out what this machine has. Nothing is raised for something missing or broken: the report says so."""
    failures: list[str] = []

    def attempt[T](what: str, function: Callable[[], T], otherwise: T) -> T:
        try:
            return function()
        except Exception as error:  # a report with a gap is worth more than none
            failures.append(f"{what}: {type(error).__name__}: {error}")
            return otherwise

    with concurrent.futures.ThreadPoolExecutor() as threads, contextlib.ExitStack() as at_exit:
        gpus = threads.submit(attempt, "GPUs", machine.gpus, Gpus())  # nvidia-smi takes a second
        seen = Facts(
            packages=attempt("packages", packages.collect, ()),
            tpus=attempt("TPUs", machine.tpus, Tpus()),
            environ=environ,
        )

        def probe(platform: Platform) -> Probe:
            if reason := probing.reason_not_to(platform, seen):
                return Probe(platform, "not started", reason)
            alone = probing.variables(platform, environ, seen.gpu_name)
            failed = Probe(platform, "not started", "the process could not be started")
            return attempt(
                f"trying {platform} out", lambda: probing.try_out(platform, alone, timeout_s, at_exit), failed
            )

        tried = [threads.submit(probe, platform) for platform in PLATFORMS]
        cache = cache_folder(environ)
        facts = replace(
            seen,
            machine=attempt("the machine", lambda: machine.look(environ), Machine()),
            compile_cache=attempt("the compile cache", lambda: machine.compile_cache(*cache), None),
            gpus=gpus.result(),
            probes=tuple(each.result() for each in tried),
            not_found_out=tuple(failures),
        )
    return Report(__version__, judge(facts), notices(facts), replace(facts, environ=variables(environ)))


def cache_folder(environ: Mapping[str, str]) -> tuple[str, str]:
    """Where the server keeps compiled programs by default, and what decides it. --compilation-cache-dir wins over it."""
    for variable in (f"{ENV_PREFIX}COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR"):
        if chosen := environ.get(variable):
            return os.path.expanduser(chosen), f"by ${variable}"
    by_user = "by $XDG_CACHE_HOME" if os.path.isabs(environ.get("XDG_CACHE_HOME", "")) else "the default"
    return default_compilation_cache_dir(environ), by_user


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Pick the variables that matter, and hide the values of those that are secret by their name."""
    return {
        name: "(set, hidden)" if value and _SECRET_NAME.search(name) else value
        for name, value in sorted(environ.items())
        if _MATTER.fullmatch(name)
    }


def public(text: str, home: str) -> str:
    """The text without what looks like a secret, and with the home directory as ~: it is pasted into public issues."""
    text = _SECRET.sub("(hidden)", text)
    home = home.rstrip("/")
    return re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text) if home else text


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 when a platform, or the one asked for, is usable, else 1; 2 for a mistake in the use."""
    try:
        options = _parser().read(argv)
    except FlagError as error:
        print(f"check_env: error: {error}", file=sys.stderr)
        return 2
    if sys.stderr.isatty():
        print(f"trying the platforms out, for {options.timeout:g} s at most ...", file=sys.stderr)
    usable = check_env(options.timeout).usable
    if not (options.platform in usable if options.platform else usable):
        return 1
    if options.selftest:
        # The best one that was found usable, as a server takes it.
        platform = options.platform or next(name for name in PLATFORMS if name in usable)
        return 0 if _selftest(platform) else 1
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m sgl_jax.check_env",
        description="What this machine has for serving: versions, devices, limits, and a verdict on TPU, GPU and CPU.",
        epilog="Exit code: 0 when a platform is usable (with --platform, that one) and no self-test failed, else 1.",
        allow_abbrev=False,
    )
    parser.add_argument("--platform", choices=PLATFORMS, help="the platform that must be usable (default: any)")
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=probing.TIMEOUT_S,
        metavar="SECONDS",
        help="how long trying a platform out may take (default: %(default)g)",
    )
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="then check kernels against references on the platform's devices, and time a step; takes minutes",
    )
    return parser


def _selftest(platform: Platform) -> bool:
    from sgl_jax.tools.selftest.run import selftest  # imports jax, which a machine may not have

    def say(line: str) -> None:
        print(public(line, os.path.expanduser("~")), flush=True)

    say("")
    return selftest(platform, say)


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
