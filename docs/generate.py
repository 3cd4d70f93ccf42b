"""Writes the documentation that is derived from code: `python docs/generate.py`. A test checks that it was run."""

from __future__ import annotations

import ast
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from sgl_jax.models.bundled import bundled
from sgl_jax.models.families import FAMILIES
from sgl_jax.request import PARAMETERS, Api, Parameter
from sgl_jax.settings import foreign_flags
from sgl_jax.settings.flags import Flag
from sgl_jax.settings.not_built import NOT_BUILT, Feature
from sgl_jax.settings.server_args import ENV_PREFIX, FLAGS

INTRODUCTION = f"""# Server arguments

<!-- Written by `python docs/generate.py` from the flags declared in python/sgl_jax/settings: change it there. -->

```
python -m sgl_jax.launch_server --model-path PATH [flags]
```

A flag can be given on the command line (`--page-size 16`), as an environment variable (`{ENV_PREFIX}PAGE_SIZE=16`) or in
a YAML file named by `--config` (`page-size: 16`). The command line wins over the environment, which wins over the file.
A name that is no flag is refused in all three places, and so is a value that cannot be honoured: the server prints one
line with the flag, the limit and a remedy, and exits with code 2. An empty environment variable counts as
unset, and what Kubernetes writes into the environment about a Service called `sgl-jax` is not taken for flags.

A switch needs no value on the command line: `--disable-radix-cache` turns it on, `--no-disable-radix-cache` takes back
what the environment or the file says. In the environment it is `1`, `true`, `yes` or `on`, or their opposites.

A flag with several values takes them behind its name (`--lora-paths a=/x b=/y`), as a list in the file, and in the
environment with spaces between them or as a JSON list.

From Python the same names are keywords: `ServerArgs(model_path="…", page_size=16)`, with the same checks.
"""


def server_arguments() -> str:
    parts = [INTRODUCTION]
    for group, flags in groupby(FLAGS, key=lambda flag: flag.about.group):
        rows = "".join(_row(flag) for flag in flags)
        parts.append(f"## {group}\n\n| flag | values | default | effect |\n|---|---|---|---|\n{rows}")
    return "\n".join(parts)


def _row(flag: Flag) -> str:
    names = ", ".join(f"`{option}`" for option in flag.options)
    default = flag.default_text.removeprefix("default: ")
    about = flag.about
    text = ". ".join((about.help[0].upper() + about.help[1:], *flag.refusals)) + "."
    return f"| {names} | {_values(flag)} | {default} | {text} |\n".replace("$", "\\$")


def _values(flag: Flag) -> str:
    if flag.choices:
        return ", ".join(f"`{choice}`" for choice in flag.choices)
    kind = {int: "whole number", float: "number", str: "text", bool: "switch", tuple: "one or several texts"}[flag.kind]
    return f"{kind}, {flag.about.rule.text}" if flag.about.rule else kind


COMING_FROM = """# Coming from SGLang or vLLM

<!-- Written by `python docs/generate.py` from python/sgl_jax/settings/foreign_flags.py and settings/not_built.py: change it there. -->

Most flags have SGLang's names, and OpenAI's clients need no change. A flag that is not honoured is refused by name, never ignored,
on the command line, in the environment and in a config file; the error says what the tables below say. The same holds for the
parameters of requests ([openai_api.md](openai_api.md), [native_api.md](native_api.md)).

Some names have another meaning here, or another place:

- `vllm serve MODEL` is `sgl-jax serve MODEL`, and `vllm chat --url` is `sgl-jax chat --url`; the port is 30000.
- `--tp-size 4 --dp-size 2` takes eight devices: `--tp-size` counts the devices of one data rank, not all of them
  ([parallelism.md](parallelism.md)).
- `--page-size` is a power of two. `--trust-remote-code` is accepted without effect: no code of a model folder is run.
- A request without `temperature` is sampled at 1: a model's `generation_config.json` gives no defaults ([sampling.md](sampling.md)).
- `--allowed-origins` has names separated by commas, not a JSON list, and allows only pages of this machine by default
  ([http.md](http.md)).
- `/tokenize` takes `prompt` or `messages`, not `text`.
- Paths: `/get_model_info` and `/get_server_info` (not `/model_info`, `/server_info`).

"""


def coming_from(features: Iterable[Feature] = NOT_BUILT) -> str:
    tables = {"Another name": foreign_flags.RENAMED, "Another way": foreign_flags.OTHERWISE}
    parts = []
    for title, table in tables.items():
        rows = (f"| {_names(names)} | {_flags_marked(said)} |\n" for names, said in table.items())
        parts.append(f"## {title}\n\n| flag | here |\n|---|---|\n{''.join(rows)}")
    return COMING_FROM + "\n".join([*parts, not_built_table(features)])


def not_built_table(features: Iterable[Feature]) -> str:
    """Features that are not built, and the flags, request fields and paths that are answered with their names."""
    rows = (
        f"| {feature.name.rpartition(' ')[0].removesuffix(',')} | {_names(feature.flags)} | {_names(feature.fields)} | "
        f"{_names(feature.paths)} |\n"
        for feature in features
    )
    return f"## Not built\n\n| feature | flags | request fields | paths |\n|---|---|---|---|\n{''.join(rows)}"


def _flags_marked(text: str) -> str:
    return re.sub(r"--[\w-]+", r"`\g<0>`", text)


def _names(patterns: str) -> str:
    return ", ".join(f"`{pattern.replace('*', '…')}`" for pattern in patterns.split())


def sampling_table(parameters: Iterable[Parameter] = PARAMETERS) -> str:
    """Make the table of sampling parameters: their names in both APIs, defaults and limits."""
    rows = "".join(
        f"| `{each.name}` | {_api_names(each, 'native')} | {_api_names(each, 'openai')} | {_default(each)} | "
        f"{'; '.join(filter(None, (each.about.help, _limits(each))))} |\n"
        for each in parameters
    )
    return f"| `SamplingParams` | native API | OpenAI's | default | meaning and limits |\n|---|---|---|---|---|\n{rows}"


def _api_names(parameter: Parameter, api: Api) -> str:
    return ", ".join("same" if name == parameter.name else f"`{name}`" for name in parameter.names(api)) or "–"


def _default(parameter: Parameter) -> str:
    return "" if parameter.default is None or parameter.default in ((), {}) else f"{parameter.default}".lower()


def _limits(parameter: Parameter) -> str:
    about = parameter.about
    numbers = (
        "" if about.low is None else f"above {about.low:g}, up to {about.high:g}" if about.above else parameter.limit
    )
    numbers = numbers.removeprefix("be ").replace("fit 64 bits", "64 bits")
    return ", ".join(filter(None, (about.entries and f"{about.entries} entries at most", numbers)))


BEGIN, END = "<!-- Written by `python docs/generate.py` from request.py: change it there. -->\n\n", "\n<!-- End. -->"


def sampling() -> str:
    """Return the page about sampling, with its table made from the code."""
    text = (REPOSITORY / "docs" / "features" / "sampling.md").read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + sampling_table() + END + rest.partition(END)[2]


REPOSITORY = Path(__file__).resolve().parents[1]

SUPPORT = """# Support matrix

<!-- Written by `python docs/generate.py` from the marks `supports` in tests/: change them there. -->

Properties of each family that tests show. "float32 on a CPU" and "layers scanned": tokens and logprobs equal those of an
independent reference, at page sizes 1 and 16, with prompts whole and in chunks, alone and together. `not yet`: no test shows
it, which does not mean that it fails. In bfloat16 every family is served, and none is compared with a reference. Nothing
here has run on a real TPU.

"""


def support_matrix() -> str:
    """Make the table of what tests show of each family, from the tests' source alone."""
    cells: dict[tuple[str, str], list[str]] = defaultdict(list)
    files: dict[str, set[str]] = defaultdict(set)
    folders = _constants(REPOSITORY / "tests" / "e2e" / "test_families_exact.py")["FAMILIES"]
    for file in sorted((REPOSITORY / "tests").rglob("test_*.py")):
        for what, rows in _marks(file):
            files[what].add(file.relative_to(REPOSITORY).as_posix())
            for name, details in _rows(rows):
                family = folders.get(name) or json.loads(bundled().get(name, "{}")).get("architectures", [name])[0]
                cells[family, what] += details
    columns = sorted(files, key=lambda what: -sum(key[1] == what for key in cells))
    lines = [f"| architecture | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for family in FAMILIES:
        shown = (", ".join(dict.fromkeys(cells.get((family, what), ["not yet"]))) for what in columns)
        lines.append(f"| `{family}` | {' | '.join(shown)} |")
    legend = [f"- {what}: {', '.join(f'`{name}`' for name in sorted(files[what]))}" for what in columns]
    return SUPPORT + "\n".join([*lines, "", "Shown by", "", *legend]) + "\n"


def _marks(file: Path) -> Iterator[tuple[str, Any]]:
    """Read the arguments of each `@pytest.mark.supports` of a file; names stand for the file's constants."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        for mark in getattr(node, "decorator_list", ()):
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.supports":
                what, rows = mark.args
                named = isinstance(rows, ast.Name)
                yield ast.literal_eval(what), _constants(file)[rows.id] if named else ast.literal_eval(rows)


def _constants(file: Path) -> dict[str, Any]:
    """Values of a module's upper-case names: plain values, and dicts of which only the keys are plain."""
    found: dict[str, Any] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = _value(node.value)
    return found


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        merged: dict[Any, Any] = {}
        for key, value in pairs:
            merged |= _value(value) if key is None else {ast.literal_eval(key): _value(value)}
        return merged
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _rows(rows: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield families, each with its cell: a dict's list, or the values that follow the name in a tuple."""
    for row in rows:
        if isinstance(row, tuple):
            yield row[0], [" ".join(map(str, row[1:3]))]
        else:
            said = rows[row] if isinstance(rows, dict) else None
            yield row, said if isinstance(said, list) else ["✓"]


if __name__ == "__main__":
    pages = {
        "server_arguments.md": server_arguments(),
        "support_matrix.md": support_matrix(),
        "features/coming_from.md": coming_from(),
        "features/sampling.md": sampling(),
    }
    for name, text in pages.items():
        (REPOSITORY / "docs" / name).write_text(text, encoding="utf-8")
        print(f"wrote docs/{name}")
    from recipe_pages import write

    write()
