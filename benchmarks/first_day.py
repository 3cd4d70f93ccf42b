"""Everything that a machine with a new device can tell, in one command and one JSON: what it is, whether its numbers are right,
and how long steps and batches take beside their least times.

    python benchmarks/first_day.py --device tpu --tp-size 4 --out first_day.json

Every flag of the server is taken. Without --model-path a bundled model that fits is run with random weights. Each part has a
process of its own and a share of the minutes; one that fails is recorded, and the others still run. docs/features/tpu.md
says what is in the JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from provenance import commit, machine

from sgl_jax.settings.flag_parser import Parser
from sgl_jax.settings.server_args import BY_NAME
from sgl_jax.tools.benchmark.arguments import alone_arguments
from sgl_jax.tools.benchmark.door import exit_code
from sgl_jax.tools.benchmark.figures import markdown_table
from sgl_jax.tools.benchmark.terminal import SOME_FAILED, check_writable, say
from sgl_jax.tools.environment.check_command import public
from sgl_jax.tools.environment.packages import collect

TOOL = "first_day"
PARTS_SCRIPT = Path(__file__).with_name("first_day_parts.py")
# Shares of the time; what a part leaves is for those behind it.
WEIGHTS = {"environment": 2, "selftest": 5, "reference": 2, "exactness": 2, "steps": 6, "one_batch": 3}
LEAST_S = 5.0  # no process of jax has done anything before
LOG_LINES = 40  # kept, the last ones, where a part failed
COLUMNS = {
    "what": "{what}",
    "predicted ms": "{predicted_ms:.3f}",
    "measured ms": "{measured_ms:.3f}",
    "share": "{share:.1%}",
}
FAILED, NOT_RUN, PASSED = "failed", "not run", "passed"


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Parse a command line into our flags, the server's, and the secrets among their values. Raises FlagError or BenchmarkError
    for what cannot be honoured."""
    also = "Every flag of the server is taken as well (python -m sgl_jax.launch_server --help)."
    parser = Parser(prog="python benchmarks/first_day.py", description=__doc__, epilog=also, allow_abbrev=False)
    about = "as for the server (default: a bundled model that fits, with random weights)"
    parser.add_argument("--model-path", "--model", default="", metavar="PATH", help=about)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON, written again after each part")
    parser.add_argument("--minutes", type=minutes, default=10.0, metavar="X", help="for all parts together (10)")
    parser.add_argument("--parts", nargs="+", choices=WEIGHTS, default=[*WEIGHTS], help="instead of all of them")
    args, flags = parser.parse_known_args(argv)
    check_writable(args.out, "--out")
    server = alone_arguments([*flags, "--model-path", args.model_path or "none"])  # refused now, and not by each part
    values = [getattr(server, name) for name, flag in BY_NAME.items() if flag.about.secret]
    return args, flags, [value for value in values if value]


def minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of minutes above 0")
    return value


def run_part(name: str, folder: Path, limit_s: float, model: str, flags: Sequence[str]) -> dict[str, Any]:
    """Run a part for `limit_s` at most, and return its record: how it ended, and what it had found by then."""
    if limit_s < LEAST_S:
        return {"status": NOT_RUN, "error": "no time left"}
    command = [sys.executable, str(PARTS_SCRIPT), name, str(folder), str(limit_s), model, *flags]
    started, log, error = time.monotonic(), folder / f"{name}.log", None
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code, error = None, f"not done in {limit_s:.0f} s"
        finally:
            with contextlib.suppress(OSError):  # all that it started ends with it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = findings(folder, name)
    said = found.pop("error", None)
    record = {"seconds": round(time.monotonic() - started, 1), "limit_seconds": round(limit_s, 1), "found": found}
    if code == 0:
        return {"status": PASSED} | record
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LOG_LINES:]
    error = error or said or f"ended with exit code {code}: {' '.join(last[-1:])}"
    return {"status": FAILED, "error": error} | record | {"log": last}


def findings(folder: Path, name: str) -> dict[str, Any]:
    """Read what a part has written, and lines of JSON of a tool that it ran."""
    file, lines = folder / f"{name}.json", folder / f"{name}.jsonl"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if lines.exists():
        found["lines"] = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    return found


def table_of(parts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each figure that has a prediction: the least time over the measured one is the share of the device."""
    rows = []
    for step in parts.get("steps", {}).get("found", {}).get("steps", []):
        rows.append(row(f"step {step['program']}", step["median_seconds"], step.get("share")))
    for line in parts.get("one_batch", {}).get("found", {}).get("lines", []):
        case = f"batch {line['batch_size']} x {line['input_len']}"
        rows.append(row(f"{case}, prefill", line["prefill_latency"], line.get("prefill_matmul_share")))
        rows.append(row(f"{case}, decode", line["median_decode_latency"], line.get("decode_bandwidth_share")))
    return rows


def row(what: str, seconds: float | None, share: float | None) -> dict[str, Any]:
    measured = None if seconds is None else 1e3 * seconds
    predicted = None if measured is None or share is None else measured * share
    return {"what": what, "predicted_ms": predicted, "measured_ms": measured, "share": share}


def run(args: argparse.Namespace, flags: Sequence[str], secrets: Sequence[str], words: Sequence[str]) -> int:
    """Run the parts and write the JSON, without secrets, after each; `words` are the command line. Returns the exit code: 0 when
    all of them passed, else 1."""
    started, parts = time.monotonic(), {}
    result: dict[str, Any] = {
        "what": "first day of a device: numbers against references, least times beside measured ones",
        "command": " ".join(["python", "benchmarks/first_day.py", *words]),
        "commit": commit(),
        "machine": machine(),
        "versions": {each.name: each.version for each in collect()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "parts": parts,
    }
    with tempfile.TemporaryDirectory() as folder:
        for at, name in enumerate(args.parts):
            left = 60 * args.minutes - (time.monotonic() - started)
            share = WEIGHTS[name] / sum(WEIGHTS[each] for each in args.parts[at:])
            record = parts[name] = run_part(name, Path(folder), left * share, args.model_path, flags)
            error = f": {record['error']}" if "error" in record else ""
            say(TOOL, f"{name:12} {record['status']:8} {record.get('seconds', 0.0):6.1f} s{error}")
            result |= {"seconds": round(time.monotonic() - started, 1), "table": table_of(parts)}
            text = public(json.dumps(result, indent=1, allow_nan=False), os.path.expanduser("~"))
            for secret in secrets:
                text = text.replace(json.dumps(secret)[1:-1], "(hidden)")
            args.out.write_text(f"{text}\n", encoding="utf-8")
    if result["table"]:
        print(markdown_table(COLUMNS, result["table"]), flush=True)
    say(TOOL, f"wrote {args.out.resolve()}; please add it to an issue, whatever it says")
    return 0 if all(each["status"] == PASSED for each in parts.values()) else SOME_FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, 1 when a part failed or was not run, 2 for a mistake in the use, 130 when interrupted."""
    return exit_code(TOOL, lambda: run(*parse(argv), sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
