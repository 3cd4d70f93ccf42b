"""`python -m sgl_jax VERB …` and `sgl-jax VERB …`: the module that a verb stands for reads the rest of the command line."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

BAD_USE, INTERRUPTED = 2, 130  # exit codes


class Verb(NamedTuple):
    module: str  # has `main(argv, prog)`; imported when its verb is typed
    about: str
    flags: tuple[str, ...] = ()  # put before those that are typed


VERBS = {
    "serve": Verb("launch_server", "serve a model over HTTP: serve MODEL [flags]"),
    "chat": Verb("tools.chat.chat_command", "chat in this terminal, with a server or a model of your own"),
    "run-batch": Verb("run_batch", "answer a file of requests"),
    "bench serving": Verb("bench_serving", "a load on a server, measured"),
    "bench one-batch": Verb("bench_one_batch", "single batches in the engine"),
    "bench one-batch-server": Verb("bench_one_batch_server", "single batches through a server"),
    "bench offline": Verb("bench_offline_throughput", "a data set through an engine"),
    "plan": Verb("compile", "whether a launch fits accelerators that need not be here, and its costs", ("--plan",)),
    "env": Verb("check_env", "what this machine has for serving, and whether it can be used"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the verb says, or list the verbs. Flags without a verb are those of `serve`. Returns the exit code."""
    argv = [*(sys.argv[1:] if argv is None else argv)]
    name = os.path.basename(sys.argv[0])
    program = "python -m sgl_jax" if name == "__main__.py" else name
    typed = " ".join(argv[:2]) if argv[:1] == ["bench"] else argv[0] if argv else "--help"
    if typed in ("-h", "--help", "bench", "bench -h", "bench --help"):
        print(_listed(program, "bench " if argv[:1] == ["bench"] else ""))
        return 0
    if typed.startswith("-"):
        typed, rest = "serve", argv
    else:
        rest = argv[len(typed.split()) :]
    if typed not in VERBS:
        return _refuse(_unknown(program, typed))
    if typed == "serve" and rest and not rest[0].startswith("-"):
        if any(each.partition("=")[0] in ("--model-path", "--model") for each in rest[1:]):
            return _refuse(f"the model is given twice, as {rest[0]} and by a flag; leave one out")
        rest = ["--model-path", *rest]
    verb = VERBS[typed]
    try:
        return importlib.import_module(f"sgl_jax.{verb.module}").main([*verb.flags, *rest], f"{program} {typed}")
    except KeyboardInterrupt:  # while modules are imported; the tools handle it later
        return INTERRUPTED


def _listed(program: str, prefix: str) -> str:
    verbs = {name: verb.about for name, verb in VERBS.items() if name.startswith(prefix)}
    width = max(map(len, verbs))
    lines = [f"usage: {program} {prefix}VERB [flags]", ""]
    lines += [f"  {name:<{width}}  {about}" for name, about in verbs.items()]
    return "\n".join(
        [*lines, "", f"The flags of a verb: {program} {prefix}VERB --help. The version: {program} --version"]
    )


def _unknown(program: str, typed: str) -> str:
    from sgl_jax.settings.flag_parser import NOTHING, hint_about

    names = {verb.module: name for name, verb in VERBS.items()} | {name: name for name in VERBS}
    hint = hint_about(typed, names, NOTHING)
    return f"{typed!r} is not a verb{hint or f'; {program} --help lists them'}"


def _refuse(message: str) -> int:
    print(f"sgl_jax: error: {message}", file=sys.stderr)
    return BAD_USE


if __name__ == "__main__":
    sys.exit(main())
