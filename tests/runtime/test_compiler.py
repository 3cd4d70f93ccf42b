"""Tests of compilation ahead of use: in threads, in order, with the caller's settings."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import resource
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from messages import says
from sgl_jax.runtime import compiler
from sgl_jax.runtime.compiler import Compiled, CompileWatch, Program, compile_all, use_compile_cache


def product(name: str, size: int) -> Program:
    x = jax.ShapeDtypeStruct((size, size), jnp.float32)
    return Program(name, jax.jit(lambda a, b: a @ b), (x, x))


def nothing(done: int, total: int, compiled: Compiled) -> None:
    pass


def test_all_are_compiled_and_each_is_reported() -> None:
    reported = []
    calls = compile_all(
        [product(f"p{n}", n) for n in (2, 3, 4)], CompileWatch(), lambda *report: reported.append(report)
    )
    assert sorted(calls) == ["p2", "p3", "p4"]
    assert [(done, total) for done, total, _ in reported] == [(1, 3), (2, 3), (3, 3)]
    assert {compiled.program.name for _, _, compiled in reported} == {"p2", "p3", "p4"}
    assert calls["p3"](jnp.eye(3), 2 * jnp.eye(3)).tolist() == (2 * jnp.eye(3)).tolist()


def test_threads_compile_with_the_callers_matmul_precision() -> None:
    seen = []

    def look(x):
        seen.append(jax.config.jax_default_matmul_precision)
        return x

    program = Program("p", jax.jit(look), (jax.ShapeDtypeStruct((2,), jnp.float32),))
    with jax.default_matmul_precision("highest"):
        compile_all([program], CompileWatch(), nothing)
    assert seen == ["highest"]


def test_the_first_failure_is_raised() -> None:
    def broken(x):
        raise ValueError("no such program")

    programs = [Program("broken", jax.jit(broken), (jax.ShapeDtypeStruct((2,), jnp.float32),))]
    with pytest.raises(ValueError, match="no such program"):
        compile_all(programs + [product(f"p{n}", n) for n in range(2, 6)], CompileWatch(), nothing)


def test_what_has_not_begun_is_left_once_it_is_stopped() -> None:
    stopped = threading.Event()
    traced = []

    def stop(x):
        traced.append(len(traced))
        stopped.set()
        return x

    programs = [Program(f"p{n}", jax.jit(stop), (jax.ShapeDtypeStruct((n,), jnp.float32),)) for n in range(99)]
    with pytest.raises(concurrent.futures.CancelledError):
        compile_all(programs, CompileWatch(), nothing, stopped=stopped)
    assert 1 <= len(traced) <= (os.cpu_count() or 1)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_compiling_behind_is_done_by_one_thread_of_low_priority_and_not_counted() -> None:
    threads = []

    def look(x):
        threads.append((threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
        return x + 1

    watch = CompileWatch()
    programs = [Program(f"p{n}", jax.jit(look), (jax.ShapeDtypeStruct((n,), jnp.float32),)) for n in (61, 67, 71)]
    compile_all(programs, watch, nothing, behind=True)
    assert (threads, watch.count) == ([(threads[0][0], 19)] * 3, 0)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < 19
    compile_all([product("p", 73)], watch, nothing)
    assert watch.count == 1


def test_an_option_this_compiler_does_not_know_is_left_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kind = jax.devices()[0].device_kind
    monkeypatch.setitem(compiler.COMPILER_OPTIONS, kind, {"xla_no_such_option": "false"})
    calls = compile_all([product("p", 3)], CompileWatch(), nothing)
    assert calls["p"](jnp.eye(3), jnp.eye(3)).tolist() == jnp.eye(3).tolist()
    [said] = [record.getMessage() for record in caplog.records]
    assert says(said, f"xla_no_such_option … {kind}")


@pytest.fixture
def own_cache() -> Iterator[None]:
    """Puts jax's settings of the cache back after the test."""
    from jax._src import compilation_cache

    names = [f"jax_{name}" for name in ("compilation_cache_dir", "persistent_cache_min_compile_time_secs")]
    names.append("jax_persistent_cache_min_entry_size_bytes")
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_second_start_says_which_programs_were_in_the_cache(own_cache: None, tmp_path: Path) -> None:
    use_compile_cache(str(tmp_path))
    hits = []
    for size in (37, 37, 41):
        compile_all([product("p", size)], CompileWatch(), lambda i, n, compiled: hits.append(compiled.cache_hit))
        jax.clear_caches()
    assert hits == [False, True, False]


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")
def test_a_damaged_entry_of_the_cache_is_compiled_anew(own_cache: None, tmp_path: Path) -> None:
    use_compile_cache(str(tmp_path))
    hits, found = [], []
    for _ in range(2):
        calls = compile_all([product("p", 59)], CompileWatch(), lambda i, n, compiled: hits.append(compiled.cache_hit))
        found.append(calls["p"](jnp.eye(59), 2 * jnp.eye(59)).tolist())
        jax.clear_caches()
        for entry in tmp_path.glob("*-cache"):
            entry.write_bytes(entry.read_bytes()[:100] + bytes(100))
    assert (hits, found[1]) == ([False, False], found[0])


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Refuses files of more than 100 bytes, as a full disk refuses them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_cache_that_nothing_can_be_written_to_is_one_line_of_ours(own_cache: None, tmp_path: Path, caplog) -> None:
    with full_disk(), warnings.catch_warnings(record=True) as raw:
        use_compile_cache(str(tmp_path))
        for size in (43, 47):
            compile_all([product("p", size)], CompileWatch(), nothing)
        compiler.cache_takes_programs(str(tmp_path))
    assert raw == []
    [line] = caplog.messages
    assert says(line, f"--compilation-cache-dir … {tmp_path} … File too large … free space")
    assert caplog.records[0].levelname == "WARNING"


def test_a_folder_that_cannot_be_made_is_one_line_and_no_cache(own_cache: None, tmp_path: Path, caplog) -> None:
    (tmp_path / "file").touch()
    with warnings.catch_warnings(record=True) as raw:
        use_compile_cache(str(tmp_path / "file" / "programs"))
        compile_all([product("p", 53)], CompileWatch(), nothing)
    assert raw == []
    assert says(caplog.text, "--compilation-cache-dir … file/programs … Not a directory")


def test_a_bucket_is_not_tried(own_cache: None, caplog) -> None:
    use_compile_cache("gs://nobody/programs")
    assert jax.config.jax_compilation_cache_dir == "gs://nobody/programs"
    assert caplog.messages == []
