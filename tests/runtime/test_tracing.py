"""Tests of the engine's use of JAX's profiler: folders, files, names, and no cost while nothing is recorded."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from sgl_jax.runtime.tracing import JaxTracer


@pytest.fixture
def tracer() -> Iterator[JaxTracer]:
    yield JaxTracer()
    try:
        jax.profiler.stop_trace()  # a process can have one profile: leave none to the next test
    except RuntimeError:
        return
    raise AssertionError("a profile was left running")


def names(files: list[str]) -> list[str]:
    """Return the names of recorded events, in order."""
    (path,) = [file for file in files if file.endswith(".trace.json.gz")]
    events = json.loads(gzip.decompress(Path(path).read_bytes()))["traceEvents"]
    spans = [event for event in events if event.get("ph") == "X"]
    return [event["name"] for event in sorted(spans, key=lambda event: event["ts"])]


def test_what_is_marked_while_recording_is_in_the_files(tracer: JaxTracer, tmp_path: Path) -> None:
    with tracer.stage("before"):
        pass
    folder = tracer.start(str(tmp_path / "new" / "folder"), None, None)
    with tracer.step(7), tracer.stage("plan"):
        pass
    files = tracer.stop()
    with tracer.stage("after"):
        pass
    assert folder == str(tmp_path / "new" / "folder")
    assert sorted(Path(file).suffix for file in files) == [".gz", ".pb"]
    assert all(Path(file).is_relative_to(folder) for file in files)
    assert [name for name in names(files) if name in ("before", "step", "plan", "after")] == ["step", "plan"]


def test_profiles_of_one_second_do_not_share_files(tracer: JaxTracer, tmp_path: Path) -> None:
    written = []
    for _ in range(2):
        tracer.start(str(tmp_path), 1, 0)
        written.append(set(tracer.stop()))
    assert not written[0] & written[1]
    assert all(Path(file).is_file() for files in written for file in files)


def test_without_a_folder_a_new_one_is_made(tracer: JaxTracer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tracer.start(None, None, None)
    tracer.stop()
    assert Path(folder).parent == tmp_path
    assert Path(folder).name.startswith("sgl-jax-profile-")


def test_folders_that_cannot_be_written(tracer: JaxTracer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        tracer.start(str(tmp_path / "file" / "folder"), None, None)
    with pytest.raises(ValueError, match="null"):
        tracer.start("a\0b", None, None)


def test_a_recording_of_somebody_else_is_left_alone(tracer: JaxTracer, tmp_path: Path) -> None:
    with jax.profiler.trace(tmp_path / "theirs"):
        with pytest.raises(RuntimeError, match="already"):
            tracer.start(str(tmp_path / "ours"), None, None)
        with tracer.stage("plan"):
            pass
    theirs = [str(path) for path in (tmp_path / "theirs").rglob("*") if path.is_file()]
    assert "plan" in names(theirs)


def test_python_calls_are_recorded_when_asked_for(tracer: JaxTracer, tmp_path: Path) -> None:
    def called_by_the_test() -> None: ...

    for level, expected in ((0, False), (1, True)):
        tracer.start(str(tmp_path), None, level)
        called_by_the_test()
        assert any("called_by_the_test" in name for name in names(tracer.stop())) is expected
