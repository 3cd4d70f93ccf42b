"""The report as text, to the letter."""

from __future__ import annotations

from pathlib import Path

from machines import GIB, H200, LIBTPU, V5E, V5E_WORKS, facts

from sgl_jax.tools.environment.environment_report import render
from sgl_jax.tools.environment.facts import Facts, Machine, Package, Probe, Report
from sgl_jax.tools.environment.verdicts import judge, notices

GOLDEN = Path(__file__).with_name("report.txt")


def report(given: Facts) -> Report:
    return Report("0.1.0", judge(given), notices(given), given)


TPU_HOST = facts(
    V5E_WORKS,
    Probe("gpu", "not started", "no GPU plugin of jax is installed"),
    packages=(
        LIBTPU,
        Package("msgspec", None, ">=0.20"),
        Package("numpy", "1.26.4", ">=2.0", fits=False),
    ),
    tpus=V5E,
    gpus=H200,
    machine=Machine(
        hostname="t1v-n-0-w-0",
        system="Ubuntu 22.04.5 LTS, Linux 6.8.0",
        python="3.12.1 (x86_64), ~/.venv/bin/python",
        cpu_model="AMD EPYC 7B12",
        cpus=112,
        memory=384 * GIB,
        in_container=True,
        cgroup_cpus=96.5,
        cgroup_memory=256 * GIB,
    ),
    environ={"HF_TOKEN": "(set, hidden)", "LIBTPU_INIT_ARGS": " ".join(f"--xla_tpu_option_{n}=true" for n in range(6))},
)


def test_a_full_report() -> None:
    assert render(report(TPU_HOST)) + "\n" == GOLDEN.read_text(encoding="utf-8")


def test_a_report_of_nothing_has_its_sections_all_the_same() -> None:
    text = render(report(Facts()))
    assert text.startswith("sgl_jax 0.1.0 on unknown\nUsable: no platform\n\nPlatforms\n  TPU  not usable  ")
    assert "  memory              unknown\n" in text
    assert text.endswith("Environment variables\n  none of those that matter is set")


def test_lines_stay_within_their_width_but_commands_are_never_broken() -> None:
    packages = tuple(Package(f"package-{n}", None, ">=1.2.3") for n in range(12))
    lines = render(report(facts(packages=packages))).splitlines()
    long = [line for line in lines if len(line) > 100]
    assert long == ["    uv pip install " + " ".join(f'"package-{n}>=1.2.3"' for n in range(12))]
