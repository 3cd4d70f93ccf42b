"""What does not stop the program and should be known: a line each from the facts. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator

from sgl_jax.environment.facts import Advice, CompileCache, Facts, Notice, Package
from sgl_jax.environment.packages import OURS
from sgl_jax.environment.verdicts import gpu_extra, install
from sgl_jax.environment.wording import count
from sgl_jax.observability.log import size

ENOUGH_FILES = 4096
ENOUGH_DISK = 2 << 30
_HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"
_WANT_HUGE_PAGES = ("v5e", "v6e", "7x", "8i", "8t")  # generations, as jax recommends


def notices(facts: Facts) -> tuple[Notice, ...]:
    return (
        *_packages(facts),
        *_paths(facts),
        *_limits(facts),
        *_tpu_host(facts),
        *_probes(facts),
        *(Notice(f"could not look at {text}") for text in facts.not_found_out),
    )


def _packages(facts: Facts) -> Iterator[Notice]:
    if not any(each.needed_by == OURS for each in facts.packages):
        yield Notice(
            "sgl_jax is not installed as a package, so what it needs is not known",
            (Advice("in the repository", "uv pip install -e python"),),
        )
    if missing := [each for each in facts.packages if each.version is None and not each.optional]:
        names = ", ".join(each.name for each in missing)
        ours = [each for each in missing if each.needed_by == OURS]  # jax brings jaxlib itself
        yield Notice(f"not installed: {names}", (Advice("install", _install(ours or missing)),))
    for each in facts.packages:
        if each.fits or each.version is None:
            continue
        text = f"{each.name} is {each.version}; {each.needed_by} needs {each.needs}"
        command = _install([each]) if each.needed_by.startswith(OURS) else _jax_again(each, facts)
        yield Notice(text, (Advice("install a version that fits", command),))


def _install(packages: list[Package]) -> str:
    return "uv pip install " + " ".join(f'"{each.name}{each.needs}"' for each in packages)


def _jax_again(package: Package, facts: Facts) -> str:
    """jax pins what belongs to it: installing it with its extra brings the right versions."""
    of_gpu = package.name == facts.gpu_plugin or package.needed_by == facts.gpu_plugin
    if of_gpu or (facts.gpu_plugin and not facts.version("libtpu")):
        return install(gpu_extra(facts), facts)
    return install("tpu" if facts.version("libtpu") else "", facts)


def _paths(facts: Facts) -> Iterator[Notice]:
    if (cache := facts.compile_cache) is not None:
        yield from _compile_cache(cache)
    for disk in facts.disks:
        if disk.free is not None and disk.free < ENOUGH_DISK:
            yield Notice(f"only {size(disk.free)} free for the {disk.use} ({disk.path})")
    library = facts.environ.get("TPU_LIBRARY_PATH")
    if library and facts.tpu_library_missing:
        yield Notice(f"TPU_LIBRARY_PATH={library} is no file; jax takes the installed libtpu instead")


def _compile_cache(cache: CompileCache) -> Iterator[Notice]:
    if cache.state == "not writable":
        yield Notice(
            f"the compile cache {cache.path} cannot be written ({cache.problem}): every start compiles everything",
            (Advice("choose a folder that can be written", "export JAX_COMPILATION_CACHE_DIR=..."),),
        )


def _limits(facts: Facts) -> Iterator[Notice]:
    for limit in facts.machine.limits:
        if limit.name == "open files" and limit.soft is not None and limit.soft < ENOUGH_FILES:
            most = limit.hard if limit.hard is not None and limit.hard < 65536 else 65536
            advice = (Advice("before starting the server", f"ulimit -n {most}"),) if most > limit.soft else ()
            yield Notice(f"at most {limit.soft} open files; each client connection takes one", advice)
    allowed, limited = facts.machine.cpus_allowed, facts.machine.cgroup_cpus
    if allowed and limited and limited < allowed:
        yield Notice(f"the container may use {limited:g} CPUs and sees {count(allowed, 'CPU')}: more threads than CPUs")


def _tpu_host(facts: Facts) -> Iterator[Notice]:
    tpus = facts.tpus
    late = any(generation in chip for chip in tpus.chips for generation in _WANT_HUGE_PAGES)
    if late and tpus.huge_pages not in (None, "always"):
        yield Notice(
            f"transparent huge pages are set to {tpus.huge_pages}: TPUs of this generation start slower than they can",
            (Advice("until the next restart", f'sudo sh -c "echo always > {_HUGE_PAGES}"'),),
        )


def _probes(facts: Facts) -> Iterator[Notice]:
    """What jax complained about although it works."""
    for probe in facts.probes:
        if probe.outcome == "ok":
            for line in dict.fromkeys(probe.log):
                yield Notice(f"jax on {probe.platform}: {' '.join(line.split())}")
