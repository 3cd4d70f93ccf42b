"""Show where a profile's time went, by the engine's own stages, from the .xplane.pb that /stop_profile names.

    python benchmarks/profile_stages.py /tmp/traces

The profiler records an operation of the device by its name in the compiled program, and the program beside it; there
each operation has the path of scopes it was written in (`op_name`), and a stage is one of them. On CPUs no viewer makes
that connection.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Sequence, Set
from pathlib import Path
from typing import NamedTuple

from jax.profiler import ProfileData

from sgl_jax.settings.flag_parser import Parser
from sgl_jax.text.protobuf import read_message
from sgl_jax.tools.benchmark.door import exit_code
from sgl_jax.tools.benchmark.figures import covered

HOST_STAGES = ("plan", "dispatch", "collect", "process")
DEVICE_STAGES = ("unpack", "embed", "attention", "mlp", "logits", "sample", "store", "draft", "prompt_logprobs")
OTHER = "other"  # the device works, on nothing that belongs to a stage

Interval = tuple[float, float]  # start and end, ns


class StageTime(NamedTuple):
    stage: str
    count: int  # times it ran; of a device stage, operations
    milliseconds: float  # in which it ran, alone or beside others


class Profile(NamedTuple):
    host: dict[str, list[Interval]]  # by stage
    device: dict[str, list[Interval]]  # by stage, OTHER included; operations may contain each other

    def host_times(self) -> list[StageTime]:
        return [StageTime(stage, len(spans), milliseconds(spans)) for stage, spans in self.host.items()]

    def device_times(self) -> list[StageTime]:
        """Return the stages in the order of a step. OTHER is the time outside of all stages."""
        named = {stage: spans for stage, spans in self.device.items() if stage != OTHER and spans}
        found = [StageTime(stage, len(spans), milliseconds(spans)) for stage, spans in named.items()]
        rest = milliseconds(*self.device.values()) - milliseconds(*named.values())
        return [*found, StageTime(OTHER, len(self.device[OTHER]), rest)]


def milliseconds(*spans: Sequence[Interval]) -> float:
    """Return the time in which at least one of these intervals runs."""
    return covered(itertools.chain(*spans)) / 1e6


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of a profile. Returns the exit code: 0, 1 for a file that is no profile, 2 for a mistake in the use."""
    return exit_code("profile_stages", lambda: show(argv))


def show(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python benchmarks/profile_stages.py", description="Where a profile's time went.")
    parser.add_argument("profile", type=Path, help="an .xplane.pb file, or a folder: its newest one")
    given = parser.read(argv).profile
    try:
        path = find_profile(given)
        profile = read_profile(path)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{path}: {len(profile.host['collect'])} steps collected\n\n{table(profile)}")
    return 0


def find_profile(path: Path) -> Path:
    """Return the file itself, or the newest below a folder. Raises FileNotFoundError."""
    if path.is_file():
        return path
    found = sorted(path.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{path}: no .xplane.pb file there; /stop_profile answers where it wrote them")
    return found[-1]


def read_profile(path: Path) -> Profile:
    """Read a profile. Raises ValueError if the file is no profile."""
    data = path.read_bytes()
    try:
        planes = list(ProfileData.from_serialized_xspace(data).planes)
        programs = _programs(data)
    except (ValueError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path} is not a profile: {error}") from error
    profile = Profile({stage: [] for stage in HOST_STAGES}, {stage: [] for stage in (*DEVICE_STAGES, OTHER)})
    operations: dict[str, list[tuple[str, Interval]]] = {}  # name and time, by program
    for event in (event for plane in planes for line in plane.lines for event in line.events):
        span = (event.start_ns, event.start_ns + event.duration_ns)
        if event.name in HOST_STAGES:
            profile.host[event.name].append(span)
        elif (operation := _operation(event)) is not None:
            program, name = operation
            operations.setdefault(program, []).append((name, span))
    for program, ran in operations.items():
        scopes = _scopes(programs.get(program, []), {name for name, _ in ran})
        for name, span in ran:
            profile.device[stage_of(scopes.get(name, ""))].append(span)
    return profile


def stage_of(scope: str) -> str:
    """Return the stage of an operation's path: "jit(step)/attention/dot_general" is of attention."""
    return next((part for part in scope.split("/") if part in DEVICE_STAGES), OTHER)


def table(profile: Profile) -> str:
    """Format host stages per step, device stages with their share of the device's time."""
    steps = max(1, len(profile.host["collect"]))
    lines = [f"{'':<24}{'count':>9}{'ms':>10}{'ms a step':>12}{'share':>9}", "host"]
    for stage, count, time in profile.host_times():
        lines.append(f"  {stage:<22}{count:>9}{time:>10.1f}{time / steps:>12.3f}")
    busy = milliseconds(*profile.device.values())
    lines.append(f"{'device':<33}{busy:>10.1f}{busy / steps:>12.3f}")
    for stage, count, time in profile.device_times():
        lines.append(f"  {stage:<22}{count:>9}{time:>10.1f}{time / steps:>12.3f}{time / (busy or 1):>9.1%}")
    return "\n".join(lines)


def _operation(event) -> tuple[str, str] | None:
    """Return the program's name and the operation's name in it; None if the event is of something else.

    Ids of programs do not serve: a program that was read from the compile cache reports the id of the process that compiled
    it. The engine's programs have names of their own.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about how the profiler's own type was built
        stats = dict(event.stats)
    return (stats["hlo_module"], stats["hlo_op"]) if "hlo_op" in stats and "hlo_module" in stats else None


# --- Programs, which ProfileData leaves out. Field numbers: xplane.proto and hlo.proto in openxla/xla. ------------------


def _programs(space: bytes) -> dict[str, list[bytes]]:
    """Return the HloModuleProtos by name, from the plane that holds them: each an event's metadata named "module(id)".

    All programs that the process holds are there. Those of two engines can have one name.
    """
    found: dict[str, list[bytes]] = {}
    for plane in _messages(space, 1):
        if _text(plane, 2) != "/host:metadata":
            continue
        for entry in _messages(plane, 4):
            metadata = _messages(entry, 2)[0]
            hlo = [value for stat in _messages(metadata, 5) for value in _messages(stat, 6)]
            name = _text(metadata, 2).rpartition("(")[0]
            if hlo and name:
                found.setdefault(name, []).append(_messages(hlo[0], 1)[0])
    return found


def _scopes(modules: Sequence[bytes], ran: Set[str]) -> dict[str, str]:
    """Return op_name by instruction, of the module that has most of the instructions that ran and least of others."""
    return max(map(_op_names, modules), key=lambda names: (len(names.keys() & ran), -len(names)), default={})


def _op_names(module: bytes) -> dict[str, str]:
    """Return op_name by instruction."""
    found = {}
    for computation in _messages(module, 3):
        for instruction in _messages(computation, 2):
            for metadata in _messages(instruction, 7)[:1]:
                found[_text(instruction, 1)] = _text(metadata, 2)
    return found


def _text(message: bytes, number: int) -> str:
    return b"".join(_messages(message, number)[:1]).decode()


def _messages(message: bytes, number: int) -> list[bytes]:
    """Return the length-delimited fields with this number."""
    return [value for value in read_message(message).get(number, []) if isinstance(value, bytes)]


if __name__ == "__main__":
    raise SystemExit(main())
