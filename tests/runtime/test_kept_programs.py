"""Tests of compiled programs that are kept: known by all that they are made from, and read instead of traced."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from messages import says
from sgl_jax.runtime import kept_programs
from sgl_jax.runtime.compiler import Compiled, CompileWatch, Program, compile_all
from sgl_jax.runtime.kept_programs import KeptPrograms, NoDescription, described

X = jax.ShapeDtypeStruct((3, 3), jnp.float32)


def scaled(factor: float) -> Program:
    """Return a program that refers to the factor."""
    return Program("scaled", jax.jit(lambda x: x * factor), (X,), outputs=X)


@pytest.fixture
def traced() -> Iterator[list[str]]:
    """Names of the functions that are lowered meanwhile."""
    found: list[str] = []
    listening = True

    def note(event: str, duration: float, **about: str | int) -> None:
        if listening and event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            found.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    listening = False


def compiled(program: Program, folder: Path, **environment: str) -> Compiled:
    kept, found = KeptPrograms(str(folder), jax.devices("cpu")[:1], environment), []
    with jax.default_matmul_precision("default"):
        compile_all([program], CompileWatch(), lambda done, total, each: found.append(each), kept=kept)
    return found[0]


def test_a_kept_program_is_neither_traced_nor_lowered_and_gives_the_same(tmp_path: Path, traced: list[str]) -> None:
    first, second = compiled(scaled(2.5), tmp_path), compiled(scaled(2.5), tmp_path)
    assert (first.cache_hit, second.cache_hit, len(traced)) == (False, True, 1)
    np.testing.assert_array_equal(second.call(jnp.ones((3, 3))), 2.5 * np.ones((3, 3)))


def test_a_program_made_from_anything_else_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(scaled(2.5), tmp_path)
    assert compiled(scaled(2.5), tmp_path).cache_hit
    other = scaled(3.5)
    assert not compiled(other, tmp_path).cache_hit
    np.testing.assert_array_equal(compiled(other, tmp_path).call(jnp.ones((3, 3))), 3.5 * np.ones((3, 3)))
    assert not compiled(scaled(2.5), tmp_path, XLA_FLAGS="--xla_cpu_enable_fast_math=true").cache_hit
    wider = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    assert not compiled(dataclasses.replace(scaled(2.5), args=(wider,), outputs=wider), tmp_path).cache_hit
    monkeypatch.setattr(kept_programs, "_SOURCES", "a later version")
    assert not compiled(scaled(2.5), tmp_path).cache_hit


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"x" * 1000])
def test_a_damaged_file_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage) -> None:
    compiled(scaled(2.5), tmp_path)
    (file,) = (tmp_path / "programs").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert not compiled(scaled(2.5), tmp_path).cache_hit
    assert says(caplog.text, f"{file} … read … scaled")
    assert compiled(scaled(2.5), tmp_path).cache_hit


@pytest.mark.parametrize("error", [ValueError, jax.errors.JaxRuntimeError], ids=lambda error: error.__name__)
def test_devices_that_serialise_nothing_start_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def refuse(call: jax.stages.Compiled) -> None:
        raise error("UNIMPLEMENTED")

    monkeypatch.setattr(kept_programs.serialize_executable, "serialize", refuse)
    found = compiled(scaled(2.5), tmp_path)
    np.testing.assert_array_equal(found.call(jnp.ones((3, 3))), 2.5 * np.ones((3, 3)))
    assert not (tmp_path / "programs").exists()


def test_a_file_that_may_not_be_read_hinders_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It belongs to another user, and stays."""
    compiled(scaled(2.5), tmp_path)
    (file,) = (tmp_path / "programs").iterdir()
    assert file.stat().st_mode & 0o044 == 0o044  # a server of another user may read it

    def refused(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refused)
    assert not compiled(scaled(2.5), tmp_path).cache_hit
    assert file.exists()


def test_a_folder_that_takes_nothing_hinders_nobody(tmp_path: Path) -> None:
    (tmp_path / "programs").write_text("a file")
    assert not compiled(scaled(2.5), tmp_path).cache_hit


def test_values_of_like_text_are_told_apart() -> None:
    def first() -> None: ...
    def second() -> None: ...

    class Of:
        def __init__(self, number: int):
            self.number = number

        def method(self) -> int:
            return self.number

    long = np.zeros(5000, np.float32)
    other = long.copy()
    other[2500] = 1
    pairs = [
        ((first, second, first), (first, second, second)),
        (long, other),
        (jnp.asarray(long), jnp.asarray(other)),
        ({"a": 1}, ("a", 1)),
        ([[1], 2], [[1, 2]]),
        ({1, 2}, [1, 2]),
    ]
    for one, another in pairs:
        assert described(one) != described(another)
    with pytest.raises(NoDescription):
        described(Of(1).method)  # its object shows only an address


def test_an_object_that_shows_only_its_address_has_no_description(tmp_path: Path) -> None:
    hidden = object()
    with pytest.raises(NoDescription):
        described(functools.partial(max, hidden))
    program = Program("hidden", jax.jit(lambda x: x if hidden else -x), (X,), outputs=X)
    assert not compiled(program, tmp_path).cache_hit
    assert not (tmp_path / "programs").exists()


SCRIPT = """
import json, sys, time
import jax
from sgl_jax.engine.engine import Engine
lowered = []
def note(event, duration, **about):
    if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
        lowered.append(str(about.get("fun_name")))
jax.monitoring.register_event_duration_secs_listener(note)
options = {"device": "cpu", "dtype": "float32", "chunked_prefill_size": 16, "max_running_requests": 2}
with Engine(model_path=sys.argv[1], compilation_cache_dir=sys.argv[2], **options, **json.loads(sys.argv[3])) as engine:
    params = {"temperature": 0.8, "sampling_seed": 3, "ignore_eos": True, "max_new_tokens": 24}
    ids = engine.generate(input_ids=[1, 403, 407, 261, 378], sampling_params=params)["output_ids"]
    for _ in range(2400):
        if len([name for name in lowered if "tokens_" in name]) == int(sys.argv[4]):
            break
        time.sleep(0.05)
    time.sleep(1)
print(json.dumps([ids, [name for name in lowered if "tokens_" in name or "load_" in name]]))
"""


@pytest.mark.parametrize(
    ("options", "num_steps"), [({}, 5), ({"speculative_algorithm": "NGRAM"}, 8)], ids=["plain", "speculation"]
)
def test_a_later_start_lowers_no_step_and_answers_the_same(
    stories260k: Path, tmp_path: Path, options: dict[str, str], num_steps: int
) -> None:
    """Hashes of text, and with them the order of sets, differ between the processes."""
    found = []
    for seed, steps in (("1", num_steps), ("2", 0)):
        arguments = [str(stories260k), str(tmp_path), json.dumps(options), str(steps)]
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, *arguments],
            check=True,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONHASHSEED": seed},
            timeout=240,
        )
        found.append(json.loads(run.stdout))
    (ids, lowered), (again, lowered_again) = found
    assert ids == again
    assert len(lowered) == num_steps + 4 + len(
        options
    )  # four kinds of row loads, and that of tokens where n-grams are drafted
    assert lowered_again == []
