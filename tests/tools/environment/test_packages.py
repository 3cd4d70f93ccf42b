"""Versions against requirements, read from metadata alone."""

from __future__ import annotations

import sys

import pytest

from sgl_jax.tools.environment.facts import Package
from sgl_jax.tools.environment.packages import Installed, collect, installed

SHELF = {
    "sgl-jax": Installed(
        "0.1.0", ("jax>=0.11.2", "numpy>=2.0", "matplotlib>=3; extra == 'bench'", "x; extra == 'dev'")
    ),
    "jax": Installed(
        "0.12.0.1",
        (
            "jaxlib<=0.12.0.1,>=0.11.2",
            "numpy>=2.2",
            'jaxlib<=0.12.0.1,>=0.12.0.1; extra == "tpu"',
            'libtpu==0.0.50.*; extra == "tpu"',
            'jax-cuda12-plugin==0.12.0.1; extra == "cuda12"',
            'jax-cuda13-plugin==0.12.0.1; extra == "cuda13"',
        ),
    ),
    "jaxlib": Installed("0.11.2"),
    "numpy": Installed("2.5.5"),
    "libtpu": Installed("0.0.52"),
    "jax-cuda13-plugin": Installed(
        "0.12.0.1", ("jax-cuda13-pjrt==0.12.0.1", "nvidia-cudnn-cu13>=9.12; extra == 'with-cuda'")
    ),
    "jax-cuda13-pjrt": Installed("0.12.0.1"),
}


def collected(*names: str) -> list[Package]:
    return list(collect(lambda name: SHELF[name] if name in names else Installed(None)))


def test_without_accelerators_jax_takes_a_range_of_jaxlibs() -> None:
    assert collected("sgl-jax", "jax", "jaxlib", "numpy") == [
        Package("jax", "0.12.0.1", ">=0.11.2", "sgl-jax"),
        Package("jaxlib", "0.11.2", ">=0.11.2,<=0.12.0.1", "jax"),
        Package("numpy", "2.5.5", ">=2.0", "sgl-jax"),
        Package("libtpu", None, "==0.0.50.*", "jax", optional=True),
        Package("matplotlib", None, ">=3", "sgl-jax", optional=True),
    ]


def test_with_libtpu_both_it_and_jaxlib_must_be_of_the_same_jax() -> None:
    assert collected("sgl-jax", "jax", "jaxlib", "numpy", "libtpu")[1:4:2] == [
        Package("jaxlib", "0.11.2", ">=0.12.0.1,<=0.12.0.1", "jax", fits=False),
        Package("libtpu", "0.0.52", "==0.0.50.*", "jax", optional=True, fits=False),
    ]


def test_a_gpu_plugin_brings_what_it_needs_and_has() -> None:
    assert collected("sgl-jax", "jax", "numpy", "jax-cuda13-plugin", "jax-cuda13-pjrt")[4:6] == [
        Package("jax-cuda13-plugin", "0.12.0.1", "==0.12.0.1", "jax", optional=True),
        Package("jax-cuda13-pjrt", "0.12.0.1", "==0.12.0.1", "jax-cuda13-plugin", optional=True),
    ]


def test_nothing_installed() -> None:
    assert collected() == [Package("jax", None), Package("jaxlib", None, "", "jax")]
    assert collected("sgl-jax")[:2] == [
        Package("jax", None, ">=0.11.2", "sgl-jax"),
        Package("jaxlib", None, "", "jax"),
    ]


@pytest.mark.parametrize(
    ("version", "fits"), [("0.11.2", True), ("0.12.1.dev20260101+abc", True), ("0.11.1", False), ("1.0rc1", False)]
)
def test_versions_are_compared_as_python_packages_are(version: str, fits: bool) -> None:
    shelf = {"sgl-jax": Installed("0.1.0", ("numpy<1,>=0.11.2; sys_platform == 'x'",)), "numpy": Installed(version)}
    found = collect(lambda name: shelf.get(name, Installed(None)))
    assert found == (Package("numpy", version, ">=0.11.2,<1", "sgl-jax", fits=fits),)


def test_without_packaging_there_are_versions_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    assert collected("jax")[:2] == [Package("jax", "0.12.0.1", "", "sgl-jax"), Package("jaxlib", None, "", "sgl-jax")]


def test_the_installed_sgl_jax_asks_for_jax() -> None:
    assert "jax>=0.11.2" in installed("sgl-jax").requires
    assert installed("no-such-package-at-all") == Installed(None)
