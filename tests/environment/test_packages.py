"""Versions against requirements, read from metadata alone."""

from __future__ import annotations

import pytest

from sgl_jax.environment.facts import Package
from sgl_jax.environment.packages import Installed, Requirement, collect, fits, installed, parse_requirement


@pytest.mark.parametrize(
    ("needs", "version", "expected"),
    [
        ("", "1.0", True),
        (">=0.11.2", "0.12.0.1", True),
        (">=0.11.2", "0.11.2", True),
        (">=0.11.2", "0.11.1", False),
        (">=0.22,<1", "0.23.3", True),
        (">=0.22,<1", "1.0.0", False),
        ("<=0.12.0.1,>=0.12.0.1", "0.12.0.1", True),
        ("<=0.12.0.1,>=0.12.0.1", "0.12.0", False),
        ("==0.0.50.*", "0.0.50.1", True),
        ("==0.0.50.*", "0.0.5", False),
        ("==0.0.50.*", "0.0.52", False),
        ("==1.2", "1.2.0", True),
        ("!=1.2", "1.2.0", False),
        ("!=1.2.*", "1.3", True),
        ("~=1.4.2", "1.4.9", True),
        ("~=1.4.2", "1.5", False),
        (">1", "1.0", False),
        ("<10.0,>=9.12.0.46", "9.14.0.64", True),
        (">=0.4.36", "0.12.1.dev20260101+abc", True),
    ],
)
def test_versions_fit_or_do_not(needs: str, version: str, expected: bool) -> None:
    assert fits(needs, version) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("jax>=0.11.2", Requirement("jax", ">=0.11.2", "")),
        ("tokenizers<1,>=0.22", Requirement("tokenizers", ">=0.22,<1", "")),
        ("uvloop>=0.22; sys_platform != 'win32'", Requirement("uvloop", ">=0.22", "")),
        ('libtpu==0.0.50.*; extra == "tpu"', Requirement("libtpu", "==0.0.50.*", "tpu")),
        (
            'jax-cuda13-plugin[with-cuda]<=0.12.0.1,>=0.12.0.1; extra == "cuda13"',
            Requirement("jax-cuda13-plugin", ">=0.12.0.1,<=0.12.0.1", "cuda13"),
        ),
        ("nvidia-nvvm; sys_platform == 'linux' and extra == 'with-cuda'", Requirement("nvidia-nvvm", "", "with-cuda")),
        ("old (>=1.0)", Requirement("old", ">=1.0", "")),
    ],
)
def test_requirements_are_read(text: str, expected: Requirement) -> None:
    assert parse_requirement(text) == expected


def described(*texts: str) -> tuple[Requirement, ...]:
    return tuple(map(parse_requirement, texts))


SHELF = {
    "sgl-jax": Installed(
        "0.1.0", described("jax>=0.11.2", "numpy>=2.0", "matplotlib>=3; extra == 'bench'", "x; extra == 'dev'")
    ),
    "jax": Installed(
        "0.12.0.1",
        described(
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
        "0.12.0.1", described("jax-cuda13-pjrt==0.12.0.1", "nvidia-cudnn-cu13>=9.12; extra == 'with-cuda'")
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
        Package("matplotlib", None, ">=3", "sgl-jax[bench]", optional=True),
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


def test_the_installed_sgl_jax_asks_for_jax() -> None:
    assert Requirement("jax", ">=0.11.2", "") in installed("sgl-jax").requirements
    assert installed("no-such-package-at-all") == Installed(None)
