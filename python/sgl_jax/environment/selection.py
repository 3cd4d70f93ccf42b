"""What JAX_PLATFORMS does to the verdicts: jax uses nothing it does not name, and nothing at all if one of those fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from sgl_jax.environment.facts import Advice, Facts, Platform, Verdict, gpu_family

_UNSET = Advice("let jax choose", "unset JAX_PLATFORMS")


def under_jax_platforms(verdict: Verdict, verdicts: Mapping[Platform, Verdict], facts: Facts) -> Verdict:
    """A verdict as it is with the JAX_PLATFORMS of the environment; `verdicts` are those without."""
    value = facts.environ.get("JAX_PLATFORMS", "")
    named = [each.strip() for each in value.split(",") if each.strip()]
    if not named or not verdict.usable:
        return verdict
    why = f"JAX_PLATFORMS={value} keeps jax from it"
    if any(_platform_of(name) == verdict.platform for name in named):
        refused = next(filter(None, (_refused(name, verdicts, facts) for name in named)), "")
        if not refused:
            return verdict
        why = f"jax fails with JAX_PLATFORMS={value}: {refused}"
    return dataclasses.replace(verdict, usable=False, summary=f"works ({verdict.summary}), but {why}", advice=(_UNSET,))


def _platform_of(name: str) -> str:
    return "gpu" if name in ("gpu", "cuda", "rocm", "oneapi") else name


def _refused(name: str, verdicts: Mapping[Platform, Verdict], facts: Facts) -> str:
    """Why jax fails when JAX_PLATFORMS names this; empty: it does not, or nothing is known of it."""
    if name == "gpu":  # read as cuda, rocm and oneapi, all of which must work
        return f"it takes gpu for CUDA, ROCm and oneAPI at once; write {gpu_family(facts.gpu_plugin)}"
    if name == "cuda" and not facts.gpus.nvidia:
        return ""  # passed over
    if name == "proxy":
        return ""
    wrong_family = _platform_of(name) == "gpu" and name != gpu_family(facts.gpu_plugin)
    verdict = next((each for each in verdicts.values() if each.platform == _platform_of(name)), None)
    if verdict is None:
        return f"it knows no platform {name}"
    return f"{name} does not work" if wrong_family or not verdict.usable else ""
