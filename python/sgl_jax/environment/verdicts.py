"""Usable or not, and if not why and what to do: a verdict per platform from the facts. Pure functions.

A platform that passed its probe is usable, whatever else is said of it. Otherwise the first reason that applies is
given, from the hardware upwards: present, free, allowed, its package installed, its driver new enough, its own words.
"""

from __future__ import annotations

import re
import textwrap

from sgl_jax.environment.facts import COMPUTING, IMPORTING, PLATFORMS, Advice, Facts, Holder, Platform, Probe, Verdict
from sgl_jax.environment.selection import under_jax_platforms
from sgl_jax.environment.wording import count, describe, kinds, words
from sgl_jax.observability.log import size

# The oldest driver on Linux for each major version of CUDA, newest first: CUDA's release notes, minor-version compatibility.
DRIVERS = {13: 580, 12: 525}

_LONGEST = 500  # characters of an error; all of it stands under "What was tried"

Problem = tuple[str, tuple[Advice, ...]]

_CONTAINER = {
    "tpu": Advice("in a container, pass the chips through", "docker run --privileged --net=host ..."),
    "gpu": Advice("in a container, pass the GPUs through", "docker run --gpus all ..."),
}
_WHO_HAS_THE_TPU = Advice(
    "see who has it (another user's process shows only to root)", "sudo lsof -w /dev/accel* /dev/vfio/*"
)
_REPORT = Advice("if the message does not help, report it together with this text")


def judge(facts: Facts) -> tuple[Verdict, ...]:
    """One verdict per platform, in the order in which the program prefers them."""
    verdicts: dict[Platform, Verdict] = {}
    for platform in PLATFORMS:
        if facts.probe(platform).outcome == "ok":
            verdicts[platform] = Verdict(platform, True, _what_works(platform, facts))
        else:
            reason, advice = _PROBLEMS[platform](facts)
            verdicts[platform] = Verdict(platform, False, reason, advice)
    return tuple(under_jax_platforms(verdicts[platform], verdicts, facts) for platform in PLATFORMS)


def install(extra: str, facts: Facts) -> str:
    """The command that installs jax with an accelerator's packages, in the version that is there."""
    version = facts.version("jax")
    needs = next((each.needs for each in facts.packages if each.name == "jax"), "")
    wanted = f"jax[{extra}]" if extra else "jax"
    return f'uv pip install "{wanted}{f"=={version}" if version else needs}"'


def _what_works(platform: Platform, facts: Facts) -> str:
    if platform != "cpu":
        return describe(facts.probe(platform).devices)
    machine = facts.machine
    cpus = machine.cpus_allowed or machine.cpus
    parts = [machine.cpu_model, count(cpus, "CPU") if cpus else "", size(machine.memory) if machine.memory else ""]
    return ", ".join(part for part in parts if part)


def _because(reason: str, *advice: Advice) -> Problem:
    return reason, tuple(dict.fromkeys(advice))


# --- TPU


def _tpu_problem(facts: Facts) -> Problem:
    tpus, probe, libtpu = facts.tpus, facts.probe("tpu"), facts.version("libtpu")
    if not tpus.visible:
        package = f"libtpu {libtpu} is installed, but " if libtpu else ""
        return _because(
            f"{package}no TPU chip is visible: no /dev/accel*, none on the PCI bus", _if_absent("tpu", facts)
        )
    chips = f"{kinds(tpus.chips)} on the PCI bus"
    if not tpus.chips:
        chips = f"{count(len(tpus.nodes), 'device file')} of TPUs ({', '.join(tpus.nodes)})"
    command = install("tpu", facts)
    if not (libtpu or "TPU_LIBRARY_PATH" in facts.environ):
        return _because(f"{chips}, but libtpu is not installed", Advice("install it with jax", command))
    if _cannot_import(probe):
        return _because(f"{chips}, but {_failure(probe)}", Advice("reinstall jax", command))
    if holders := tpus.holders or _holders_by_message(probe.message):
        return _in_use(holders)
    if not tpus.nodes:
        return _because(f"{chips}, but there is no /dev/accel* and no /dev/vfio/*", _CONTAINER["tpu"])
    if tpus.forbidden:
        return _because(
            f"{chips}, but this user may not open {', '.join(tpus.forbidden)}",
            Advice("run as root or as a member of the files' group"),
            _CONTAINER["tpu"],
        )
    return _because(
        f"{chips}, but {_failure(probe)}",
        *(_tpu_timeout(facts) if probe.outcome == "timeout" else ()),
        *_matching(_TPU_MESSAGES, probe),
        *_mismatch(facts, command),
        _REPORT,
    )


_TPU_MESSAGES = (
    ("ot permitted|ermission denied|PERMISSION_DENIED", Advice("run as root")),
    ("ot permitted|ermission denied|PERMISSION_DENIED", _CONTAINER["tpu"]),
    ("mlock|annot allocate memory|MAP_DMA", Advice("let the runtime lock memory", "ulimit -l unlimited")),
    ("IPv6 loopback", Advice("the TPU runtime needs ::1: turn IPv6 on; in a container, use --net=host")),
    ("lockfile", Advice("another process may just be loading libtpu: try again")),
    ("lockfile", Advice("if there is none, remove what one left behind", "sudo rm /tmp/libtpu_lockfile")),
)


def _holders_by_message(message: str) -> tuple[Holder, ...]:
    """libtpu says which process, where it can: `The TPU is already in use by process with pid 4242`."""
    if match := re.search(r"in use by process with pid (\d+)", message):
        return (Holder(int(match[1]), "", ""),)
    return (Holder(0, "", ""),) if re.search(r"already in use|resource busy", message) else ()


def _in_use(holders: tuple[Holder, ...]) -> Problem:
    who = ", ".join(f"process {each.pid}" + (f" ({each.name})" if each.name else "") for each in holders if each.pid)
    return _because(
        f"in use by {who or 'another process'}, and a TPU serves one at a time",
        *(() if who else (_WHO_HAS_THE_TPU,)),
        Advice("wait until it has ended, or stop it"),
    )


def _tpu_timeout(facts: Facts) -> tuple[Advice, ...]:
    hosts = len([name for name in facts.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name.strip()])
    listed = f" (TPU_WORKER_HOSTNAMES lists {hosts})" if hosts else ""
    return (
        Advice(f"a slice of several hosts{listed} starts only when all of them do: run this on all at the same time"),
        Advice("give it longer: --timeout 300"),
        _WHO_HAS_THE_TPU,
    )


# --- GPU


def _gpu_problem(facts: Facts) -> Problem:
    gpus, probe, plugin = facts.gpus, facts.probe("gpu"), facts.gpu_plugin
    if not (gpus.nvidia or gpus.amd):
        package = f"{plugin} {facts.version(plugin)} is installed, but " if plugin else ""
        return _because(
            f"{package}no GPU is visible: no /dev/nvidia*, no /dev/kfd, none on the PCI bus", _if_absent("gpu", facts)
        )
    seen = _gpus_seen(facts)
    if gpus.nvidia and not (gpus.gpus or gpus.driver or gpus.nodes):
        return _because(
            f"{seen}, but no driver is loaded",
            Advice(f"install NVIDIA's driver, version {max(DRIVERS.values())} or newer"),
            _CONTAINER["gpu"],
        )
    if gpus.nvidia and (problem := _driver_too_old(facts)):
        return problem
    command = install(gpu_extra(facts), facts)
    if plugin is None:
        return _because(f"{seen}, but jax has no plugin for it", Advice("install it", command))
    if _cannot_import(probe):
        return _because(f"{seen}, but {_failure(probe)}", Advice("reinstall jax", command))
    if (visible := facts.environ.get("CUDA_VISIBLE_DEVICES")) is not None and visible.strip() in ("", "-1"):
        return _because(
            f'{seen}, but CUDA_VISIBLE_DEVICES="{visible}" hides it', Advice("undo it", "unset CUDA_VISIBLE_DEVICES")
        )
    if gpus.nvidia and gpus.nvidia_smi not in ("ok", "not found"):
        return _because(
            f"{seen}, but nvidia-smi: {gpus.nvidia_smi}", Advice("load or reinstall the driver, or restart the machine")
        )
    libraries = re.findall(r"Unable to load (\w+)", words(probe))
    return _because(
        f"{seen}, but {_failure(probe)}",
        *(Advice(f"{name} cannot be loaded: install it with jax", command) for name in libraries),
        *_matching(_GPU_MESSAGES, probe),
        *_mismatch(facts, command),
        _REPORT,
    )


_GPU_MESSAGES = (
    ("OUT_OF_MEMORY|RESOURCE_EXHAUSTED|out of memory", Advice("its memory is taken; see by whom", "nvidia-smi")),
    ("ot permitted|ermission denied", Advice("this user may not open the device files: run as root")),
    ("no kernel image", Advice("the GPU is older or newer than those jax was built for")),
)


def _gpus_seen(facts: Facts) -> str:
    gpus = facts.gpus
    if gpus.gpus:
        return kinds([gpu.name for gpu in gpus.gpus])
    if gpus.nvidia_on_pci:
        return f"{count(gpus.nvidia_on_pci, 'NVIDIA GPU')} on the PCI bus"
    return f"{count(len(gpus.nodes), 'device file')} of GPUs ({', '.join(gpus.nodes)})"


def gpu_extra(facts: Facts) -> str:
    """The extra of jax that serves this GPU: the plugin's that is installed, else the newest the driver is good for."""
    if match := re.fullmatch(r"jax-(cuda\d+)-plugin", facts.gpu_plugin or ""):
        return match[1]
    if "rocm" in (facts.gpu_plugin or "") or (facts.gpus.amd and not facts.gpus.nvidia):
        return "rocm7-local"
    driver = _driver_major(facts)
    return next(f"cuda{cuda}" for cuda, oldest in DRIVERS.items() if driver is None or driver >= oldest)


def _driver_major(facts: Facts) -> int | None:
    match = re.match(r"\d+", facts.gpus.driver or "")
    return int(match[0]) if match else None


def _driver_too_old(facts: Facts) -> Problem | None:
    """For the plugin that is installed, or without one for all of them."""
    driver, match = _driver_major(facts), re.fullmatch(r"jax-cuda(\d+)-plugin", facts.gpu_plugin or "")
    oldest = DRIVERS.get(int(match[1]), 0) if match else min(DRIVERS.values())
    if driver is None or driver >= oldest:
        return None
    update = Advice(f"update the driver to {max(DRIVERS.values())} or newer")
    others = [cuda for cuda, least in DRIVERS.items() if driver >= least]
    other = (
        [Advice("or install jax for the driver that is there", install(f"cuda{others[0]}", facts))] if others else []
    )
    who = facts.gpu_plugin if match else "jax"
    return _because(f"NVIDIA's driver is {facts.gpus.driver}; {who} needs {oldest} or newer", update, *other)


# --- CPU


def _cpu_problem(facts: Facts) -> Problem:
    probe, command = facts.probe("cpu"), install("", facts)
    advice = list(_matching(_CPU_MESSAGES, probe))
    if _cannot_import(probe):
        advice.append(Advice("reinstall jax" if facts.version("jax") else "install jax", command))
    elif probe.outcome == "timeout":
        advice.append(Advice("the machine may be overloaded: give it longer, --timeout 300"))
    return _because(_failure(probe), *advice, *_mismatch(facts, command), *([] if advice else [_REPORT]))


_CPU_MESSAGES = (
    ("SIGILL|AVX", Advice("this CPU lacks instructions that jaxlib is built with: use another machine")),
    ("SIGKILL", Advice("most often for lack of memory: free some, or raise the container's limit")),
)


# --- what the platforms share


def _if_absent(platform: Platform, facts: Facts) -> Advice:
    if facts.machine.container:
        return _CONTAINER[platform]
    return Advice("nothing to do, unless this machine should have one")


def _cannot_import(probe: Probe) -> bool:
    return probe.outcome == "failed" and probe.stage == IMPORTING


def _failure(probe: Probe) -> str:
    if probe.outcome == "not started":
        return f"it was not tried: {probe.message}"
    if probe.outcome == "timeout":
        return f"jax gave {probe.message} while {probe.stage}"
    if _cannot_import(probe):
        return f"jax cannot be imported: {textwrap.shorten(probe.message, _LONGEST, placeholder=' ...')}"
    doing = {COMPUTING: "computes wrongly or not at all", IMPORTING: "ends when imported"}.get(
        probe.stage, "cannot initialise it"
    )
    return f"jax {doing}: {textwrap.shorten(words(probe), _LONGEST, placeholder=' ...')}"


def _matching(table: tuple[tuple[str, Advice], ...], probe: Probe) -> list[Advice]:
    return [advice for pattern, advice in table if re.search(pattern, words(probe))]


def _mismatch(facts: Facts, command: str) -> list[Advice]:
    wrong = [each for each in facts.packages if not each.fits and each.needed_by.startswith("jax")]
    text = "; ".join(f"{each.name} is {each.version}, {each.needed_by} needs {each.needs}" for each in wrong)
    return [Advice(f"versions that do not fit together: {text}", command)] if wrong else []


_PROBLEMS = {"tpu": _tpu_problem, "gpu": _gpu_problem, "cpu": _cpu_problem}
