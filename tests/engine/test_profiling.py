"""Profiles: started, stopped, ended after a number of complete steps, refused; and the stages of a step."""

from __future__ import annotations

import time

import pytest

from fakes.fake_runner import FakeRunner
from fakes.fake_tracer import DEFAULT, FULL, UNWRITABLE, FakeTracer
from messages import says
from sgl_jax.engine.core import Core
from sgl_jax.engine.messages import (
    Abort,
    Generate,
    GetProfile,
    ProfileAnswer,
    ProfileStatus,
    Refused,
    StartProfile,
    StopProfile,
)
from sgl_jax.engine.profiling import MOST_BYTES, MOST_SECONDS, MOST_STEPS, Profiler
from sgl_jax.request import SamplingParams
from simulated import make_core


@pytest.fixture
def tracer() -> FakeTracer:
    return FakeTracer()


@pytest.fixture
def profiler(tracer: FakeTracer) -> Profiler:
    return Profiler(tracer)


def ask(profiler: Profiler, command: StartProfile | StopProfile | GetProfile) -> ProfileStatus:
    answer = profiler.handle(command)
    assert isinstance(answer, ProfileAnswer)
    assert answer.call == command.call
    return answer.status


def refusal(profiler: Profiler, command: StartProfile | StopProfile) -> tuple[str, str]:
    answer = profiler.handle(command)
    assert isinstance(answer, Refused)
    assert answer.call == command.call
    return answer.message, answer.param


def stop(profiler: Profiler, call: int) -> ProfileAnswer | Refused:
    """End the profile, and return the answer that comes when it is written."""
    assert profiler.handle(StopProfile(call)) is None
    (answer,) = written(profiler)
    assert answer.call == call
    return answer


def written(profiler: Profiler) -> list[ProfileAnswer | Refused]:
    """Wait for the profile's files, and return the answers to stops."""
    deadline = time.monotonic() + 60
    answers: list[ProfileAnswer | Refused] = []
    while profiler.writing:
        assert time.monotonic() < deadline
        answers += profiler.poll()
    return answers


def run_steps(profiler: Profiler, n: int) -> None:
    for _ in range(n):
        profiler.launched()
        profiler.collected()


def test_from_start_to_stop(profiler: Profiler, tracer: FakeTracer) -> None:
    assert ask(profiler, GetProfile(1)) == ProfileStatus()
    started = ask(profiler, StartProfile(2, "/traces", None, 3, 1))
    assert (started.running, started.output_dir, started.files) == (True, "/traces", [])
    assert started.started_at > 1.7e9
    assert tracer.options == (3, 1)
    run_steps(profiler, 4)
    assert ask(profiler, GetProfile(3)).steps_done == 4
    answer = stop(profiler, 4)
    assert isinstance(answer, ProfileAnswer)
    stopped = answer.status
    assert (stopped.running, stopped.steps_done, stopped.files) == (False, 4, ["/traces/fake.xplane.pb"])
    run_steps(profiler, 1)
    assert ask(profiler, GetProfile(5)) == stopped


def test_so_many_complete_steps_and_no_more(profiler: Profiler, tracer: FakeTracer) -> None:
    profiler.launched()  # in flight already when the profile starts: not wholly in it
    ask(profiler, StartProfile(1, num_steps=2))
    for _ in range(2):
        profiler.launched()
        profiler.collected()
        assert ask(profiler, GetProfile(1)).running
    profiler.launched()
    profiler.collected()
    assert written(profiler) == []
    ended = ask(profiler, GetProfile(1))
    assert (ended.running, ended.steps_done, ended.num_steps, tracer.num_stopped) == (False, 2, 2, 1)
    assert ended.files == [f"{DEFAULT}/fake.xplane.pb"]
    assert says(ended.ended, "2 steps")
    ask(profiler, StartProfile(2))
    assert ask(profiler, GetProfile(2)).steps_done == 0


def test_one_at_a_time(profiler: Profiler) -> None:
    ask(profiler, StartProfile(1, "/traces"))
    run_steps(profiler, 3)
    message, param = refusal(profiler, StartProfile(2))
    assert says(message, "profile … 3 steps … /traces … stop")
    assert param == ""
    answer = stop(profiler, 3)
    assert isinstance(answer, ProfileAnswer)
    assert answer.status.steps_done == 3


def test_steps_go_on_while_a_profile_is_written(profiler: Profiler, tracer: FakeTracer) -> None:
    """Every stop is answered once the files are there; until then the profile is the one that runs."""
    tracer.may_write.clear()
    ask(profiler, StartProfile(1, "/traces"))
    run_steps(profiler, 2)
    assert [profiler.handle(StopProfile(call)) for call in (2, 3)] == [None, None]
    run_steps(profiler, 3)
    assert profiler.poll() == []
    status = ask(profiler, GetProfile(4))
    assert (status.running, status.steps_done, status.ended) == (True, 2, "it was stopped")
    assert refusal(profiler, StartProfile(5))[1] == ""
    tracer.may_write.set()
    assert [answer.call for answer in written(profiler)] == [2, 3]
    assert ask(profiler, GetProfile(6)).files == ["/traces/fake.xplane.pb"]
    assert tracer.num_stopped == 1


def test_a_profile_without_a_number_of_steps_ends_at_a_limit(
    profiler: Profiler, tracer: FakeTracer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended() -> str:
        written(profiler)
        status = ask(profiler, GetProfile(9))
        assert not status.running
        return status.ended

    ask(profiler, StartProfile(1))
    run_steps(profiler, MOST_STEPS)
    assert says(ended(), f"{MOST_STEPS} steps")

    ask(profiler, StartProfile(2, num_steps=7))
    tracer.grown = MOST_BYTES
    assert profiler.poll() == []
    assert not profiler.writing
    tracer.grown += 1
    profiler.poll()
    assert says(ended(), f"{MOST_BYTES >> 20} MiB")
    tracer.grown = 0

    ask(profiler, StartProfile(3, num_steps=7))
    started = time.time()
    monkeypatch.setattr("time.time", lambda: started + MOST_SECONDS + 1)
    profiler.poll()
    assert says(ended(), f"{MOST_SECONDS:.0f} s")


def test_stopping_what_does_not_run(profiler: Profiler) -> None:
    assert refusal(profiler, StopProfile(1)) == ("no profile is running", "")
    ask(profiler, StartProfile(2, "/traces", num_steps=1))
    run_steps(profiler, 1)
    written(profiler)
    message, _ = refusal(profiler, StopProfile(3))
    assert says(message, "no profile … 1 steps … /traces")


def test_a_folder_that_cannot_be_written(tracer: FakeTracer) -> None:
    message, param = refusal(Profiler(tracer), StartProfile(1, UNWRITABLE))
    assert says(message, "output_dir … /unwritable … Permission denied")
    assert param == "output_dir"
    message, _ = refusal(Profiler(tracer, default_folder=UNWRITABLE), StartProfile(1))
    assert says(message, "output_dir … --profiler-dir … /unwritable")


def test_the_request_s_folder_then_the_flag_s_then_a_new_one(tracer: FakeTracer) -> None:
    profiler = Profiler(tracer, default_folder="/default")
    folders = []
    for command in (StartProfile(1, "/asked"), StartProfile(1)):
        folders.append(ask(profiler, command).output_dir)
        profiler.close()
    folders.append(ask(Profiler(tracer), StartProfile(1)).output_dir)
    assert folders == ["/asked", "/default", DEFAULT]


def test_a_recording_that_somebody_else_started(tracer: FakeTracer) -> None:
    tracer.start(None, None, None)
    message, param = refusal(Profiler(tracer), StartProfile(1))
    assert (says(message, ": another profile runs"), param) == (True, "")


@pytest.mark.parametrize("num_steps", [None, 1])
def test_a_profile_that_cannot_be_written_ends_all_the_same(profiler: Profiler, num_steps: int | None) -> None:
    ask(profiler, StartProfile(1, FULL, num_steps))
    run_steps(profiler, 1)
    refused = stop(profiler, 2) if num_steps is None else written(profiler)
    status = ask(profiler, GetProfile(3))
    assert (status.running, status.files) == (False, [])
    assert says(status.error, f"{FULL}: [Errno 28]")
    assert refused in ([], Refused(2, status.error))
    assert ask(profiler, StartProfile(4)).error == ""


def test_closing_writes_what_runs(profiler: Profiler, tracer: FakeTracer) -> None:
    profiler.close()
    assert tracer.num_stopped == 0
    ask(profiler, StartProfile(1))
    profiler.close()
    assert tracer.num_stopped == 1
    assert ask(profiler, GetProfile(2)).files


def traced_core(overlap: bool) -> tuple[Core, FakeTracer]:
    core = make_core(overlap=overlap)
    runner = core.runner
    assert isinstance(runner, FakeRunner)
    return core, runner.tracer


STEP = ["plan", "dispatch"]
TAKE = ["collect", "process"]


def test_stages_of_a_step() -> None:
    core, tracer = traced_core(overlap=False)
    core.handle(StartProfile(1, num_steps=2))
    core.handle(Generate(1, [5, 6], SamplingParams(max_tokens=3)))
    while core.busy:
        core.step()
    assert tracer.spans == ["step 0", *STEP, *TAKE, "step 1", *STEP, *TAKE]


def test_with_overlap_a_profile_ends_when_its_last_step_is_complete() -> None:
    core, tracer = traced_core(overlap=True)
    core.handle(StartProfile(1, num_steps=2))
    core.handle(Generate(1, [5, 6], SamplingParams(max_tokens=5)))
    while core.busy:
        core.step()
    assert tracer.spans == ["step 0", *STEP, "step 1", *STEP, *TAKE, "step 2", *STEP, *TAKE]


def test_a_running_profile_changes_no_token() -> None:
    tokens = []
    for profiled in (False, True):
        core, _ = traced_core(overlap=True)
        if profiled:
            core.handle(StartProfile(1))
        core.handle(Generate(1, [5, 6], SamplingParams(max_tokens=9, ignore_eos=True)))
        found: list[int] = []
        while core.busy:
            for event in core.step():
                found += getattr(event, "tokens", [])
        tokens.append(found)
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 9


def test_answers_come_while_requests_run_and_after_an_abort() -> None:
    core, _ = traced_core(overlap=True)
    core.handle(Generate(1, [5, 6], SamplingParams(max_tokens=30, ignore_eos=True)))
    core.handle(StartProfile(7))
    assert isinstance(core.step()[0], ProfileAnswer)
    core.handle(Abort([1]))
    core.handle(StopProfile(8))
    answers: list[ProfileAnswer] = []
    while core.busy:
        answers += [event for event in core.step() if isinstance(event, ProfileAnswer)]
    assert [answer.call for answer in answers] == [8]
    core.close()
