"""Versions against requirements, read from metadata alone."""

from __future__ import annotations

import sys

import pytest

from sgl_jax.tools.environment.facts import Package
from sgl_jax.tools.environment.packages import collect, installed

SHELF = {
    "sgl-jax": ("0.1.0", ["jax>=0.11.2", "numpy>=2.0", "uvicorn[standard]>=0.3", "matplotlib>=3; extra == 'bench'"]),
    "jax": (
        "0.12.0.1",
        [
            "jaxlib<=0.12.0.1,>=0.11.2",
            "numpy>=2.2",
            "scipy>=1.14",
            'jaxlib<=0.12.0.1,>=0.12.0.1; extra == "tpu"',
            'libtpu==0.0.50.*; extra == "tpu"',
            'jax-cuda12-plugin==0.12.0.1; extra == "cuda12"',
            'jax-cuda13-plugin==0.12.0.1; extra == "cuda13"',
        ],
    ),
    "jaxlib": ("0.11.2", []),
    "numpy": ("2.5.5", []),
    "libtpu": ("0.0.52", []),
    "jax-cuda13-plugin": ("0.12.0.1", ["jax-cuda13-pjrt==0.12.0.1"]),
}


def collected(*names: str) -> list[Package]:
    return list(collect(lambda name: SHELF[name] if name in names else (None, [])))


def test_requirements_are_ours_and_jaxs_of_jaxlib() -> None:
    assert collected("sgl-jax", "jax", "jaxlib", "numpy") == [
        Package("sgl-jax", "0.1.0"),
        Package("jax", "0.12.0.1", ">=0.11.2"),
        Package("numpy", "2.5.5", ">=2.0"),
        Package("uvicorn", None, ">=0.3"),
        Package("jaxlib", "0.11.2", "<=0.12.0.1,>=0.11.2"),
    ]


def test_packages_of_accelerators_count_where_they_are_installed() -> None:
    assert collected("sgl-jax", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin")[5:] == [
        Package("libtpu", "0.0.52", "==0.0.50.*", fits=False),
        Package("jax-cuda13-plugin", "0.12.0.1", "==0.12.0.1"),
    ]


def test_nothing_installed() -> None:
    assert collected() == [Package("sgl-jax", None), Package("jax", None), Package("jaxlib", None)]


@pytest.mark.parametrize(
    ("version", "fits"), [("0.11.2", True), ("0.12.1.dev20260101+abc", True), ("0.11.1", False), ("1.0rc1", False)]
)
def test_versions_are_compared_as_python_packages_are(version: str, fits: bool) -> None:
    shelf = {"sgl-jax": ("0.1.0", ["numpy<1,>=0.11.2; sys_platform == 'x'"]), "numpy": (version, [])}
    assert collect(lambda name: shelf.get(name, (None, [])))[1] == Package("numpy", version, "<1,>=0.11.2", fits)


def test_without_packaging_there_are_versions_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.specifiers", None)
    assert collected("jax", "jaxlib", "libtpu")[3] == Package("libtpu", "0.0.52", "==0.0.50.*")


def test_broken_metadata_is_no_misfit() -> None:
    shelf = {"sgl-jax": ("0.1.0", ["numpy>=nonsense"]), "numpy": ("2.5.5", [])}
    assert collect(lambda name: shelf.get(name, (None, [])))[1] == Package("numpy", "2.5.5", ">=nonsense")


def test_the_installed_sgl_jax_asks_for_jax() -> None:
    assert "jax>=0.11.2" in installed("sgl-jax")[1]
    assert installed("no-such-package-at-all") == (None, [])
