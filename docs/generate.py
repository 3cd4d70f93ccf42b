"""Writes the documentation that is derived from code: `python docs/generate.py`. A test checks that it was run."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from sgl_jax.flags import Flag
from sgl_jax.server_args import ENV_PREFIX, FLAGS

INTRODUCTION = f"""# Server arguments

<!-- Written by `python docs/generate.py` from python/sgl_jax/server_args.py: change it there. -->

```
python -m sgl_jax.launch_server --model-path PATH [flags]
```

A flag can be given on the command line (`--page-size 16`), as an environment variable (`{ENV_PREFIX}PAGE_SIZE=16`) or in
a YAML file named by `--config` (`page-size: 16`). The command line wins over the environment, which wins over the file.
A name that is no flag is refused in all three places, and so is a value that cannot be honoured: the server prints one
line that says which, what the limit is and what to do, and exits with code 2. An empty environment variable counts as
unset, and what Kubernetes writes into the environment about a Service called `sgl-jax` is not taken for flags.

A switch needs no value on the command line: `--disable-radix-cache` turns it on, `--no-disable-radix-cache` takes back
what the environment or the file says. In the environment it is `1`, `true`, `yes` or `on`, or their opposites.

From Python the same names are keywords: `ServerArgs(model_path="…", page_size=16)`, with the same checks.
"""


def server_arguments() -> str:
    parts = [INTRODUCTION]
    for group, flags in groupby(FLAGS, key=lambda flag: flag.about.group):
        rows = "".join(_row(flag) for flag in flags)
        parts.append(f"## {group}\n\n| flag | values | default | what it does |\n|---|---|---|---|\n{rows}")
    return "\n".join(parts)


def _row(flag: Flag) -> str:
    names = ", ".join(f"`{option}`" for option in flag.options)
    default = flag.default_text.removeprefix("default: ")
    about = flag.about
    text = about.help[0].upper() + about.help[1:] + "."
    if about.not_built:
        text += f" Refused for now: {about.not_built} is not built yet."
    for value, reason in about.refused.items():
        text += f" `{value}` is refused: {reason}."
    return f"| {names} | {_values(flag)} | {default} | {text} |\n".replace("$", "\\$")


def _values(flag: Flag) -> str:
    if flag.choices:
        return ", ".join(f"`{choice}`" for choice in flag.choices)
    kind = {int: "whole number", float: "number", str: "text", bool: "switch"}[flag.kind]
    return f"{kind}, {flag.about.rule.text}" if flag.about.rule else kind


if __name__ == "__main__":
    Path(__file__).with_name("server_arguments.md").write_text(server_arguments(), encoding="utf-8")
    print("wrote docs/server_arguments.md")
