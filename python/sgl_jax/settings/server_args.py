"""Every flag of the server, declared once: the command line, its help, the environment, the config file and the
documentation are all derived from the fields of ServerArgs. The only module that reads the environment.

Imports nothing heavy. A value that depends on the device stays None here; runtime/ decides it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sgl_jax import __version__
from sgl_jax.settings.flag_parser import FlagError
from sgl_jax.settings.flags import (
    About,
    Rule,
    Setting,
    at_least,
    between,
    flag,
    flags_of,
    read_command_line,
    read_config,
    read_environ,
    required,
    variable_name,
)
from sgl_jax.settings.foreign_flags import ELSEWHERE, flags_not_built
from sgl_jax.settings.hub import MODELSCOPE, Downloads

ENV_PREFIX = "SGL_JAX_"

MODEL = "Model and tokenizer"
SERVER = "HTTP server"
DEVICE = "Device and memory"
SCHEDULING = "Scheduling"
COMPILING = "Kernels and compiling"
PARALLEL = "Several devices and machines"
SPECULATIVE = "Speculative decoding"
LOGGING = "Logging and profiling"

_NO_FLOAT16 = "float16 overflows in models trained in bfloat16, and TPUs do not have it; use bfloat16"
_IN_0_1 = Rule(lambda value: 0 < value < 1, "above 0 and below 1")
_NOT_NEGATIVE = Rule(lambda value: 0 <= value < float("inf"), "0 or more seconds")
_PAGE_SIZE = Rule(lambda value: 1 <= value <= 1024 and value & (value - 1) == 0, "a power of two between 1 and 1024")
_CHUNK = Rule(lambda value: value == -1 or value >= 1, "at least 1, or -1 for no limit of its own")
_HOST_PORT = Rule(
    lambda value: (match := re.fullmatch(r".+:(\d{1,5})", value)) is not None and 0 < int(match[1]) < 65536,
    "an address and a port, as in 10.0.0.1:10011",
)


def environment() -> dict[str, str]:
    """A copy of this process's environment, for those who report it or pass it on: they take it as an argument."""
    return dict(os.environ)


def default_compilation_cache_dir(environ: Mapping[str, str] | None = None) -> str:
    """JAX's own variable if it is set, else a folder of this user's cache."""
    environ = os.environ if environ is None else environ
    if chosen := environ.get("JAX_COMPILATION_CACHE_DIR"):
        return chosen
    base = environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG rules: a relative path counts as unset
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "sgl_jax")


@dataclass(frozen=True, kw_only=True)
class ServerArgs:
    """The user's flags, checked. None means: decided at start, from the model and the devices."""

    # --- model and tokenizer
    model_path: str = required(
        About(
            MODEL,
            "a folder with safetensors, a .gguf file, a hub id, or config:NAME with --load-format dummy",
            aliases=("--model",),
            metavar="PATH",
            per_host=True,  # the files are compared
        )
    )
    tokenizer_path: str | None = flag(
        None, MODEL, "a folder, a .gguf file or a hub id", unset="the model's", metavar="PATH", per_host=True
    )
    trust_remote_code: bool = flag(
        False, MODEL, "accepted, with no effect: code from a model folder is never run", per_host=True
    )
    served_model_name: str | None = flag(
        None, MODEL, "the model's name in the API", unset="as --model-path", metavar="NAME", per_host=True
    )
    context_length: int | None = flag(
        None, MODEL, "tokens of prompt and output one request may hold", unset="the model's", rule=at_least(2)
    )
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto",
        MODEL,
        "type of weights and KV cache; auto chooses for model and device",
        refused={"float16": _NO_FLOAT16, "half": _NO_FLOAT16, "float": "write float32"},
    )
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = flag(
        "auto", MODEL, "where weights come from; auto looks at the files, dummy makes random ones"
    )
    model_package: str | None = flag(
        None,
        MODEL,
        "a Python module with a model family of your own (docs/features/add_a_model.md)",
        unset="our families and those of installed packages",
        metavar="MODULE",
    )
    download_dir: str | None = flag(
        None, MODEL, "where downloaded models are kept", unset="the source's own cache", metavar="PATH", per_host=True
    )
    download_source: Literal["huggingface", "modelscope"] = flag(
        "huggingface", MODEL, "where a model that is named by its id is fetched from", per_host=True
    )
    chat_template: str | None = flag(
        None,
        MODEL,
        "the Jinja template of chat prompts: a file, or chatml, gemma, llama-3 or qwen",
        unset="the model's",
        metavar="FILE",
        per_host=True,
    )
    random_seed: int | None = flag(
        None,
        MODEL,
        "seed of sampling where a request gives none, and of dummy weights",
        unset="different at each start, dummy weights always the same",
        rule=between(0, 2**63 - 1),
    )

    # --- HTTP server
    host: str = flag(
        "127.0.0.1", SERVER, "address to listen on; 0.0.0.0 is every network", metavar="ADDRESS", per_host=True
    )
    port: int = flag(30000, SERVER, "port to listen on; 0 takes any free one", rule=between(0, 65535), per_host=True)
    api_key: str | None = flag(
        None,
        SERVER,
        "the bearer token clients must send (better set by its environment variable: command lines are public)",
        unset="none needed",
        metavar="KEY",
        secret=True,
        per_host=True,
    )
    stream_interval: int = flag(1, SERVER, "tokens per streamed chunk after the first", rule=at_least(1), per_host=True)
    skip_server_warmup: bool = flag(
        False,
        SERVER,
        "skip the one request the server sends itself before it is ready; programs are compiled anyway",
        per_host=True,
    )
    shutdown_timeout_s: float = flag(
        60.0,
        SERVER,
        "seconds that running requests get to finish after SIGTERM",
        metavar="SECONDS",
        rule=_NOT_NEGATIVE,
        per_host=True,
    )

    # --- device and memory
    device: Literal["tpu", "gpu", "cpu"] | None = flag(
        None, DEVICE, "where the model runs", unset="the best present", refused={"cuda": "write gpu"}
    )
    mem_fraction_static: float | None = flag(
        None,
        DEVICE,
        "share of the device's memory for weights and KV cache",
        unset="0.88, on CPU 0.4",
        metavar="SHARE",
        rule=_IN_0_1,
    )
    max_total_tokens: int | None = flag(
        None,
        DEVICE,
        "tokens of KV cache",
        unset="as many as the memory holds; on CPU, unless --mem-fraction-static is given, 65536 or one full context",
        rule=at_least(1),
    )
    page_size: int | None = flag(
        None,
        DEVICE,
        "tokens per page, the unit of prefix sharing",
        unset="128 with the fa kernels, else 16",
        rule=_PAGE_SIZE,
    )
    disable_radix_cache: bool = flag(False, DEVICE, "never reuse the KV of a shared prefix")

    # --- scheduling
    schedule_policy: Literal["fcfs", "lpm"] = flag(
        "fcfs", SCHEDULING, "who is admitted first: first come, or longest prefix match"
    )
    max_running_requests: int | None = flag(
        None,
        SCHEDULING,
        "requests in one step",
        unset="256, on CPU 32; less if the KV cache is small",
        rule=at_least(1),
    )
    max_queued_requests: int | None = flag(
        None,
        SCHEDULING,
        "requests (each of n counts) without a first token, above which new ones get a 429",
        unset="no limit",
        rule=at_least(1),
    )
    chunked_prefill_size: int | None = flag(
        None,
        SCHEDULING,
        "most prompt tokens in a step; --max-prefill-tokens counts if it is smaller, or with -1",
        unset="2048, on CPU 256",
        rule=_CHUNK,
    )
    max_prefill_tokens: int = flag(
        16384, SCHEDULING, "most prompt tokens in a step where --chunked-prefill-size allows more", rule=at_least(1)
    )
    enable_mixed_chunk: bool = flag(
        True,
        SCHEDULING,
        "prompts and decodes share steps, always",
        refused={"False": "steps are always shared, leave the flag out"},
    )
    disable_overlap_schedule: bool = flag(
        False, SCHEDULING, "plan a step only when the tokens of the one before have arrived"
    )

    # --- kernels and compiling
    attention_backend: str | None = flag(
        None,
        COMPILING,
        "how attention is computed: Pallas kernels (fa, on TPU), plain XLA (native), or a backend of an installed package",
        unset="the best one for the device",
    )
    compilation_cache_dir: str = flag(
        default_compilation_cache_dir,
        COMPILING,
        "where compiled programs are kept between starts",
        unset="$JAX_COMPILATION_CACHE_DIR, else ~/.cache/sgl_jax",
        metavar="PATH",
        per_host=True,
    )

    compile_only: bool = flag(
        False, COMPILING, "compile every program for this machine's devices into the cache, and exit"
    )

    # --- several devices and machines
    tp_size: int | None = flag(
        None,
        PARALLEL,
        "devices each layer is divided over",
        unset="1; sgl_jax.compile takes all of a topology",
        rule=at_least(1),
        aliases=("--tensor-parallel-size", "--tp"),
    )
    dp_size: int = flag(
        1,
        PARALLEL,
        "groups of --tp-size devices that attend to requests of their own; MLPs and experts are divided over all of them",
        rule=at_least(1),
        aliases=("--data-parallel-size", "--dp"),
    )
    dp_schedule_policy: Literal["cache_aware", "fewest_running", "round_robin"] = flag(
        "cache_aware", PARALLEL, "which of the groups takes a request"
    )
    ep_size: int = flag(
        1,
        PARALLEL,
        "groups of devices that the experts are spread over; within a group each expert is divided",
        rule=at_least(1),
        aliases=("--expert-parallel-size", "--ep"),
    )
    enable_sequence_parallel: bool = flag(
        False, PARALLEL, "divide the tokens between attention and MLP, too, over the devices of a group"
    )
    nnodes: int = flag(1, PARALLEL, "machines, each with an equal share of the devices", rule=between(1, 1024))
    node_rank: int = flag(0, PARALLEL, "which of the machines this is", rule=at_least(0), per_host=True)
    dist_init_addr: str | None = flag(
        None,
        PARALLEL,
        "address and port of machine 0",
        unset="not needed with one machine",
        metavar="HOST:PORT",
        rule=_HOST_PORT,
        per_host=True,
    )

    dist_token: str | None = flag(
        None,
        PARALLEL,
        "the secret by which the machines know each other (better set by its environment variable)",
        unset="none: whoever reaches the port can join",
        metavar="TOKEN",
        secret=True,
        per_host=True,  # it is proved, not sent
    )
    dist_timeout: float = flag(
        300.0,
        PARALLEL,
        "seconds to wait for the other machines at start",
        metavar="SECONDS",
        rule=_NOT_NEGATIVE,
        per_host=True,
    )

    # --- speculative decoding
    speculative_algorithm: str | None = flag(None, SPECULATIVE, "how tokens are drafted", unset="off", metavar="NAME")
    speculative_draft_model_path: str | None = flag(None, SPECULATIVE, "the draft model", unset="none", metavar="PATH")
    speculative_num_steps: int | None = flag(None, SPECULATIVE, "draft steps", unset="none")
    speculative_eagle_topk: int | None = flag(None, SPECULATIVE, "branches per draft step", unset="none")
    speculative_num_draft_tokens: int | None = flag(None, SPECULATIVE, "draft tokens to verify", unset="none")

    # --- logging
    log_level: Literal["debug", "info", "warning", "error", "critical"] = flag(
        "info", LOGGING, "what is logged", per_host=True
    )
    profiler_dir: str | None = flag(
        None,
        LOGGING,
        "where /start_profile writes if the request names no folder",
        unset="a new folder among the temporary files",
        metavar="PATH",
        per_host=True,
    )
    decode_log_interval: int = flag(
        40, LOGGING, "decode steps between two 'Decode batch' lines", rule=at_least(1), per_host=True
    )

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises FlagError for the first value that cannot be honoured. Runs at construction."""
        for each in FLAGS:
            each.check(getattr(self, each.name))
        if self.node_rank >= self.nnodes:
            raise FlagError(
                "--node-rank", f"--node-rank is {self.node_rank}; it must be below --nnodes, which is {self.nnodes}"
            )
        if self.nnodes > 1:
            self._check_machines()
        tokens, page_size = self.max_total_tokens, self.page_size
        if tokens is not None and page_size is not None and tokens < page_size:
            raise FlagError(
                "--max-total-tokens",
                f"--max-total-tokens is {tokens}; it must hold a page, and --page-size is {page_size}",
            )

    def _check_machines(self) -> None:
        if self.dist_init_addr is None:
            raise FlagError(
                "--nnodes",
                f"--nnodes is {self.nnodes}; --dist-init-addr must say where machine 0 is, as HOST:PORT",
            )
        if self.dist_init_addr.endswith(":65535"):
            raise FlagError(
                "--dist-init-addr", f"--dist-init-addr is {self.dist_init_addr}; the port above it is needed, too"
            )
        if self.compile_only:
            raise FlagError(
                "--compile-only",
                f"--compile-only cannot be had with --nnodes {self.nnodes}: programs over several machines are compiled "
                "when all of them have started",
            )
        if self.num_devices % self.nnodes:
            raise FlagError(
                "--tp-size",
                f"--tp-size is {self.tp_size or 1} and --dp-size {self.dp_size}: {self.num_devices} devices, which "
                f"--nnodes {self.nnodes} machines cannot share evenly",
            )

    def notices(self) -> dict[str, str]:
        """By flag: what the user should hear once about a value that was accepted and changes nothing."""
        found = {}
        if self.trust_remote_code:
            found["--trust-remote-code"] = (
                "--trust-remote-code has no effect: models run on our own code, code from a model folder is never run."
            )
        if self.dist_init_addr is not None and self.nnodes == 1:
            found["--dist-init-addr"] = "--dist-init-addr is not used: there is one machine (--nnodes 1)."
        if self.enable_sequence_parallel and self.tp_size in (None, 1):
            found["--enable-sequence-parallel"] = "--enable-sequence-parallel has no effect with --tp-size 1."
        if self.dp_size == 1 and self.dp_schedule_policy != "cache_aware":
            found["--dp-schedule-policy"] = "--dp-schedule-policy has no effect with --dp-size 1."
        if self.nnodes > 1 and self.dist_token is None:
            found["--dist-token"] = (
                "There is no --dist-token: whoever reaches the port of --dist-init-addr can join as one of the machines."
            )
        return found

    @property
    def num_devices(self) -> int:
        return (self.tp_size or 1) * self.dp_size

    @property
    def downloads(self) -> Downloads:
        """The source of named models. ModelScope's own variables are honoured, as the Hugging Face library does with its."""
        domain = os.environ.get("MODELSCOPE_DOMAIN") or MODELSCOPE
        endpoint = domain if "://" in domain else f"https://{domain}"
        token = os.environ.get("MODELSCOPE_API_TOKEN")
        return Downloads(self.download_source, self.download_dir, endpoint, token)

    def changed(self) -> dict[str, Setting]:
        """The values that differ from their defaults, for people to read: secrets are hidden."""
        values = {each: getattr(self, each.name) for each in FLAGS}
        return {each.name: each.shown(value) for each, value in values.items() if not each.is_default(value)}

    def to_dict(self) -> dict[str, Setting]:
        """All values, for people to read: secrets are hidden."""
        return {each.name: each.shown(getattr(self, each.name)) for each in FLAGS}

    @classmethod
    def from_cli(cls, argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> ServerArgs:
        """Command line over environment over config file over defaults. `--help` and `--version` print and exit."""
        environ = os.environ if environ is None else environ
        command_line = read_command_line(
            FLAGS,
            sys.argv[1:] if argv is None else argv,
            usage="python -m sgl_jax.launch_server --model-path PATH [flags]",
            description="Serve a large language model to OpenAI clients.",
            epilog=_EPILOG,
            version=f"sgl_jax {__version__}",
            elsewhere=ELSEWHERE,
        )
        variables = read_environ(FLAGS, environ, ENV_PREFIX, ELSEWHERE)
        config = command_line.pop("config", variables.pop("config", None))
        values: dict[str, object] = {"compilation_cache_dir": default_compilation_cache_dir(environ)}
        sources: dict[str, str] = {}  # by option, for error messages
        if config is not None:
            values |= (found := read_config(FLAGS, str(config), ELSEWHERE))
            sources |= {BY_NAME[name].option: f" (set in {config})" for name in found}
        values |= variables
        sources |= {BY_NAME[name].option: f" (set by {variable_name(BY_NAME[name], ENV_PREFIX)})" for name in variables}
        values |= command_line
        sources |= {BY_NAME[name].option: "" for name in command_line}
        if "model_path" not in values:
            raise FlagError("--model-path", f"--model-path is missing; give {BY_NAME['model_path'].about.help}")
        try:
            read: dict[str, Any] = {name: BY_NAME[name].read(value) for name, value in values.items()}
            return cls(**read)  # which checks types and values
        except FlagError as error:
            raise FlagError(error.flag, f"{error}{sources.get(error.flag, '')}") from None


FLAGS = flags_of(ServerArgs, flags_not_built())
BY_NAME = {each.name: each for each in FLAGS}

_EPILOG = f"""Every flag is also an environment variable ({variable_name(BY_NAME["page_size"], ENV_PREFIX)}=16 for
--page-size 16) and a key of the config file (page-size: 16). The command line wins over the environment, which wins over
the config file; --no-disable-radix-cache and its like take back a switch set there."""
