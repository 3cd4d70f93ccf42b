"""Log lines: the exact texts that people paste and dashboards parse."""

from __future__ import annotations

import io
import logging
import re

import msgspec
import pytest

from messages import says
from sgl_jax.engine.messages import Stats
from sgl_jax.observability import log

STAMP = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] "


class CountingStream(io.StringIO):
    flushes = 0

    def flush(self) -> None:
        self.flushes += 1
        super().flush()


def test_lines_have_a_time_stamp_and_are_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", stream := CountingStream())
    log.setup("info")
    logging.getLogger("sgl_jax.server").info("ready in %d s", 3)
    assert re.fullmatch(STAMP + "ready in 3 s\n", stream.getvalue())
    assert stream.flushes == 1


def test_warnings_carry_their_level_and_every_line_of_a_message_its_stamp(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("info")
    logging.getLogger("sgl_jax").warning("one\ntwo")
    assert re.fullmatch(f"{STAMP}WARNING: one\n{STAMP}WARNING: two\n", capsys.readouterr().err)


def test_a_traceback_follows_its_message(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("info")
    try:
        raise KeyError("lost")
    except KeyError:
        logging.getLogger("sgl_jax").exception("step failed")
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(STAMP + "ERROR: step failed", lines[0])
    assert (lines[1], lines[-1]) == ("Traceback (most recent call last):", "KeyError: 'lost'")


def test_levels_are_ours_and_uvicorns_while_others_speak_from_warning_up(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("debug")
    for name in ("sgl_jax.engine", "jax._src.dispatch", "uvicorn.error"):
        logging.getLogger(name).debug("%s debug", name)
        logging.getLogger(name).warning("%s warning", name)
    said = [line.split("] ")[1] for line in capsys.readouterr().err.splitlines()]
    assert said == [
        "sgl_jax.engine debug",
        "WARNING: sgl_jax.engine warning",
        "WARNING: jax._src.dispatch warning",
        "uvicorn.error debug",
        "WARNING: uvicorn.error warning",
    ]


def test_level_error_silences_warnings_of_everyone(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("error")
    for name in ("sgl_jax", "uvicorn", "httpx"):
        logging.getLogger(name).warning("hidden")
    assert capsys.readouterr().err == ""


def test_a_second_setup_replaces_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("info")
    log.setup("info")
    logging.getLogger("sgl_jax").info("said")
    assert capsys.readouterr().err.count("said") == 1


def test_lines_go_to_what_stderr_is_at_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A progress bar puts something in its place, which writes above the bar."""
    log.setup("info")
    later = io.StringIO()
    monkeypatch.setattr("sys.stderr", later)
    logging.getLogger("sgl_jax").info("above")
    assert later.getvalue().endswith("above\n")


def test_an_access_line_has_status_id_tokens_and_seconds() -> None:
    client, request = ("127.0.0.1", 5), "POST /generate HTTP/1.1"
    line = log.access_line(client, request, 200, "a1", (5, 16), 0.12)
    assert line == '127.0.0.1:5 - "POST /generate HTTP/1.1" 200 id=a1 5+16 tokens 0.120 s'
    line = log.access_line(client, request, 200, "a1", (5, 16), 0.12, {"b c"})
    assert line.endswith("200 id=a1 5+16 tokens adapter=b%20c 0.120 s")
    line = log.access_line(client, request, 200, "a1", (5, 16), 0.12, {"a", "b"})
    assert line.endswith("200 id=a1 5+16 tokens adapter=a adapter=b 0.120 s")
    assert log.access_line(None, "GET /" + "a" * 600, 404, "b", None, 2) == f'- - "GET /{"a" * 507}…" 404 id=b 2.000 s'


def test_once_says_each_key_once_per_logger(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first, second = logging.Logger("first"), logging.Logger("second")
    for one in (first, second):
        one.addHandler(caplog.handler)
        for key in ("a", "b", "a"):
            log.once(one, key, f"{key} at 100 % of {one.name}")
    assert caplog.messages == [f"{key} at 100 % of {name}" for name in ("first", "second") for key in ("a", "b")]


def test_banner_counts_devices_by_kind() -> None:
    assert log.banner("0.1.0", "Qwen/Qwen3-8B", ["TPU v6 lite"] * 4) == (
        "sgl_jax 0.1.0 | model Qwen/Qwen3-8B | 4 x TPU v6 lite"
    )


def test_unused_devices_and_the_flag_that_takes_them() -> None:
    assert says(log.unused_devices_line("tpu", 1, 4, 1), "3 of 4 tpu … --tp-size 4")
    assert says(log.unused_devices_line("tpu", 2, 8, 2), "6 of 8 tpu … --tp-size 4")
    assert "--tp-size" not in (one_left := log.unused_devices_line("gpu", 3, 4, 3))
    assert says(one_left, "1 of 4 gpu")


def test_changed_args_line() -> None:
    assert "--" not in log.changed_args_line({})
    changed = log.changed_args_line({"model_path": "a b", "page_size": 16, "disable_radix_cache": True})
    assert changed.endswith(" --model-path 'a b' --page-size 16 --disable-radix-cache")


def test_weights_line() -> None:
    assert says(log.weights_line(2_000_000_000, 4.0), "1.9 GiB … 4.0 s … 476.8 MiB/s")
    assert "/s" not in (none := log.weights_line(512, 0.0))
    assert says(none, "512 B … 0.0 s")


def test_memory_table() -> None:
    table = log.memory_table(weights=270 << 20, kv=3 << 29, free=5 << 30, kv_tokens=65536, context_length=8192)
    _, *rows = table.splitlines()
    pinned = ("weights … 270.0 MiB", "KV … 1.5 GiB … 65,536 … 8.0 … 8,192", "free … 5.0 GiB")
    assert [says(row, each) for row, each in zip(rows, pinned, strict=True)] == [True] * 3


def test_compile_line() -> None:
    assert log.compile_line(3, 9, program="tokens=64 rows=16", seconds=1.23, cache_hit=True) == (
        "[3/9] tokens=64 rows=16 after 1.2 s (cache hit)"
    )
    assert log.compile_line(9, 9, program="tokens=2048 rows=256", seconds=11, cache_hit=False) == (
        "[9/9] tokens=2048 rows=256 after 11.0 s (cache miss)"
    )


def test_batch_lines_are_in_sglangs_format() -> None:
    assert log.prefill_line(Stats(num_running=3, num_waiting=1, kv_usage=0.417), 2, 300, 512) == (
        "Prefill batch. #new-seq: 2, #new-token: 300, #cached-token: 512, token usage: 0.42, #running-req: 3, #queue-req: 1"
    )
    stats = Stats(num_running=3, kv_usage=0.5, gen_throughput=81.5)
    assert log.decode_line(stats, 1200) == (
        "Decode batch. #running-req: 3, #token: 1200, token usage: 0.50, gen throughput (token/s): 81.50, #queue-req: 0"
    )
    drafts = {"spec_accept_length": 2.31, "spec_accept_rate": 0.437, "accepted_per_position": [80, 51]}
    assert log.decode_line(msgspec.structs.replace(stats, **drafts), 90) == (
        "Decode batch. #running-req: 3, #token: 90, token usage: 0.50, accept len: 2.31, accept rate: 0.44, "
        "gen throughput (token/s): 81.50, #queue-req: 0"
    )


def test_simulated_acceptance_is_said_in_capitals() -> None:
    stats = Stats(spec_accept_length=3.0, spec_accept_rate=0.667, accepted_per_position=[20])
    line = log.decode_line(stats, 90, simulated=True)
    assert ", SIMULATED accept len: 3.00, accept rate: 0.67, gen throughput" in line


def test_low_acceptance_line_names_the_model_the_limit_and_what_to_look_at() -> None:
    line = log.low_acceptance_line("org/head", 7, 210, 0.05)
    assert says(line, "7 of 210 … org/head … 5% … --speculative-draft-model-path … eagle_aux_hidden_state_layer_ids")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 19, "1.5 MiB"), (1 << 30, "1.0 GiB"), (3 << 40, "3.0 TiB")],
)
def test_size(num_bytes: int, text: str) -> None:
    assert log.size(num_bytes) == text
