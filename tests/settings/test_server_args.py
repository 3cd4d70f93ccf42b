"""Flags: every published command line parses, precedence holds, and what cannot be honoured is refused by name."""

from __future__ import annotations

import dataclasses
import runpy
import shlex
from pathlib import Path

import pytest

from messages import says
from sgl_jax.observability import log
from sgl_jax.settings import attention_backends
from sgl_jax.settings.flag_parser import FlagError
from sgl_jax.settings.flags import HIDDEN, read_environ
from sgl_jax.settings.foreign_flags import ELSEWHERE, RENAMED
from sgl_jax.settings.server_args import (
    ENV_PREFIX,
    FLAGS,
    LOGGING,
    SERVER,
    ServerArgs,
    default_compilation_cache_dir,
)

REPOSITORY = Path(__file__).resolve().parents[2]

# As published for the server this one replaces; only flags whose feature is built.
PUBLISHED = [
    "--model-path Qwen/Qwen-7B-Chat --trust-remote-code --dist-init-addr=0.0.0.0:10011 --nnodes=1 --tp-size=1 --device=tpu "
    "--random-seed=3 --node-rank=0 --mem-fraction-static=0.8 --max-prefill-tokens=8192 --download-dir=/tmp --dtype=bfloat16 "
    "--skip-server-warmup --max-running-requests 256 --page-size 128 --attention-backend=native",
    "--model-path Qwen/Qwen3-8B --trust-remote-code --tp-size=1 --device=tpu --mem-fraction-static=0.8 "
    "--chunked-prefill-size=2048 --download-dir=/tmp --dtype=bfloat16 --max-running-requests 256 --page-size=128",
    "--model Qwen/Qwen3-8B --tensor-parallel-size 1 --enable-mixed-chunk --max-total-tokens 65536 --context-length 8192",
    "--model-path m --host 0.0.0.0 --port 30000 --api-key k --served-model-name n --tokenizer-path t --chat-template c.jinja",
    "--model-path m --device cpu --dtype float32 --schedule-policy lpm --disable-radix-cache --disable-overlap-schedule",
    "--model-path m --load-format dummy --log-level debug --decode-log-interval 1 --stream-interval 4 --shutdown-timeout-s 5 "
    "--max-queued-requests 8 --chunked-prefill-size -1 --compilation-cache-dir /cache",
    "--model-path Qwen/Qwen3-32B --tp-size 8 --nnodes 2 --node-rank 1 --dist-init-addr 10.0.0.1:10011 --device=tpu",
    "--model-path Qwen/Qwen3-32B --trust-remote-code --device=tpu --tp-size=4 --mem-fraction-static=0.8 "
    "--max-prefill-tokens=4096 --attention-backend=fa --dtype=bfloat16 --port=30000 --host=0.0.0.0 "
    "--disable-overlap-schedule --speculative-algorithm=EAGLE3 "
    "--speculative-draft-model-path=AngelSlim/Qwen3-32B_eagle3 --page-size=64 --speculative-eagle-topk=1 "
    "--speculative-num-steps=3 --speculative-num-draft-tokens=4",
]

TWO = {"nnodes": 2, "tp_size": 4, "dist_init_addr": "10.0.0.1:10011"}


@pytest.fixture(autouse=True)
def _no_cache_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)


def parse(line: str = "--model-path m", **environ: str) -> ServerArgs:
    return ServerArgs.from_cli(shlex.split(line), environ)


@pytest.mark.parametrize("line", PUBLISHED)
def test_published_command_lines_parse(line: str) -> None:
    parse(line)


def test_values_arrive_with_their_types() -> None:
    args = parse(PUBLISHED[0])
    assert args.changed() == {
        "model_path": "Qwen/Qwen-7B-Chat",
        "trust_remote_code": True,
        "dist_init_addr": "0.0.0.0:10011",
        "device": "tpu",
        "random_seed": 3,
        "mem_fraction_static": 0.8,
        "max_prefill_tokens": 8192,
        "download_dir": "/tmp",
        "dtype": "bfloat16",
        "skip_server_warmup": True,
        "max_running_requests": 256,
        "page_size": 128,
        "attention_backend": "native",
        "tp_size": 1,
    }


def test_defaults() -> None:
    args = ServerArgs(model_path="m")
    assert args.changed() == {"model_path": "m"}
    assert (args.host, args.port, args.max_prefill_tokens) == ("127.0.0.1", 30000, 16384)
    assert (args.decode_log_interval, args.stream_interval, args.shutdown_timeout_s) == (40, 1, 60)
    assert (args.device, args.page_size, args.chunked_prefill_size, args.attention_backend) == (None,) * 4
    assert args == ServerArgs.from_cli(["--model-path", "m"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"port": 70000}, "--port .*70000.* 0 .*65535"),
        ({"port": "80"}, "--port .*80.* whole number"),
        ({"port": True}, "--port .*True.* whole number"),
        ({"port": None}, "--port .*None.* whole number"),
        ({"host": ""}, "--host .*empty"),
        ({"page_size": 0}, "--page-size .*0.* power of two .*1 .*1024"),
        ({"page_size": 48}, "--page-size .*48.* power of two"),
        ({"page_size": 2048}, "--page-size .*2048.* 1024"),
        ({"mem_fraction_static": 1.0}, "--mem-fraction-static .*1.0.* 0 .*1"),
        ({"mem_fraction_static": float("nan")}, "--mem-fraction-static .*nan"),
        ({"max_running_requests": 0}, "--max-running-requests .*0.* 1"),
        ({"max_queued_requests": -1}, "--max-queued-requests .*-1.* 1"),
        (
            {"max_total_tokens": 64, "page_size": 128},
            "--max-total-tokens .*64.* --page-size .*128",
        ),
        ({"max_prefill_tokens": 0}, "--max-prefill-tokens .*0.* 1"),
        ({"chunked_prefill_size": 0}, "--chunked-prefill-size .*0.* 1.* -1"),
        ({"context_length": 1}, "--context-length .*1.* 2"),
        ({"random_seed": -1}, "--random-seed .*-1.* 0 "),
        ({"shutdown_timeout_s": float("inf")}, "--shutdown-timeout-s .*inf.* 0 .*seconds"),
        ({"decode_log_interval": 0}, "--decode-log-interval .*0.* 1"),
        ({"stream_interval": 0}, "--stream-interval .*0.* 1"),
        ({"schedule_policy": "random"}, "--schedule-policy .*random.* fcfs .*lpm"),
        ({"device": "cuda"}, "--device .*cuda.* gpu"),
        ({"device": "xpu"}, "--device .*xpu.* tpu .*gpu .*cpu"),
        ({"dtype": "float16"}, "--dtype .*float16.* bfloat16"),
        ({"dtype": "half"}, "--dtype .*half.* bfloat16"),
        ({"dtype": "int8"}, "--dtype .*int8.* auto .*float32 .*bfloat16"),
        ({"nnodes": 0}, "--nnodes .*0.* 1 .*1024"),
        ({"nnodes": 2}, "--nnodes .*2.* --dist-init-addr "),
        (
            {"tp_size": 3, "nnodes": 2, "dist_init_addr": "h:1"},
            "--tp-size .*3 .*--dp-size 1.* 3 devices.* --nnodes 2",
        ),
        (
            {"dist_init_addr": "host:65535", "nnodes": 2},
            "--dist-init-addr .*host:65535.* port ",
        ),
        ({"compile_only": True, "nnodes": 2, "dist_init_addr": "h:1"}, "--compile-only .*--nnodes 2"),
        ({"dist_timeout": -1.0}, "--dist-timeout .*-1.0.* 0 .*seconds"),
        ({"node_rank": 1}, "--node-rank .*1.* --nnodes.* 1"),
        ({"dist_init_addr": "host"}, "--dist-init-addr .*host.* port"),
        ({"dist_init_addr": "host:70000"}, "--dist-init-addr .*host:70000.* port"),
        ({"enable_mixed_chunk": False}, "--enable-mixed-chunk .*False"),
        ({"disable_radix_cache": "yes"}, "--disable-radix-cache .*yes.* true .*false"),
        ({"log_level": "verbose"}, "--log-level .*verbose.* debug .*info"),
    ],
)
def test_refused_values(given: dict[str, object], message: str) -> None:
    with pytest.raises(FlagError, match=message) as caught:
        ServerArgs(**{"model_path": "m"} | given)
    assert caught.value.flag == "--" + next(iter(given)).replace("_", "-")


def test_every_flag_refuses_a_value_of_another_type() -> None:
    for flag in FLAGS:
        with pytest.raises(FlagError, match=flag.option):
            ServerArgs(**{"model_path": "m", flag.name: [1]})


def test_python_callers_get_a_type_error_for_an_unknown_or_missing_name() -> None:
    with pytest.raises(TypeError, match="page_sizes"):
        ServerArgs(model_path="m", page_sizes=16)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="model_path"):
        ServerArgs()  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "--model-path .*missing"),
        ("--model-path m --page-sizes 16", "--page-sizes .*--page-size\\b"),
        ("--model-path m --page 16", "--page "),
        ("--model-path m --zzz", "--zzz .*--help"),
        ("--model-path m 16", "'16' .*every value"),
        ("Qwen/Qwen3-8B --port 1", "^'Qwen/Qwen3-8B' .*write --model-path Qwen/Qwen3-8B$"),
        ("--model m Qwen/Qwen3-8B", "^'Qwen/Qwen3-8B' .*every value"),
        ("--model-path m --attention-backend flashinfer", "^--attention-backend .*flashinfer.* native.* fa.* tokamax"),
        ("true --model-path m --trust-remote-code", "'true' .*flag"),
        ("--model-path m --trust-remote-code true", "^--trust-remote-code .*no value.* --no-trust-remote-code"),
        ("--model-path m --trust-remote-code=true", "^--trust-remote-code .*no value.* --no-trust-remote-code"),
        ("--model-path m --no-trust-remote-code=true", "^--no-trust-remote-code .*no value"),
        ("--model-path m --max-model-len 8", "^--max-model-len .*--context-length$"),
        ("--model-path m --gpu-memory-utilization=.9", "^--gpu-memory-utilization .*--mem-fraction-static$"),
        ("--model-path m -tp 4", "^-tp .*--tp-size$"),
        ("--model-path m --enable-metrics", "^--enable-metrics .*/metrics"),
        ("--model-path m --quantization int3", "^--quantization .*int3.* int8.* awq"),
        ("--model-path m -q gguf", "^--quantization .*gguf.* no flag"),
        ("--model-path m --lora-backend csgmv", "^--lora-backend .*matrix products"),
        ("--model-path m --log-request-headers", "^--log-request-headers .*--help"),
        ("--model-path m --port", "--port"),
        ("--model-path m --port abc", "--port .*abc.* whole number$"),
        ("--model-path m --mem-fraction-static 80%", "--mem-fraction-static .*80%.* number"),
        ("--model-path ''", "--model-path .*empty"),
    ],
)
def test_refused_command_lines(line: str, message: str) -> None:
    with pytest.raises(FlagError, match=message):
        parse(line)


MISTAKES = {
    "--speculative-num-steps 3 --speculative-eagle-topk 1": [
        "--speculative-num-steps, --speculative-eagle-topk … without --speculative-algorithm",
    ],
    "--page-size 48 --port x --dtype float16": ["--dtype … float16", "--port … x … number", "--page-size … 48 … 1024"],
    "--zzz 4 --max-num-seqs 8 --lora-dtype auto --page-size=3": [
        "--zzz … --help",
        "--max-num-seqs … --max-running-requests",
        "--lora-dtype … --dtype",
        "--page-size … 3",
    ],
    "--zzz -1 stray": ["--zzz … --help", "'stray' … every value"],
    "--zzz 4 --port 4 --yyy 4": ["--zzz … --help", "--yyy … --help"],
    "--zzz=1 --zzz=2": ["--zzz … --help", "--zzz … --help"],
}


@pytest.mark.parametrize("line", MISTAKES)
def test_all_mistakes_are_named_at_once_a_line_each(line: str) -> None:
    with pytest.raises(FlagError) as caught:
        parse(f"--model-path m {line}")
    found, expected = str(caught.value).splitlines(), MISTAKES[line]
    if len(expected) > 1:
        assert says(found.pop(0), f"{len(expected)} mistakes")
    assert [says(said, pinned) for said, pinned in zip(found, expected, strict=True)] == [True] * len(expected)


def test_mistakes_of_all_places_are_named_at_once_with_the_place(tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("tp-size: 0\nmystery: 1\n")
    with pytest.raises(FlagError) as caught:
        parse(
            f"--config {config} --port -1", SGL_JAX_PAGE_SIZE="3", SGL_JAX_ZZZ="1", SGL_JAX_SPECULATIVE_NUM_STEPS="40"
        )
    _, *found = str(caught.value).splitlines()
    assert [
        says(said, pinned)
        for said, pinned in zip(
            found,
            [
                "SGL_JAX_ZZZ",
                "server.yaml … mystery",
                "--port … -1 … 65535",
                "--page-size … 3 … 1024 … SGL_JAX_PAGE_SIZE",
                "--speculative-num-steps … 40 … 31 … SGL_JAX_SPECULATIVE_NUM_STEPS",
                "--tp-size … 0 … 1 … server.yaml",
                "--model-path … missing",
            ],
            strict=True,
        )
    ] == [True] * 7


def test_the_names_of_attention_backends_are_those_of_the_kernels() -> None:
    from sgl_jax.ops.attention import backends

    assert attention_backends.GROUP == backends.GROUP
    with pytest.raises(backends.NoSuchBackend, match=f"there are {', '.join(attention_backends._OURS)}"):
        backends.find_backend("flashinfer", "cpu", vectorise=False)


def test_no_flag_of_ours_is_taken_for_another_programs_and_what_is_named_in_its_place_is_ours() -> None:
    ours = {option for flag in FLAGS for option in flag.options}
    assert not [option for option in ours for pattern in ELSEWHERE if option == pattern]
    assert set(RENAMED.values()) <= ours
    named = {word.rstrip(",;") for said in ELSEWHERE.values() for word in said.split() if word.startswith("--")}
    assert named <= ours


def test_flags_of_other_programs_are_known_in_the_environment_and_in_a_file_too(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match=r"SGL_JAX_MAX_NUM_SEQS .*--max-running-requests"):
        parse(SGL_JAX_MAX_NUM_SEQS="4")
    config = tmp_path / "server.yaml"
    config.write_text("max_model_len: 8192")
    with pytest.raises(FlagError, match=r"server.yaml.* max_model_len .*--context-length"):
        parse(f"--model-path m --config {config}")


def test_short_names_of_the_parallel_sizes() -> None:
    args = parse("--model-path m --tp 4 --dp 2 --ep 8")
    assert (args.tp_size, args.dp_size, args.ep_size) == (4, 2, 8)


def test_help_says_what_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert says(text, "--device … `cuda` … gpu")
    assert says(text, "--dtype … `float16`, `half` … bfloat16 … `float` … float32")
    assert text.count("overflows") == 1


def test_the_defaults_that_are_told_are_the_platforms() -> None:
    from sgl_jax.runtime.platform import PLATFORMS

    told = {flag.name: flag.about.unset for flag in FLAGS}
    tpu, gpu, cpu = (PLATFORMS[name] for name in ("tpu", "gpu", "cpu"))
    for name, value in (
        ("mem_fraction_static", "mem_fraction"),
        ("max_running_requests", "max_running_requests"),
        ("chunked_prefill_size", "chunked_prefill_size"),
    ):
        assert getattr(tpu, value) == getattr(gpu, value)
        assert told[name].startswith(f"{getattr(tpu, value)}, on CPU {getattr(cpu, value)}")
    assert {each.page_size for each in (tpu, gpu, cpu)} == {16}
    assert told["page_size"].endswith("else 16")


def test_command_line_wins_over_environment_over_config_file_over_defaults(tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("page-size: 1\nport: 1\nstream_interval: 1\nmodel: from-config\ndecode-log-interval: 7\n")
    args = parse(
        f"--config {config} --page-size 4", SGL_JAX_PAGE_SIZE="2", SGL_JAX_PORT="2", SGL_JAX_STREAM_INTERVAL=""
    )
    assert (args.page_size, args.port, args.stream_interval, args.model_path) == (4, 2, 1, "from-config")
    assert (args.decode_log_interval, args.max_prefill_tokens) == (7, 16384)
    assert parse("", SGL_JAX_CONFIG=str(config)).port == 1


def test_a_switch_set_elsewhere_can_be_taken_back(tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("disable-radix-cache: true\nskip-server-warmup: yes\ntrust-remote-code: no\n")
    args = parse(f"--model-path m --config {config} --no-disable-radix-cache", SGL_JAX_TRUST_REMOTE_CODE="1")
    assert (args.disable_radix_cache, args.skip_server_warmup, args.trust_remote_code) == (False, True, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("page-sizes: 16", "server.yaml.* page-sizes .*page-size"),
        ("page_size: 16\npage-size: 16", "server.yaml.* page-size .*twice"),
        ("tp-size: 1\ntensor-parallel-size: 1", "server.yaml.* tp-size .*twice"),
        ("config: other.yaml", "server.yaml.* key config "),
        ("page-size: 48", "--page-size .*48.* power of two .*server.yaml"),
        ("port: [1]", "--port .*\\[1\\].* whole number"),
        ("served-model-name: 7", "--served-model-name .*7.* text"),
        ("- page-size", "server.yaml.* 'page-size: 16'"),
        ("a: [", "server.yaml.* YAML"),
    ],
)
def test_refused_config_files(tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(text)
    with pytest.raises(FlagError, match=message):
        parse(f"--model-path m --config {config}")


def test_config_files_may_be_empty_and_hold_nulls_but_must_exist(tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("# nothing yet\n")
    assert parse(f"--model-path m --config {config}").changed() == {"model_path": "m"}
    config.write_text("page-size: null\n")
    assert parse(f"--model-path m --config {config}").page_size is None
    with pytest.raises(FlagError, match=r"--config .*absent.yaml.* No such file"):
        parse(f"--model-path m --config {tmp_path / 'absent.yaml'}")


def test_every_flag_can_be_set_by_its_environment_variable() -> None:
    for flag in FLAGS:
        variable = f"SGL_JAX_{flag.name.upper()}"
        assert read_environ(FLAGS, {variable: "text"}, ENV_PREFIX, []) == {flag.name: "text"}


def test_refused_environment_variables() -> None:
    with pytest.raises(FlagError, match=r"SGL_JAX_PAGESIZE .*SGL_JAX_PAGE_SIZE"):
        parse(SGL_JAX_PAGESIZE="16")
    with pytest.raises(FlagError, match=r"--port .*x.* whole number .*SGL_JAX_PORT"):
        parse(SGL_JAX_PORT="x")
    assert parse(PAGE_SIZE="16", sgl_jax_page_size="16").page_size is None


def test_what_kubernetes_writes_about_services_is_not_taken_for_flags() -> None:
    args = parse(
        SGL_JAX_PORT="tcp://10.0.0.1:80",
        SGL_JAX_SERVICE_HOST="10.0.0.1",
        SGL_JAX_SERVICE_PORT="80",
        SGL_JAX_SERVICE_PORT_HTTP="80",
        SGL_JAX_PORT_80_TCP="tcp://10.0.0.1:80",
        SGL_JAX_PORT_80_TCP_PROTO="tcp",
        SGL_JAX_PORT_80_TCP_PORT="80",
        SGL_JAX_PORT_80_TCP_ADDR="10.0.0.1",
        SGL_JAX_ROUTER_PORT="tcp://10.0.0.2:80",
        SGL_JAX_ROUTER_SERVICE_HOST="10.0.0.2",
    )
    assert args.port == 30000


def test_compilation_cache_dir_follows_jax_then_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_compilation_cache_dir({}) == "/home/someone/.cache/sgl_jax"
    assert default_compilation_cache_dir({"XDG_CACHE_HOME": "relative"}) == "/home/someone/.cache/sgl_jax"
    assert default_compilation_cache_dir({"XDG_CACHE_HOME": "/c"}) == "/c/sgl_jax"
    both = {"XDG_CACHE_HOME": "/c", "JAX_COMPILATION_CACHE_DIR": "gs://bucket/c"}
    assert parse(**both).compilation_cache_dir == "gs://bucket/c"
    assert parse("--model-path m --compilation-cache-dir ~/x", **both).compilation_cache_dir == "/home/someone/x"


def test_notices_say_what_was_accepted_without_effect() -> None:
    assert ServerArgs(model_path="m").notices() == {}
    notices = parse(PUBLISHED[0]).notices()
    assert list(notices) == ["--trust-remote-code", "--dist-init-addr"]
    assert "never run" in notices["--trust-remote-code"]


def test_machines_that_nothing_keeps_apart_from_strangers_are_a_notice() -> None:
    assert list(ServerArgs(model_path="m", **TWO).notices()) == ["--dist-token"]
    idle = ServerArgs(model_path="m", enable_sequence_parallel=True, dp_schedule_policy="round_robin")
    assert list(idle.notices()) == ["--enable-sequence-parallel", "--dp-schedule-policy"]
    busy = ServerArgs(
        model_path="m", enable_sequence_parallel=True, tp_size=2, dp_schedule_policy="round_robin", dp_size=2
    )
    assert busy.notices() == {}
    assert ServerArgs(model_path="m", dist_token="s", **TWO).notices() == {}


def test_what_may_differ_between_machines_is_what_only_one_of_them_uses() -> None:
    differ = {each.name for each in FLAGS if each.about.per_host}
    assert {each.name for each in FLAGS if each.about.group in (SERVER, LOGGING)} <= differ
    assert not differ & {"dtype", "load_format", "context_length", "random_seed", "page_size", "tp_size", "nnodes"}
    assert {"model_path", "node_rank", "dist_init_addr", "dist_token", "compilation_cache_dir"} <= differ


def test_secrets_are_never_shown() -> None:
    args = parse("--model-path m --api-key hunter2")
    assert args.api_key == "hunter2"
    assert args.to_dict()["api_key"] == args.changed()["api_key"] == HIDDEN
    assert "hunter2" not in repr(args)
    assert ServerArgs(model_path="m").to_dict()["api_key"] is None
    with pytest.raises(FlagError) as caught:
        ServerArgs(model_path="m", api_key=123456)  # type: ignore[arg-type]
    assert "123456" not in str(caught.value)


def test_changed_args_printed_as_a_command_line_parse_to_the_same() -> None:
    args = parse(
        "--model-path 'a model' --page-size 16 --disable-radix-cache --dtype float32 --chunked-prefill-size -1"
    )
    line = log.changed_args_line(args.changed()).removeprefix("Arguments: ")
    assert parse(line) == args


def test_args_are_frozen_and_rebuild_from_their_fields() -> None:
    args = parse(PUBLISHED[3])
    assert ServerArgs(**dataclasses.asdict(args)) == args
    with pytest.raises(dataclasses.FrozenInstanceError):
        args.port = 1  # type: ignore[misc]


def test_every_flag_is_described_in_the_committed_documentation() -> None:
    """Fails after a flag changes until `python docs/generate.py` has run."""
    markdown = runpy.run_path(str(REPOSITORY / "docs" / "generate.py"))["server_arguments"]()
    assert (REPOSITORY / "docs" / "server_arguments.md").read_text(encoding="utf-8") == markdown
    for flag in FLAGS:
        assert f"`{flag.option}`" in markdown
