"""Usable or not, and if not why and what to do: a verdict per platform from the facts; and what else should be known.

A platform that passed its probe is usable, whatever else is said of it. Otherwise the first reason that applies is
given, from the hardware upwards: present, free, allowed, its package installed, its driver new enough, its own words.
Pure functions.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from sgl_jax.observability.log import size
from sgl_jax.tools.environment.facts import IMPORTING, PLATFORMS, Device, Facts, Package, Platform, Probe, Verdict
from sgl_jax.tools.environment.packages import OURS

# The oldest driver on Linux for each major version of CUDA, newest first: CUDA's release notes, minor-version compatibility.
DRIVERS = {13: 580, 12: 525}
ENOUGH_FILES = 4096
ENOUGH_DISK = 2 << 30

_LONGEST = 500  # characters of an error; all of it stands under "What was tried"

_CONTAINER = {
    "tpu": "in a container, pass the chips through:\ndocker run --privileged --net=host ...",
    "gpu": "in a container, pass the GPUs through:\ndocker run --gpus all ...",
}
_AS_ROOT = "this user may not open the device files: run as root or as a member of their group"
# Patterns of what jax says, and what then helps.
_MESSAGES = (
    ("ot permitted|ermission denied|PERMISSION_DENIED", _AS_ROOT),
    ("mlock|annot allocate memory|MAP_DMA", "let the runtime lock memory:\nulimit -l unlimited"),
    ("IPv6 loopback", "the TPU runtime needs ::1: turn IPv6 on; in a container, use --net=host"),
    ("lockfile", "if no other process uses the TPU, remove what one left:\nsudo rm /tmp/libtpu_lockfile"),
    ("OUT_OF_MEMORY|RESOURCE_EXHAUSTED|out of memory", "its memory is taken; see by whom:\nnvidia-smi"),
    ("no kernel image", "the GPU is older or newer than those jax was built for"),
    ("SIGILL|AVX", "this CPU lacks instructions that jaxlib is built with: use another machine"),
    ("SIGKILL", "most often for lack of memory: free some, or raise the container's limit"),
)
_WHO_HAS_THE_TPU = (
    "see who has it (another user's process shows only to root):\nsudo lsof -w /dev/accel* /dev/vfio/*",
    "wait until it has ended, or stop it",
)
_TIMEOUT = "give it longer: --timeout 300"
_REPORT = "if the message does not help, report it together with this text"
_UNSET = "let jax choose:\nunset JAX_PLATFORMS"

type Problem = tuple[str, list[str]]


def judge(facts: Facts) -> tuple[Verdict, ...]:
    """One verdict per platform, in the order in which the program prefers them."""
    problems = {"tpu": _tpu_problem, "gpu": _gpu_problem, "cpu": _cpu_problem}
    verdicts: dict[str, Verdict] = {}
    for platform in PLATFORMS:
        if facts.probe(platform).outcome == "ok":
            verdicts[platform] = Verdict(platform, True, _what_works(platform, facts))
        else:
            reason, advice = problems[platform](facts)
            verdicts[platform] = Verdict(platform, False, reason, tuple(advice))
    return tuple(_under_jax_platforms(verdict, verdicts, facts) for verdict in verdicts.values())


def _what_works(platform: Platform, facts: Facts) -> str:
    if platform != "cpu":
        return describe(facts.probe(platform).devices)
    machine = facts.machine
    cpus = f"{machine.cpus} CPUs" if machine.cpus else ""
    parts = [machine.cpu_model, cpus, size(machine.memory) if machine.memory else ""]
    return ", ".join(part for part in parts if part)


def _under_jax_platforms(verdict: Verdict, verdicts: dict[str, Verdict], facts: Facts) -> Verdict:
    """jax uses nothing that JAX_PLATFORMS does not name, and nothing at all if one of those named fails."""
    value = facts.environ.get("JAX_PLATFORMS", "")
    named = [name.strip() for name in value.split(",") if name.strip()]
    if not named or not verdict.usable:
        return verdict
    why = f"JAX_PLATFORMS={value} keeps jax from it"
    if any({"cuda": "gpu", "rocm": "gpu"}.get(name, name) == verdict.platform for name in named):
        refused = [reason for name in named if (reason := _refused(name, verdicts, facts))]
        if not refused:
            return verdict
        why = f"jax fails with JAX_PLATFORMS={value}: {refused[0]}"
    return replace(verdict, usable=False, summary=f"works ({verdict.summary}), but {why}", advice=(_UNSET,))


def _refused(name: str, verdicts: dict[str, Verdict], facts: Facts) -> str:
    """Why jax fails when JAX_PLATFORMS names this; empty: it does not."""
    if name == "gpu":  # read as cuda and rocm, both of which must work
        return f"it takes gpu for CUDA and ROCm at once; write {facts.gpu_name}"
    if name == "cuda" and not facts.gpus.nvidia:
        return ""  # passed over
    if name not in ("tpu", "cuda", "rocm", "cpu"):
        return f"it knows no platform {name}"
    works = verdicts[name].usable if name in verdicts else name == facts.gpu_name and verdicts["gpu"].usable
    return "" if works else f"{name} does not work"


def _tpu_problem(facts: Facts) -> Problem:
    tpus, probe, libtpu = facts.tpus, facts.probe("tpu"), facts.version("libtpu")
    if not tpus.visible:
        package = f"libtpu {libtpu} is installed, but " if libtpu else ""
        return f"{package}no TPU chip is visible: no /dev/accel*, none on the PCI bus", [_if_absent("tpu", facts)]
    chips = f"{kinds(tpus.chips)} on the PCI bus" if tpus.chips else f"TPUs ({', '.join(tpus.nodes)})"
    if not (libtpu or "TPU_LIBRARY_PATH" in facts.environ):
        return f"{chips}, but libtpu is not installed", [f"install it with jax:\n{install('tpu', facts)}"]
    # libtpu says which process has it, where it can
    if match := re.search(r"already in use(?: by process with pid (\d+))?|resource busy", probe.message):
        who = f"process {match[1]}" if match[1] else "another process"
        return f"{chips}, but in use by {who}, and a TPU serves one at a time", list(_WHO_HAS_THE_TPU)
    if not tpus.nodes:
        return f"{chips}, but there is no /dev/accel* and no /dev/vfio/*", [_CONTAINER["tpu"]]
    advice = []
    if probe.outcome == "timeout":
        advice = ["a slice of several hosts starts only when all of them do: run this on all at the same time"]
    return f"{chips}, but {_failure(probe)}", [*advice, *_what_helps(facts, install("tpu", facts), probe)]


def _gpu_problem(facts: Facts) -> Problem:
    gpus, probe, plugin = facts.gpus, facts.probe("gpu"), facts.gpu_plugin
    if not gpus.visible:
        package = f"{plugin} {facts.version(plugin)} is installed, but " if plugin else ""
        reason = f"{package}no GPU is visible: no /dev/nvidia*, no /dev/kfd, none on the PCI bus"
        return reason, [_if_absent("gpu", facts)]
    seen = kinds(gpus.names) or (
        f"{gpus.on_pci} x NVIDIA GPU on the PCI bus" if gpus.on_pci else f"GPUs ({', '.join(gpus.nodes)})"
    )
    if gpus.nvidia and not (gpus.names or gpus.driver or gpus.nodes):
        newest = max(DRIVERS.values())
        return f"{seen}, but no driver is loaded", [f"install NVIDIA's, {newest} or newer", _CONTAINER["gpu"]]
    if problem := _driver_too_old(facts):
        return problem
    command = install(gpu_extra(facts), facts)
    if not plugin:
        return f"{seen}, but jax has no plugin for it", [f"install it:\n{command}"]
    if facts.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return f"{seen}, but CUDA_VISIBLE_DEVICES hides it", ["undo it:\nunset CUDA_VISIBLE_DEVICES"]
    if gpus.nvidia and gpus.nvidia_smi not in ("ok", "not found"):
        return f"{seen}, but nvidia-smi: {gpus.nvidia_smi}", ["reload or reinstall the driver, or restart the machine"]
    return f"{seen}, but {_failure(probe)}", _what_helps(facts, command, probe)


def _driver_too_old(facts: Facts) -> Problem | None:
    """For the plugin that is installed, or without one for all of them."""
    driver, match = _driver_major(facts), re.search(r"cuda(\d+)", facts.gpu_plugin)
    oldest = DRIVERS.get(int(match[1]), 0) if match else min(DRIVERS.values())
    if driver is None or driver >= oldest:
        return None
    advice = [f"update the driver to {max(DRIVERS.values())} or newer"]
    if others := [cuda for cuda, least in DRIVERS.items() if driver >= least]:
        advice.append(f"or install jax for the driver that is there:\n{install(f'cuda{others[0]}', facts)}")
    return f"NVIDIA's driver is {facts.gpus.driver}; {facts.gpu_plugin or 'jax'} needs {oldest} or newer", advice


def _driver_major(facts: Facts) -> int | None:
    match = re.match(r"\d+", facts.gpus.driver or "")
    return int(match[0]) if match else None


def gpu_extra(facts: Facts) -> str:
    """The extra of jax that serves this GPU: the plugin's that is installed, else the newest the driver is good for."""
    if match := re.search(r"cuda\d+", facts.gpu_plugin):
        return match[0]
    if facts.gpu_name == "rocm" or not facts.gpus.nvidia:
        return "rocm7-local"
    driver = _driver_major(facts)
    return next(f"cuda{cuda}" for cuda, oldest in DRIVERS.items() if driver is None or driver >= oldest)


def _cpu_problem(facts: Facts) -> Problem:
    return _failure(facts.probe("cpu")), _what_helps(facts, install("", facts), facts.probe("cpu"))


def install(extra: str, facts: Facts) -> str:
    """The command that installs jax with an accelerator's packages, in the version that is there."""
    version = facts.version("jax")
    needs = next((each.needs for each in facts.packages if each.name == "jax"), "")
    wanted = f"jax[{extra}]" if extra else "jax"
    return f'uv pip install "{wanted}{f"=={version}" if version else needs}"'


def _if_absent(platform: Platform, facts: Facts) -> str:
    return _CONTAINER[platform] if facts.machine.container else "nothing to do, unless this machine should have one"


def _failure(probe: Probe) -> str:
    said = textwrap.shorten(probe.words, _LONGEST, placeholder=" ...")
    if probe.outcome == "not started":
        return f"it was not tried: {probe.message}"
    if probe.outcome == "timeout":
        return f"jax gave {probe.message} while {probe.stage}"
    if probe.outcome == "failed" and probe.stage == IMPORTING:
        return f"jax cannot be imported: {said}"
    return f"jax fails while {probe.stage}: {said}"


def _what_helps(facts: Facts, command: str, probe: Probe) -> list[str]:
    """`command` installs jax for the platform."""
    found = [advice for pattern, advice in _MESSAGES if re.search(pattern, probe.words)]
    for name in dict.fromkeys(re.findall(r"Unable to load (\w+)", probe.words)):
        found.append(f"{name} cannot be loaded: install it with jax:\n{command}")
    if probe.outcome == "timeout":
        found.append(_TIMEOUT)
    if probe.outcome == "failed" and probe.stage == IMPORTING:
        found.append(f"{'reinstall' if facts.version('jax') else 'install'} jax:\n{command}")
    if wrong := [each for each in facts.packages if not each.fits and each.needed_by.startswith("jax")]:
        text = "; ".join(f"{each.name} is {each.version}, {each.needed_by} needs {each.needs}" for each in wrong)
        found.append(f"versions that do not fit together: {text}:\n{command}")
    return found or [_REPORT]


# --- what does not stop the program ---------------------------------------------------------------------------------


def notices(facts: Facts) -> tuple[str, ...]:
    return (
        *_about_packages(facts),
        *_about_the_machine(facts),
        *(f"could not look at {text}" for text in facts.not_found_out),
    )


def _about_packages(facts: Facts) -> Iterator[str]:
    if not any(each.needed_by == OURS for each in facts.packages):
        yield "sgl_jax is not installed, or not with its packages; in the repository:\nuv pip install -e python"
    if missing := [each for each in facts.packages if each.version is None and each.needed_by and not each.optional]:
        ours = [each for each in missing if each.needed_by == OURS]  # jax brings jaxlib itself
        yield f"not installed: {', '.join(each.name for each in missing)}\n{_install(ours or missing)}"
    for each in (each for each in facts.packages if not each.fits):
        extra = "tpu" if facts.version("libtpu") else gpu_extra(facts) if facts.gpu_plugin else ""
        # jax pins what belongs to it: installing it with its extra brings the right versions
        command = _install([each]) if each.needed_by.startswith(OURS) else install(extra, facts)
        yield f"{each.name} is {each.version}; {each.needed_by} needs {each.needs}\n{command}"


def _install(packages: list[Package]) -> str:
    return "uv pip install " + " ".join(f'"{each.name}{each.needs}"' for each in packages)


def _about_the_machine(facts: Facts) -> Iterator[str]:
    cache, machine = facts.compile_cache, facts.machine
    if cache is not None and cache.problem:
        yield (
            f"the compile cache {cache.path} cannot be written ({cache.problem}): every start compiles everything; "
            "choose another\nexport JAX_COMPILATION_CACHE_DIR=..."
        )
    if cache is not None and cache.free is not None and cache.free < ENOUGH_DISK:
        yield f"only {size(cache.free)} free for the compile cache ({cache.path})"
    soft, hard = machine.limits.get("open files", (None, None))
    if soft is not None and soft < ENOUGH_FILES:
        most = min(hard or 65536, 65536)
        raised = f"\nulimit -n {most}" if most > soft else ""
        yield f"at most {soft} open files; each client connection takes one{raised}"
    if machine.cpus and machine.cgroup_cpus and machine.cgroup_cpus < machine.cpus:
        yield f"the container may use {machine.cgroup_cpus:g} CPUs and sees {machine.cpus}: more threads than CPUs"


# --- devices and numbers in words -----------------------------------------------------------------------------------


def describe(devices: tuple[Device, ...]) -> str:
    """`4 x TPU v5 lite, 16.0 GiB each, 2x2x1 chips`, and what there is of hosts and slices."""
    parts = [kinds(device.kind for device in devices)]
    if memory := {device.memory for device in devices if device.memory}:
        parts.append(f"{size(min(memory))} for jax{' each' if len(devices) > 1 else ''}")
    if coords := [device.coords for device in devices if device.coords]:
        sides = (max(axis) - min(axis) + 1 for axis in zip(*coords, strict=True))
        cores = len({device.core_on_chip for device in devices})
        parts.append("x".join(map(str, sides)) + " chips" + (f" of {cores} cores" if cores > 1 else ""))
    slices, processes = ({d.slice_index for d in devices}, {d.process_index for d in devices})
    parts += [f"{len(slices)} slices"] if len(slices) > 1 else []
    parts += [f"{len(processes)} processes"] if len(processes) > 1 else []
    return ", ".join(parts)


def kinds(names: Iterable[str]) -> str:
    """`4 x TPU v5e`, and what else there is."""
    return " and ".join(f"{number} x {name}" for name, number in sorted(Counter(names).items()))
