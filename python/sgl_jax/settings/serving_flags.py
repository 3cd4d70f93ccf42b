"""Flags about the served model, the HTTP server, the device's memory and scheduling. ServerArgs adds all others."""

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal

from sgl_jax.settings.answer_parsers import CALL_PARSERS, THOUGHT_PARSERS, parser_rule
from sgl_jax.settings.flags import NOT_NEGATIVE, REQUIRED, Rule, at_least, between, flag

MODEL = "Model and tokenizer"
SERVER = "HTTP server"
DEVICE = "Device and memory"
SCHEDULING = "Scheduling"

MAX_QUEUED_REQUESTS = 4096  # a server's default


def _list_of(pattern: str, text: str) -> Rule:
    fits = re.compile(pattern).fullmatch
    return Rule(lambda value: all(fits(each.strip()) for each in value.split(",")), f"{text}, separated by commas")


_OnLoad = Literal["auto", "int8", "int8-weight-only", "fp8", "fp8-weight-only", "int4", "w8a8_int8", "w8a8_fp8"]
_AsStored = Literal["awq", "awq_marlin", "gptq", "gptq_marlin", "compressed-tensors", "fbgemm_fp8", "mxfp4"]
_AsModelOpt = Literal["modelopt", "modelopt_fp8", "modelopt_fp4"]
_NO_FLOAT16 = "float16 overflows in models trained in bfloat16, and TPUs do not have it; use bfloat16"
_IN_0_1 = Rule(lambda value: 0 < value < 1, "above 0 and below 1")
_PAGE_SIZE = Rule(lambda value: 1 <= value <= 1024 and value & (value - 1) == 0, "a power of two between 1 and 1024")
_ORIGINS = _list_of(r"\*|[\w+.-]+://[^/\s,]+", "* or addresses without a path, as https://chat.example.com")
_HOSTS = _list_of(r"\*|[\w.-]+", "* or names without a port")
_COLLECTOR = Rule(
    lambda value: re.fullmatch(r"https?://[^/\s]+(/\S*)?", value) is not None,
    "an http:// or https:// address; spans are sent by OTLP over HTTP, whose port is 4318 mostly, and not over gRPC",
)
_CHUNK = Rule(lambda value: value == -1 or value >= 1, "at least 1, or -1 for no limit of its own")


@dataclass(frozen=True, kw_only=True)
class ServingFlags:
    """Flags of a launch that are about serving a model. None: decided at the start, from the model and the devices."""

    model_path: str = flag(
        REQUIRED,
        "a folder with safetensors, a .gguf file, a hub id, or config:NAME with --load-format dummy",
        aliases=("--model",),
        metavar="PATH",
        per_host=True,  # the files are compared
        group=MODEL,
    )
    tokenizer_path: str | None = flag(
        None, "a folder, a .gguf file or a hub id", unset="the model's", metavar="PATH", per_host=True
    )
    trust_remote_code: bool = flag(
        False, "accepted, with no effect: code from a model folder is never run", per_host=True
    )
    served_model_name: str | None = flag(
        None, "the model's name in the API", unset="as --model-path", metavar="NAME", per_host=True
    )
    context_length: int | None = flag(
        None, "tokens of prompt and output one request may hold", unset="the model's", rule=at_least(2)
    )
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto",
        "type of activations and weights; auto chooses for model and device",
        refused={"float16": _NO_FLOAT16, "half": _NO_FLOAT16, "float": "write float32"},
    )
    quantization: Literal[_OnLoad, _AsStored, _AsModelOpt] | None = flag(
        None,
        "how matrices are held (docs/features/quantization.md): rounded while they are read, or a name that repeats the "
        "checkpoint's format",
        unset="as the checkpoint's format and the device have it",
        aliases=("-q",),
        refused={
            "gguf": "a .gguf file needs no flag",
            "bitsandbytes": "it has no kernels here; int8 rounds as many bits",
        },
    )
    kv_cache_dtype: Literal["auto", "bfloat16", "bf16", "int8", "fp8_e4m3", "fp8", "fp8_e5m2"] = flag(
        "auto", "type of the KV cache; auto is that of activations (docs/features/quantization.md)"
    )
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = flag(
        "auto", "where weights come from; auto looks at the files, dummy makes random ones"
    )
    model_package: str | None = flag(
        None,
        "a Python module with a model family of your own (docs/features/add_a_model.md)",
        unset="our families and those of installed packages",
        metavar="MODULE",
    )
    download_dir: str | None = flag(
        None, "where downloaded models are kept", unset="the source's own cache", metavar="PATH", per_host=True
    )
    download_source: Literal["huggingface", "modelscope"] = flag(
        "huggingface", "where a model that is named by its id is fetched from", per_host=True
    )
    chat_template: str | None = flag(
        None,
        "the Jinja template of chat prompts: a file, or chatml, gemma, llama-3 or qwen",
        unset="the model's",
        metavar="FILE",
        per_host=True,
    )
    tool_call_parser: str = flag(
        "auto",
        "format in which the model writes tool calls; auto finds it in the chat template, none looks for no calls",
        metavar="NAME",
        rule=parser_rule(CALL_PARSERS),
        per_host=True,
    )
    reasoning_parser: str = flag(
        "auto",
        "format in which the model thinks before it answers; auto finds it in the chat template, none splits nothing off",
        metavar="NAME",
        rule=parser_rule(THOUGHT_PARSERS),
        per_host=True,
    )
    random_seed: int | None = flag(
        None,
        "seed of sampling where a request gives none, and of dummy weights",
        unset="different at each start, dummy weights always the same",
        rule=between(0, 2**63 - 1),
    )

    host: str = flag(
        "127.0.0.1", "address to listen on; 0.0.0.0 is every network", metavar="ADDRESS", per_host=True, group=SERVER
    )
    port: int = flag(30000, "port to listen on; 0 takes any free one", rule=between(0, 65535), per_host=True)
    api_key: str | None = flag(
        None,
        "the bearer token clients must send (better set by its environment variable: command lines are public)",
        unset="none needed",
        metavar="KEY",
        secret=True,
        per_host=True,
    )
    allowed_origins: str | None = flag(
        None,
        "sites whose pages may call the server, as https://chat.example.com,https://other.example.com; * is any",
        unset="pages of this machine",
        metavar="ORIGINS",
        rule=_ORIGINS,
        per_host=True,
    )
    allowed_hosts: str | None = flag(
        None,
        "names, separated by commas, by which the server may be addressed; * is any",
        unset="any; localhost if it listens to this machine only and needs no key. Addresses always are",
        metavar="NAMES",
        rule=_HOSTS,
        per_host=True,
    )
    no_ui: bool = flag(False, "serve no pages: no chat at / and no dashboard", per_host=True)
    max_request_bytes: int = flag(
        16 * 2**20, "bytes of a request's body, above which it gets a 413", rule=at_least(1024), per_host=True
    )
    metrics_compat: Literal["vllm", "sglang"] | None = flag(
        None,
        "an engine under whose names /metrics has its numbers, too, for gateways that know no others",
        unset="our names alone",
        per_host=True,
    )
    otlp_traces_endpoint: str | None = flag(
        None,
        "an OpenTelemetry collector's address, as http://127.0.0.1:4318, to which a span of each request is sent by OTLP over "
        "HTTP; needs the extra sgl-jax[otel]",
        unset="no spans",
        metavar="URL",
        rule=_COLLECTOR,
        per_host=True,
    )
    stream_interval: int = flag(1, "tokens per streamed chunk after the first", rule=at_least(1), per_host=True)
    shutdown_timeout_s: float = flag(
        60.0,
        "seconds that running requests get to finish after SIGTERM",
        metavar="SECONDS",
        rule=NOT_NEGATIVE,
        per_host=True,
    )

    device: Literal["tpu", "gpu", "cpu"] | None = flag(
        None, "where the model runs", unset="the best present", refused={"cuda": "write gpu"}, group=DEVICE
    )
    mem_fraction_static: float | None = flag(
        None,
        "share of the device's memory, on CPU of what is free at the start, for weights and KV cache",
        unset="0.88, on CPU 0.4",
        metavar="SHARE",
        rule=_IN_0_1,
    )
    max_total_tokens: int | None = flag(
        None,
        "tokens of KV cache",
        unset="as many as the memory holds; on CPU at most 65536 or one full context, with --mem-fraction-static 65536 or "
        "two full contexts for each running request",
        rule=at_least(1),
    )
    page_size: int | None = flag(
        None, "tokens per page, the unit of prefix sharing", unset="128 with the fa kernels, else 16", rule=_PAGE_SIZE
    )
    disable_radix_cache: bool = flag(False, "never reuse the KV of a shared prefix")

    schedule_policy: Literal["fcfs", "lpm", "priority"] = flag(
        "fcfs",
        "who is admitted first: first come, longest prefix match, or greatest `priority`, which also preempts",
        group=SCHEDULING,
    )
    schedule_low_priority_values_first: bool = flag(False, "the smallest `priority` comes first")
    max_running_requests: int | None = flag(
        None, "requests in one step", unset="256, on CPU 32; less if the KV cache is small", rule=at_least(1)
    )
    max_queued_requests: int | None = flag(
        None,
        "requests (each of n counts) without a first token, above which new ones get a 429",
        unset=f"{MAX_QUEUED_REQUESTS}, in an Engine no limit",
        rule=at_least(1),
    )
    chunked_prefill_size: int | None = flag(
        None,
        "most prompt tokens in a step; -1 means as many as --max-prefill-tokens",
        unset="2048, on CPU 256",
        rule=_CHUNK,
    )
    max_prefill_tokens: int = flag(16384, "upper limit of --chunked-prefill-size", rule=at_least(1))
    enable_mixed_chunk: bool = flag(
        True,
        "prompts and decodes share steps, always",
        refused={"False": "steps are always shared, leave the flag out"},
    )
    grammar_backend: Literal["llguidance", "none"] = flag(
        "llguidance",
        "what structured output is compiled with (docs/features/structured_output.md); none: requests for it are refused",
        refused={
            "xgrammar": "llguidance is the one that is built",
            "outlines": "llguidance is the one that is built",
            "guidance": "write llguidance",
            "auto": "leave the flag out",
        },
    )
    disable_overlap_schedule: bool = flag(False, "plan a step only when the tokens of the one before have arrived")

    @property
    def is_local(self) -> bool:
        """Whether only programs of this machine reach the server."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
