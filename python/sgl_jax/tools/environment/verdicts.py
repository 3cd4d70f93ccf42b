"""Verdicts from the facts: for each platform whether it is usable, and if not, why and what to do. Also notices.

A platform that passed its probe is usable, unless JAX_PLATFORMS keeps jax from it. Otherwise the first row of its table
that holds says why not, from the hardware upwards; the last one gives the words of jax. All functions are pure.
"""

import re
import textwrap
from collections.abc import Iterable

from sgl_jax.observability.log import size
from sgl_jax.tools.environment.facts import IMPORTING, PLATFORMS, Facts, Package, Platform, Probe, Verdict, kinds
from sgl_jax.tools.environment.packages import OURS

_DRIVER = 580  # the oldest on Linux for CUDA 13: CUDA's release notes, minor-version compatibility
_LONGEST = 500  # characters of an error; all of it stands under "What was tried"
_CONTAINER = {
    "tpu": "in a container, pass the chips through:\ndocker run --privileged --net=host ...",
    "gpu": "in a container, pass the GPUs through:\ndocker run --gpus all ...",
}
_WHO = "see who has it (another user's process shows only to root):\nsudo lsof -w /dev/accel* /dev/vfio/*"
_AS_ROOT = "this user may not open the device files: run as root or as a member of their group"
_INSTALL_PLUGIN = f"install it (cuda12 instead of cuda13 for a driver older than {_DRIVER}):"
_OLD_DRIVER = f"the driver is too old: update it to {_DRIVER} or newer, or install jax[cuda12]"
# Patterns of how a probe ended, "<platform> <outcome> while <stage>: <what jax said>", and what helps then.
_CAUSES = (
    (r"^tpu timeout", "a slice of several hosts starts only when all of them do: run this on all at the same time"),
    (r"ot permitted|ermission denied|PERMISSION_DENIED", _AS_ROOT),
    (r"mlock|annot allocate memory|MAP_DMA", "let the runtime lock memory:\nulimit -l unlimited"),
    (r"lockfile", "if no other process uses the TPU, remove what one left:\nsudo rm /tmp/libtpu_lockfile"),
    (r"OUT_OF_MEMORY|RESOURCE_EXHAUSTED|out of memory", "its memory is taken; see by whom:\nnvidia-smi"),
    (r"driver version is insufficient|InsufficientDriver", _OLD_DRIVER),
    (r"SIGILL|AVX", "this CPU lacks instructions that jaxlib is built with: use another machine"),
    (r"SIGKILL", "most often for lack of memory: free some, or raise the container's limit"),
    (r"Unable to load (\w+)", "{0} cannot be loaded: install it with jax:\n{install}"),
    (r"^\w+ timeout", "give it longer: --timeout 300"),
    (rf"^\w+ failed while {IMPORTING}:", "{verb} jax:\n{install}"),
)
_NO_CAUSE = "if the message does not help, report it together with this text"

type Row = tuple[object, str, *tuple[str, ...]]  # whether it holds, the reason, what to do; none: see _CAUSES


def judge(facts: Facts) -> tuple[Verdict, ...]:
    """Return a verdict for each platform, in the order in which the program prefers them."""
    tables = {"tpu": _tpu_rows, "gpu": _gpu_rows, "cpu": lambda facts, failure: [(True, failure)]}
    verdicts = []
    for platform in PLATFORMS:
        probe = facts.probe(platform)
        if probe.outcome == "ok":
            verdicts.append(_of_working(platform, facts))
        else:
            _, reason, *advice = next(row for row in tables[platform](facts, _failure(probe)) if row[0])
            verdicts.append(Verdict(platform, False, reason, tuple(advice) or _what_helps(platform, facts)))
    return tuple(verdicts)


def _of_working(platform: Platform, facts: Facts) -> Verdict:
    found = facts.machine.processors if platform == "cpu" else describe(facts.probe(platform))
    value = facts.environ.get("JAX_PLATFORMS", "")
    named = value.replace(" ", "").split(",")
    if not value or platform in named or (platform == "gpu" and "cuda" in named):
        return Verdict(platform, True, found)
    summary = f"works ({found}), but JAX_PLATFORMS={value} keeps jax from it"
    return Verdict(platform, False, summary, ("let jax choose:\nunset JAX_PLATFORMS",))


def _tpu_rows(facts: Facts, failure: str) -> list[Row]:
    tpus, seen, libtpu = facts.tpus, facts.tpus.words, facts.version("libtpu")
    package = f"libtpu {libtpu} is installed, but " if libtpu else ""
    nothing = f"{package}no TPU chip is visible: no /dev/accel*, none on the PCI bus"
    no_package = not libtpu and "TPU_LIBRARY_PATH" not in facts.environ
    # libtpu says which process has it, where it can
    held = re.search(r"already in use(?: by process with pid (\d+))?|resource busy", facts.probe("tpu").message)
    by = f"process {held[1]}" if held and held[1] else "another process"
    in_use = f"{seen}, but in use by {by}, and a TPU serves one at a time"
    no_nodes = f"{seen}, but there is no /dev/accel* and no /dev/vfio/*"
    return [
        (not tpus.visible, nothing, _absent("tpu", facts)),
        (no_package, f"{seen}, but libtpu is not installed", f"install it with jax:\n{install('tpu', facts)}"),
        (held, in_use, _WHO, "wait until it has ended, or stop it"),
        (not tpus.nodes, no_nodes, _CONTAINER["tpu"]),
        (True, f"{seen}, but {failure}"),
    ]


def _gpu_rows(facts: Facts, failure: str) -> list[Row]:
    gpus, seen, plugin = facts.gpus, facts.gpus.words, facts.gpu_plugin
    package = f"{plugin} {facts.version(plugin)} is installed, but " if plugin else ""
    nothing = f"{package}no NVIDIA GPU is visible: no /dev/nvidia*, none on the PCI bus"
    no_driver = not (gpus.driver or gpus.nodes)
    hidden = facts.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    return [
        (not gpus.visible, nothing, _absent("gpu", facts)),
        (no_driver, f"{seen}, but no driver is loaded", f"install NVIDIA's, {_DRIVER} or newer", _CONTAINER["gpu"]),
        (not plugin, f"{seen}, but jax has no plugin for it", f"{_INSTALL_PLUGIN}\n{install('cuda13', facts)}"),
        (hidden, f"{seen}, but CUDA_VISIBLE_DEVICES hides it", "undo it:\nunset CUDA_VISIBLE_DEVICES"),
        (True, f"{seen}, but {failure}"),
    ]


def notices(facts: Facts) -> tuple[str, ...]:
    """Return the lines about what does not stop the program; a command stands in a line of its own."""
    missing = [each for each in facts.packages if each.version is None and each.name != OURS]
    names = ", ".join(each.name for each in missing)
    rows = [
        (not facts.version(OURS), "sgl_jax is not installed; in the repository:\nuv pip install -e python"),
        (missing, f"not installed: {names}\n{_install(missing)}"),
    ]
    return (*(text for holds, text in rows if holds), *_misfits(facts))


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
    probe, cuda = facts.probe(platform), facts.gpu_plugin.removeprefix("jax-").removesuffix("-plugin")
    extra = {"tpu": "tpu", "gpu": cuda or "cuda13", "cpu": ""}[platform]
    words = {"install": install(extra, facts), "verb": "reinstall" if facts.version("jax") else "install"}
    ended = f"{platform} {probe.outcome} while {probe.stage}: {probe.words}"
    matches = ((advice, match) for pattern, advice in _CAUSES for match in re.finditer(pattern, ended))
    found = [advice.format(*match.groups(), **words) for advice, match in matches]
    return tuple(dict.fromkeys((*found, *_misfits(facts)))) or (_NO_CAUSE,)


def _misfits(facts: Facts) -> list[str]:
    misfits = [each for each in facts.packages if not each.fits]
    return [f"{each.name} is {each.version}; {each.needs} is needed\n{_install([each])}" for each in misfits]


def _absent(platform: Platform, facts: Facts) -> str:
    return _CONTAINER[platform] if facts.machine.in_container else "nothing to do, unless this machine should have one"


def install(extra: str, facts: Facts) -> str:
    """Return the command that installs jax with an accelerator's packages, in the version that is there."""
    version = facts.version("jax")
    needs = next((each.needs for each in facts.packages if each.name == "jax"), "")
    wanted = f"jax[{extra}]" if extra else "jax"
    return f'uv pip install "{wanted}{f"=={version}" if version else needs}"'


def _install(packages: Iterable[Package]) -> str:
    return "uv pip install " + " ".join(f'"{each.name}{each.needs}"' for each in packages)


def describe(probe: Probe) -> str:
    """Describe the devices found: `4 x TPU v5 lite, 16.0 GiB for jax each`, then processes if there are several."""
    parts = [kinds(probe.devices)]
    if probe.memory:
        parts.append(f"{size(probe.memory)} for jax{' each' if len(probe.devices) > 1 else ''}")
    if probe.process_count > 1:
        parts.append(f"{probe.process_count} processes")
    return ", ".join(parts)
