"""`python -m sgl_jax.check_env`: what this machine has for serving, whether TPU, GPU and CPU can be used, and if not,
why and what to do. Works whatever is missing, jax included; also as `check_env.check_env()`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from sgl_jax import __version__
from sgl_jax.environment import accelerators, machine, packages, privacy, probing
from sgl_jax.environment.facts import PLATFORMS, Facts, Gpus, Machine, Platform, Probe, Report, Tpus
from sgl_jax.environment.notices import notices
from sgl_jax.environment.report import render
from sgl_jax.environment.verdicts import judge
from sgl_jax.server_args import ENV_PREFIX, default_compilation_cache_dir, environment


def check_env(timeout_s: float = probing.TIMEOUT_S) -> Report:
    """Look, print the report to the standard output, and return it. `timeout_s` bounds the trying out of a platform."""
    report = look(environment(), timeout_s)
    _print(render(report))
    return report


def look(environ: Mapping[str, str], timeout_s: float = probing.TIMEOUT_S) -> Report:
    """What this machine has. Nothing is raised for something missing or broken: the report says so."""
    failures: list[str] = []

    def attempt[T](what: str, function: Callable[[], T], otherwise: T) -> T:
        try:
            return function()
        except Exception as error:  # a report with a gap is worth more than none
            failures.append(f"{what}: {type(error).__name__}: {error}")
            return otherwise

    with concurrent.futures.ThreadPoolExecutor() as threads, probing.Processes() as processes:
        gpus = threads.submit(attempt, "GPUs", accelerators.gpus, Gpus())  # nvidia-smi takes a second
        seen = Facts(
            packages=attempt("packages", packages.collect, ()),
            tpus=attempt("TPUs", accelerators.tpus, Tpus()),
            environ=environ,
        )

        def probe(platform: Platform) -> Probe:
            if reason := probing.reason_not_to(platform, seen):
                return Probe(platform, "not started", reason)
            return attempt(
                f"trying {platform} out",
                lambda: probing.try_out(platform, environ, timeout_s, seen.gpu_plugin, processes),
                Probe(platform, "not started", "the process could not be started"),
            )

        probes = [threads.submit(probe, platform) for platform in PLATFORMS]
        cache_path, cache_source = cache_folder(environ)
        library = environ.get("TPU_LIBRARY_PATH")
        facts = dataclasses.replace(
            seen,
            machine=attempt("the machine", lambda: machine.look(environ), Machine()),
            compile_cache=attempt("the compile cache", lambda: machine.compile_cache(cache_path, cache_source), None),
            disks=attempt("disks", lambda: _disks(environ, cache_path), ()),
            tpu_library_missing=library is not None and not os.path.isfile(library),
            gpus=gpus.result(),
            probes=tuple(future.result() for future in probes),
        )
    facts = dataclasses.replace(facts, not_found_out=tuple(failures))
    report = Report(
        sgl_jax=__version__,
        verdicts=judge(facts),
        notices=notices(facts),
        facts=dataclasses.replace(facts, environ=privacy.variables(environ)),
    )
    return privacy.without_secrets(report, os.path.expanduser("~"))


def cache_folder(environ: Mapping[str, str]) -> tuple[str, str]:
    """Where the server keeps compiled programs by default, and what decides it. --compilation-cache-dir wins over it."""
    for variable in (f"{ENV_PREFIX}COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR"):
        if chosen := environ.get(variable):
            return os.path.expanduser(chosen), f"by ${variable}"
    by_user = "by $XDG_CACHE_HOME" if os.path.isabs(environ.get("XDG_CACHE_HOME", "")) else "the default"
    return default_compilation_cache_dir(environ), by_user


def _disks(environ: Mapping[str, str], cache_path: str) -> tuple:
    home = environ.get("HF_HOME") or os.path.join(environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    models = os.path.expanduser(environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))
    folders = {"compile cache": cache_path, "model downloads": models}
    return tuple(machine.disk(use, path) for use, path in folders.items() if "://" not in path)


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 when a platform, or the one asked for, is usable, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m sgl_jax.check_env",
        description="What this machine has for serving: versions, devices, limits, and a verdict on TPU, GPU and CPU.",
        epilog="Exit code: 0 when a platform is usable (with --platform, that one), 1 when not.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--platform", choices=PLATFORMS, help="the platform that must be usable (default: any)")
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=probing.TIMEOUT_S,
        metavar="SECONDS",
        help="how long trying a platform out may take (default: %(default)g)",
    )
    options = parser.parse_args(argv)
    if sys.stderr.isatty():
        print(f"trying the platforms out, for {options.timeout:g} s at most ...", file=sys.stderr)
    if options.json:
        report = look(environment(), options.timeout)
        _print(json.dumps({"usable": report.usable, **dataclasses.asdict(report)}, indent=2) + "\n")
    else:
        report = check_env(options.timeout)
    return 0 if (options.platform in report.usable if options.platform else report.usable) else 1


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
