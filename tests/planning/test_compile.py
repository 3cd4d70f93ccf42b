"""The command, as it is run; and that what it compiles for this machine is what a launch then finds in the cache."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file, save_file

from messages import says
from sgl_jax import Engine
from sgl_jax import compile as command
from sgl_jax.planning import compile_command
from sgl_jax.planning.launch_programs import ProgramFacts
from sgl_jax.planning.model import read_model
from sgl_jax.settings.server_args import ServerArgs

SMALL = ["--dtype", "float32", "--max-running-requests", "1", "--chunked-prefill-size", "2", "--max-total-tokens", "64"]
NO_PART_OF_A_PROGRAM = (
    *("--port", "0", "--served-model-name", "other", "--random-seed", "7", "--schedule-policy", "lpm"),
    *("--max-queued-requests", "3", "--disable-radix-cache", "--disable-overlap-schedule", "--stream-interval", "4"),
    *(
        "--decode-log-interval",
        "5",
        "--shutdown-timeout-s",
        "1",
        "--api-key",
        "k",
        "--dp-schedule-policy",
        "round_robin",
    ),
)


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command sets up logging, the environment and jax for its process, which here is everyone's."""
    before = {name: getattr(jax.config, name) for name in ("jax_platforms", "jax_enable_compilation_cache")}
    monkeypatch.setattr(command.log, "setup", lambda level: None)
    monkeypatch.setattr(compile_command, "set_tpu_environment", lambda: None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=280, check=False)


def plan(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = command.main([*argv, "--plan"])
    return code, *capsys.readouterr()


def test_what_a_backend_refuses_while_a_program_is_traced_is_one_line(
    stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*args):
        raise ValueError("--attention-backend x cannot do sinks")

    flags = ["--model-path", str(stories260k), "--compilation-cache-dir", str(tmp_path), *SMALL]
    monkeypatch.setattr(compile_command, "compile_launch", refuses)
    assert command.main(["--topology", "cpu", *flags]) == command.BAD_USE
    assert capsys.readouterr().err.endswith("compile: error: --attention-backend x cannot do sinks\n")
    assert compile_command.compile_here(ServerArgs.from_cli(flags)) == compile_command.FAILED
    assert capsys.readouterr().err.endswith("sgl_jax: error: --attention-backend x cannot do sinks\n")


def test_a_launch_finds_what_was_compiled_before_in_the_cache(stories260k: Path, tmp_path: Path) -> None:
    flags = ["--model-path", str(stories260k), "--compilation-cache-dir", str(tmp_path), *SMALL]
    first = run("-m", "sgl_jax.launch_server", "--compile-only", *flags)
    assert first.returncode == 0, first.stderr
    lines = re.findall(r"\[\d/\d\] (.*) after \d+\.\d s \((.*)\)$", first.stderr, re.MULTILINE)
    assert sorted(lines) == [
        *[(f"load {kind}", "cache miss") for kind in ("bias", "counts", "mask", "pages")],
        *[("tokens=1 rows=1", "cache miss"), ("tokens=2 rows=1", "cache miss")],
    ]
    assert re.search(r"\b6 programs .*\b0 .*cache", first.stderr)

    launch = (
        "import sys; from sgl_jax.observability import log; from sgl_jax.settings.server_args import ServerArgs; "
        "from sgl_jax.engine.startup import build_core; log.setup(); build_core(ServerArgs.from_cli(sys.argv[1:]))"
    )
    second = run("-c", launch, *flags, *NO_PART_OF_A_PROGRAM)
    assert second.returncode == 0, second.stderr
    assert re.findall(r"\((cache \w+)\)$", second.stderr, re.MULTILINE) == ["cache hit"] * 6
    other = run("-c", launch, *flags, "--page-size", "8")
    assert other.returncode == 0, other.stderr
    found = dict(re.findall(r"\[\d/\d\] (.*) after \d+\.\d s \((.*)\)$", other.stderr, re.MULTILINE))
    assert (found["tokens=1 rows=1"], found["tokens=2 rows=1"]) == ("cache miss", "cache miss")

    again = run("-m", "sgl_jax.compile", "--topology", "cpu", "--json", "-", *flags)
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    assert [program["cache_hit"] for program in found["programs"]] == [True] * 6
    assert [program["name"] for program in found["programs"][:2]] == [step["program"] for step in found["steps"]]
    assert found["compile_seconds"] > 0


def test_an_engine_in_a_program_does_not_only_compile(stories260k: Path) -> None:
    with pytest.raises(TypeError, match="compile_here"):
        Engine(model_path=str(stories260k), compile_only=True)


def test_the_plan_as_tables(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, "--topology", "v6e-4", "--model-path", "Qwen/Qwen3-8B")
    assert code == 0
    assert says(out, "Qwen3ForCausalLM … 8.19 billion … config:Qwen3-8B")
    assert says(out, "v6e-4 … 4 chips … 4 x TPU v6e … 31.2 GiB")
    assert says(out, "KV … 688,128 tokens … 16.8 … 40,960")
    assert re.search(r"^ 256 +256 +decode .* memory +9\.65 +26,\d\d\d", out, re.MULTILINE)


def test_the_plan_lists_steps_with_drafts(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "4", "--json", "-")
    code, out, _ = plan(capsys, "--topology", "v6e-1", "--model-path", "Qwen3-8B", *flags)
    assert code == 0
    found = {(s["tokens"], s["rows"], s["width"]): s["kind"] for s in json.loads(out)["steps"]}
    assert found[16, 4, 4] == found[16, 16, 1] == "decode"
    assert found[2048, 128, 4] == "prompt"
    _, out, _ = plan(capsys, "--topology", "v6e-1", "--model-path", "Qwen3-8B", *flags[:-2])
    assert re.search(r"^ *32 +8 +decode, width 4 ", out, re.MULTILINE)


def test_the_plan_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    args = ("--topology", "v6e-4", "--model-path", "Qwen3-8B", "--context", "2048", "--json")
    code, out, _ = plan(capsys, *args, "-")
    assert code == 0
    found = json.loads(out)
    plan(capsys, *args, str(file))
    assert json.loads(file.read_text()) == found
    assert (found["parameters"], found["num_devices"], found["counted_context"]) == (8_190_735_360, 4, 2048)
    assert (found["programs"], found["compile_seconds"]) == (None, None)
    step = found["steps"][0]
    times = {limit: step[f"{limit}_seconds"] for limit in ("compute", "memory", "links")}
    assert step["least_seconds"] == max(times.values()) == times[step["limit"]]


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["--topology", "v6e-4", "--model-path", "Llama-3.1-70B"], 1, r"35.33 GB .*29.52 GB .*\nv6e-8 \(8 chips"),
        (["--topology", "v6e-5", "--model-path", "Qwen3-8B"], 2, "v6e-5.* 1, 2, 4"),
        (["--topology", "v6e-4", "--model-path", "./none"], 2, r"\./none"),
        (["--topology", "v6e-4", "--model-path", "Qwen3-8B", "--page-size", "3"], 2, "--page-size .*3"),
        (["--topology", "v6e-4", "--model-path", "Qwen3-8B", "--context", "0"], 2, "--context .*0"),
        (["--topology", "v6e-4", "--model-path", "Qwen3-8B", "--contxt", "9"], 2, "--contxt "),
        (["--model-path", "Qwen3-8B"], 2, "--topology"),
        (["--topology", "v6e-4", "--model-path", "Qwen3-8B", "--device", "cpu"], 2, "--device .*cpu.* v6e-4 .*tpu"),
        (
            ["--topology", "h200-1", "--model-path", "Qwen3-8B", "--device", "tpu"],
            2,
            "--device .*tpu.* h200-1 .*gpu",
        ),
        (["--topology", "cpu", "--model-path", "Qwen3-8B", "--device", "gpu"], 2, "--device .*gpu.* cpu .*cpu"),
        (["--topology", "v6e-4", "--model-path", "Qwen3-8B", "--compile-only"], 2, "--compile-only .*launch_server"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], argv: list[str], code: int, says: str
) -> None:
    got, out, err = plan(capsys, *argv)
    assert (got, out) == (code, "")
    assert re.search(says, err)
    assert "Traceback" not in err


def test_the_device_of_the_topology_may_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(capsys, "--topology", "v6e-4", "--model-path", "Qwen3-8B", "--device", "tpu")[0] == 0


def test_compiling_for_a_gpu_that_is_not_here_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--topology", "h200-1", "--model-path", "Qwen3-0.6B"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says(err, "compile: error: h200-1 … --plan")
    assert plan(capsys, "--topology", "h200-1", "--model-path", "Qwen3-0.6B")[0] == 0


def test_programs_that_leave_no_room_are_told_the_fraction_that_does() -> None:
    from sgl_jax.planning.fit import make_plan
    from sgl_jax.planning.model import find_model
    from sgl_jax.planning.plan_report import overflow
    from sgl_jax.planning.target import find_target
    from sgl_jax.settings.server_args import ServerArgs

    def facts(code: int, temp: int) -> ProgramFacts:
        return ProgramFacts("p", 1.0, False, code, temp, 0, 2, 0)

    def planned(**flags):
        args = ServerArgs(model_path="Qwen3-8B", **flags)
        return make_plan(args, find_model(args), find_target("v6e-4"), 1024)

    heavy = [facts(10**9, 2 * 10**9), facts(10**9, 3 * 10**9)]  # 5 GB: all code, and one program's temporaries
    assert overflow(planned(), [facts(10**7, 10**8)]) is None
    said = overflow(planned(), heavy)
    assert said is not None
    fraction = re.search(r"--mem-fraction-static (0\.\d+) makes room", said)
    assert fraction is not None
    assert overflow(planned(mem_fraction_static=float(fraction[1]) - 0.005), heavy) is None


@pytest.mark.parametrize("is_copy", [True, False])
def test_a_head_is_compiled_with_an_embedding_where_a_launch_has_one(tmp_path: Path, is_copy: bool) -> None:
    """Its tensors tell, not its config: a copy of the target's embedding is not held."""
    folder = Path(__file__).parents[1] / "data" / "eagle" / "eagle3-qwen3"
    tensors = load_file(folder / "draft" / "model.safetensors")
    embed = tensors["embed_tokens.weight"]
    tensors["embed_tokens.weight"] = embed if is_copy else embed[::-1].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(folder / "draft" / "config.json", tmp_path)
    flags = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(tmp_path)}
    args = ServerArgs(model_path=str(folder / "target"), **flags)
    found = read_model(args).config.draft
    assert found is not None
    assert found.own_embed == (not is_copy)
