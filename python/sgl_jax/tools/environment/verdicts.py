"""Verdicts from the facts: for each platform whether it is usable, and if not, why and what to do. Also notices.

A platform that passed its probe is usable, whatever else is known of it. Otherwise the first row of its table that holds
says why not, from the hardware upwards: present, free, allowed, its package installed, its driver new enough, its own words.
All functions are pure.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from sgl_jax.observability.log import size
from sgl_jax.tools.environment.facts import IMPORTING, PLATFORMS, Device, Facts, Package, Platform, Probe, Verdict
from sgl_jax.tools.environment.packages import OURS

# The oldest driver on Linux for each major version of CUDA, newest first: CUDA's release notes, minor-version compatibility.
DRIVERS = {13: 580, 12: 525}
NEWEST, OLDEST = max(DRIVERS.values()), min(DRIVERS.values())
ENOUGH_FILES = 4096
ENOUGH_DISK = 2 << 30

_LONGEST = 500  # characters of an error; all of it stands under "What was tried"
_CONTAINER = {
    "tpu": "in a container, pass the chips through:\ndocker run --privileged --net=host ...",
    "gpu": "in a container, pass the GPUs through:\ndocker run --gpus all ...",
}
_WHO = "see who has it (another user's process shows only to root):\nsudo lsof -w /dev/accel* /dev/vfio/*"
_AS_ROOT = "this user may not open the device files: run as root or as a member of their group"
# Patterns of how a probe ended, "<platform> <outcome> while <stage>: <what jax said>", and what helps then.
_CAUSES = (
    (r"^tpu timeout", "a slice of several hosts starts only when all of them do: run this on all at the same time"),
    (r"ot permitted|ermission denied|PERMISSION_DENIED", _AS_ROOT),
    (r"mlock|annot allocate memory|MAP_DMA", "let the runtime lock memory:\nulimit -l unlimited"),
    (r"IPv6 loopback", "the TPU runtime needs ::1: turn IPv6 on; in a container, use --net=host"),
    (r"lockfile", "if no other process uses the TPU, remove what one left:\nsudo rm /tmp/libtpu_lockfile"),
    (r"OUT_OF_MEMORY|RESOURCE_EXHAUSTED|out of memory", "its memory is taken; see by whom:\nnvidia-smi"),
    (r"no kernel image", "the GPU is older or newer than those jax was built for"),
    (r"SIGILL|AVX", "this CPU lacks instructions that jaxlib is built with: use another machine"),
    (r"SIGKILL", "most often for lack of memory: free some, or raise the container's limit"),
    (r"Unable to load (\w+)", "{0} cannot be loaded: install it with jax:\n{install}"),
    (r"^\w+ timeout", "give it longer: --timeout 300"),
    (rf"^\w+ failed while {IMPORTING}:", "{verb} jax:\n{install}"),
)
_OTHER_CACHE = "every start compiles everything; choose another\nexport JAX_COMPILATION_CACHE_DIR=..."
_NO_CAUSE = "if the message does not help, report it together with this text"

type Row = tuple[object, str, *tuple[str, ...]]  # whether it holds, the reason, what to do; none: see _CAUSES


def judge(facts: Facts) -> tuple[Verdict, ...]:
    """Return a verdict for each platform, in the order in which the program prefers them."""
    tables = {"tpu": _tpu_rows, "gpu": _gpu_rows, "cpu": lambda facts, failure: [(True, failure)]}
    verdicts: dict[str, Verdict] = {}
    for platform in PLATFORMS:
        probe = facts.probe(platform)
        if probe.outcome == "ok":
            what = describe(probe.devices) if platform != "cpu" else facts.machine.processors
            verdicts[platform] = Verdict(platform, True, what)
        else:
            _, reason, *advice = next(row for row in tables[platform](facts, _failure(probe)) if row[0])
            verdicts[platform] = Verdict(platform, False, reason, tuple(advice) or _what_helps(platform, facts))
    return tuple(_under_jax_platforms(verdict, verdicts, facts) for verdict in verdicts.values())


def _tpu_rows(facts: Facts, failure: str) -> list[Row]:
    tpus, libtpu = facts.tpus, facts.version("libtpu")
    package = f"libtpu {libtpu} is installed, but " if libtpu else ""
    seen = f"{kinds(tpus.chips)} on the PCI bus" if tpus.chips else f"TPUs ({', '.join(tpus.nodes)})"
    # libtpu says which process has it, where it can
    held = re.search(r"already in use(?: by process with pid (\d+))?|resource busy", facts.probe("tpu").message)
    by = f"process {held[1]}" if held and held[1] else "another process"
    install_it = f"install it with jax:\n{install('tpu', facts)}"
    return [
        (
            not tpus.visible,
            f"{package}no TPU chip is visible: no /dev/accel*, none on the PCI bus",
            _absent("tpu", facts),
        ),
        (not libtpu and "TPU_LIBRARY_PATH" not in facts.environ, f"{seen}, but libtpu is not installed", install_it),
        (
            held,
            f"{seen}, but in use by {by}, and a TPU serves one at a time",
            _WHO,
            "wait until it has ended, or stop it",
        ),
        (not tpus.nodes, f"{seen}, but there is no /dev/accel* and no /dev/vfio/*", _CONTAINER["tpu"]),
        (True, f"{seen}, but {failure}"),
    ]


def _gpu_rows(facts: Facts, failure: str) -> list[Row]:
    gpus, plugin, driver = facts.gpus, facts.gpu_plugin, _driver(facts)
    package = f"{plugin} {facts.version(plugin)} is installed, but " if plugin else ""
    nothing = f"{package}no GPU is visible: no /dev/nvidia*, no /dev/kfd, none on the PCI bus"
    on_pci = f"{gpus.on_pci} x NVIDIA GPU on the PCI bus" if gpus.on_pci else f"GPUs ({', '.join(gpus.nodes)})"
    seen = kinds(gpus.names) or on_pci
    no_driver = gpus.nvidia and not (gpus.names or gpus.driver or gpus.nodes)
    cuda = re.search(r"cuda(\d+)", plugin)
    needed = DRIVERS.get(int(cuda[1]), 0) if cuda else OLDEST
    too_old = f"NVIDIA's driver is {gpus.driver}; {plugin or 'jax'} needs {needed} or newer"
    update = [f"update the driver to {NEWEST} or newer"]
    if driver and driver >= OLDEST:
        other = install(f"cuda{_cuda_for(driver)}", facts)
        update.append(f"or install jax for the driver that is there:\n{other}")
    hidden = facts.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    smi_fails = gpus.nvidia and gpus.nvidia_smi not in ("ok", "not found")
    reload = "reload or reinstall the driver, or restart the machine"
    return [
        (not gpus.visible, nothing, _absent("gpu", facts)),
        (no_driver, f"{seen}, but no driver is loaded", f"install NVIDIA's, {NEWEST} or newer", _CONTAINER["gpu"]),
        (driver is not None and driver < needed, too_old, *update),
        (not plugin, f"{seen}, but jax has no plugin for it", f"install it:\n{install(gpu_extra(facts), facts)}"),
        (hidden, f"{seen}, but CUDA_VISIBLE_DEVICES hides it", "undo it:\nunset CUDA_VISIBLE_DEVICES"),
        (smi_fails, f"{seen}, but nvidia-smi: {gpus.nvidia_smi}", reload),
        (True, f"{seen}, but {failure}"),
    ]


def notices(facts: Facts) -> tuple[str, ...]:
    """Return the lines about what does not stop the program; a command stands in a line of its own."""
    cache, machine, packages = facts.compile_cache, facts.machine, facts.packages
    stranger = not any(each.needed_by == OURS for each in packages)
    missing = [each for each in packages if each.version is None and each.needed_by and not each.optional]
    names, ours = ", ".join(each.name for each in missing), [each for each in missing if each.needed_by == OURS]
    full = cache.free is not None and cache.free < ENOUGH_DISK
    files, most_files = machine.limits.get("open files", (None, None))
    few, most = files is not None and files < ENOUGH_FILES, min(most_files or 65536, 65536)
    raised = f"\nulimit -n {most}" if most > (files or 0) else ""
    sees, may = machine.cpus or 0, machine.cgroup_cpus or 0
    rows = [
        (stranger, "sgl_jax is not installed, or not with its packages; in the repository:\nuv pip install -e python"),
        (missing, f"not installed: {names}\n{_install(ours or missing)}"),  # jax brings jaxlib itself
        *((not each.fits, f"{_misfit(each, ';')}\n{_repair(each, facts)}") for each in packages),
        (cache.problem, f"the compile cache {cache.path} cannot be written ({cache.problem}): {_OTHER_CACHE}"),
        (full, f"only {size(cache.free or 0)} free for the compile cache ({cache.path})"),
        (few, f"at most {files} open files; each client connection takes one{raised}"),
        (0 < may < sees, f"the container may use {may:g} CPUs and sees {sees}: more threads than CPUs"),
        *((True, f"could not look at {text}") for text in facts.not_found_out),
    ]
    return tuple(text for holds, text in rows if holds)


def _failure(probe: Probe) -> str:
    if probe.outcome == "not started":
        return f"it was not tried: {probe.message}"
    if probe.outcome == "timeout":
        return f"jax gave {probe.message} while {probe.stage}"
    cannot = probe.outcome == "failed" and probe.stage == IMPORTING
    said = textwrap.shorten(probe.words, _LONGEST, placeholder=" ...")
    return f"jax cannot be imported: {said}" if cannot else f"jax fails while {probe.stage}: {said}"


def _what_helps(platform: Platform, facts: Facts) -> tuple[str, ...]:
    """Return the advice for each cause of a failed probe that is found."""
    probe, extra = facts.probe(platform), {"tpu": "tpu", "gpu": gpu_extra(facts), "cpu": ""}[platform]
    words = {"install": install(extra, facts), "verb": "reinstall" if facts.version("jax") else "install"}
    ended = f"{platform} {probe.outcome} while {probe.stage}: {probe.words}"
    matches = ((advice, match) for pattern, advice in _CAUSES for match in re.finditer(pattern, ended))
    found = [advice.format(*match.groups(), **words) for advice, match in matches]
    if wrong := [_misfit(each, ",") for each in facts.packages if not each.fits and each.needed_by.startswith("jax")]:
        found.append(f"versions that do not fit together: {'; '.join(wrong)}:\n{words['install']}")
    return tuple(dict.fromkeys(found)) or (_NO_CAUSE,)


def _absent(platform: Platform, facts: Facts) -> str:
    return _CONTAINER[platform] if facts.machine.container else "nothing to do, unless this machine should have one"


def _under_jax_platforms(verdict: Verdict, verdicts: dict[str, Verdict], facts: Facts) -> Verdict:
    """Take JAX_PLATFORMS into account: jax uses only what it names, and nothing at all if one of those named fails."""
    value = facts.environ.get("JAX_PLATFORMS", "")
    named = [name.strip() for name in value.split(",") if name.strip()]
    if not named or not verdict.usable:
        return verdict
    why = f"JAX_PLATFORMS={value} keeps jax from it"
    if any({"cuda": "gpu", "rocm": "gpu"}.get(name, name) == verdict.platform for name in named):
        refused = next(filter(None, (_refused(name, verdicts, facts) for name in named)), "")
        if not refused:
            return verdict
        why = f"jax fails with JAX_PLATFORMS={value}: {refused}"
    advice = ("let jax choose:\nunset JAX_PLATFORMS",)
    return replace(verdict, usable=False, summary=f"works ({verdict.summary}), but {why}", advice=advice)


def _refused(name: str, verdicts: dict[str, Verdict], facts: Facts) -> str:
    """Return why jax fails when JAX_PLATFORMS has this name; empty: it does not."""
    if name == "gpu":  # read as cuda and rocm, both of which must work
        return f"it takes gpu for CUDA and ROCm at once; write {facts.gpu_name}"
    if name == "cuda" and not facts.gpus.nvidia:
        return ""  # passed over
    if name not in ("tpu", "cuda", "rocm", "cpu"):
        return f"it knows no platform {name}"
    works = verdicts[name].usable if name in verdicts else name == facts.gpu_name and verdicts["gpu"].usable
    return "" if works else f"{name} does not work"


# --- packages, commands and devices in words --------------------------------------------------------------------------


def _driver(facts: Facts) -> int | None:
    match = re.match(r"\d+", facts.gpus.driver or "")
    return int(match[0]) if match else None


def _cuda_for(driver: int | None) -> int:
    """Return the newest CUDA that a driver is good for: the newest of all if it is unknown, the oldest if none is."""
    return next((cuda for cuda, oldest in DRIVERS.items() if driver is None or driver >= oldest), min(DRIVERS))


def gpu_extra(facts: Facts) -> str:
    """Return the extra of jax that serves this GPU: the installed plugin's, else the newest the driver is good for."""
    if match := re.search(r"cuda\d+", facts.gpu_plugin):
        return match[0]
    return "rocm7-local" if facts.gpu_name == "rocm" or not facts.gpus.nvidia else f"cuda{_cuda_for(_driver(facts))}"


def install(extra: str, facts: Facts) -> str:
    """Return the command that installs jax with an accelerator's packages, in the version that is there."""
    version = facts.version("jax")
    needs = next((each.needs for each in facts.packages if each.name == "jax"), "")
    wanted = f"jax[{extra}]" if extra else "jax"
    return f'uv pip install "{wanted}{f"=={version}" if version else needs}"'


def _install(packages: Iterable[Package]) -> str:
    return "uv pip install " + " ".join(f'"{each.name}{each.needs}"' for each in packages)


def _repair(package: Package, facts: Facts) -> str:
    """Return the command that brings a version that fits: jax pins what belongs to it, and its extra brings those."""
    extra = "tpu" if facts.version("libtpu") else gpu_extra(facts) if facts.gpu_plugin else ""
    return _install([package]) if package.needed_by.startswith(OURS) else install(extra, facts)


def _misfit(package: Package, separator: str) -> str:
    return f"{package.name} is {package.version}{separator} {package.needed_by} needs {package.needs}"


def describe(devices: tuple[Device, ...]) -> str:
    """Describe devices: `4 x TPU v5 lite, 16.0 GiB for jax each, 2x2x1 chips`, then slices and processes if several."""
    parts = [kinds(device.kind for device in devices)]
    if memory := {device.memory for device in devices if device.memory}:
        parts.append(f"{size(min(memory))} for jax{' each' if len(devices) > 1 else ''}")
    if coords := [device.coords for device in devices if device.coords]:
        sides = (max(axis) - min(axis) + 1 for axis in zip(*coords, strict=True))
        cores = len({device.core_on_chip for device in devices})
        parts.append("x".join(map(str, sides)) + " chips" + (f" of {cores} cores" if cores > 1 else ""))
    slices, processes = len({each.slice_index for each in devices}), len({each.process_index for each in devices})
    parts += [f"{number} {name}" for number, name in ((slices, "slices"), (processes, "processes")) if number > 1]
    return ", ".join(parts)


def kinds(names: Iterable[str]) -> str:
    """Count equal names: `4 x TPU v5e and 1 x TPU v4`."""
    return " and ".join(f"{number} x {name}" for name, number in sorted(Counter(names).items()))
