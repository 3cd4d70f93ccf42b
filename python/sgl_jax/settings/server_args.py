"""Every flag of the server, declared once, here or in a base of ServerArgs. Command line, help, environment, config file and
documentation derive from these fields. No other module reads the environment. Imports nothing heavy. A value that depends on
the device stays None here; runtime/ decides it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sgl_jax.settings.attention_backends import about_unknown
from sgl_jax.settings.flag_parser import FlagError, Mistakes, refuse
from sgl_jax.settings.flags import (
    NOT_NEGATIVE,
    Rule,
    Setting,
    at_least,
    between,
    flag,
    flags_of,
    mistakes_in,
    read_command_line,
    read_config,
    read_environ,
    variable_name,
)
from sgl_jax.settings.foreign_flags import ELSEWHERE
from sgl_jax.settings.hub import MODELSCOPE, Downloads
from sgl_jax.settings.lora_flags import LoraFlags
from sgl_jax.settings.serving_flags import SERVER as SERVER
from sgl_jax.settings.serving_flags import ServingFlags
from sgl_jax.settings.speculation import Speculation, speculation_of
from sgl_jax.settings.speculative_flags import SpeculativeFlags
from sgl_jax.settings.task_flags import TaskFlags

ENV_PREFIX = "SGL_JAX_"

COMPILING = "Kernels and compiling"
PARALLEL = "Several devices and machines"
LOGGING = "Logging, profiling and watching"

_HOST_PORT = Rule(
    lambda value: (match := re.fullmatch(r".+:(\d{1,5})", value)) is not None and 0 < int(match[1]) < 65536,
    "an address and a port, as in 10.0.0.1:10011",
)


def environment() -> dict[str, str]:
    """Return a copy of this process's environment, for modules that report it or pass it on."""
    return dict(os.environ)


def default_compilation_cache_dir(environ: Mapping[str, str] | None = None) -> str:
    """Return the folder in JAX's own variable if it is set, else one in this user's cache."""
    environ = os.environ if environ is None else environ
    if chosen := environ.get("JAX_COMPILATION_CACHE_DIR"):
        return chosen
    base = environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG rules: a relative path counts as unset
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "sgl_jax")


@dataclass(frozen=True, kw_only=True)
class ServerArgs(SpeculativeFlags, LoraFlags, TaskFlags, ServingFlags):
    """Flags of a launch, checked. None: decided at the start, from the model and the devices."""

    attention_backend: str | None = flag(
        None,
        "how attention is computed: Pallas kernels (fa, on TPU), plain XLA (native), or a backend of an installed package",
        unset="the best one for the device",
        group=COMPILING,
    )
    compilation_cache_dir: str = flag(
        default_compilation_cache_dir,
        "where compiled programs are kept between starts",
        unset="$JAX_COMPILATION_CACHE_DIR, else ~/.cache/sgl_jax",
        metavar="PATH",
        per_host=True,
    )
    skip_server_warmup: bool = flag(
        False,
        "be ready when the weights are read: programs compile in the background, those needed first come first, and "
        "requests wait for theirs; no request is sent as a warm-up",
        per_host=True,
    )
    compile_only: bool = flag(False, "compile every program for this machine's devices into the cache, and exit")

    tp_size: int | None = flag(
        None,
        "devices each layer is divided over",
        unset="1; sgl_jax.compile takes all of a topology",
        rule=at_least(1),
        aliases=("--tensor-parallel-size", "--tp"),
        group=PARALLEL,
    )
    dp_size: int = flag(
        1,
        "groups of --tp-size devices that attend to requests of their own; MLPs and experts are divided over all of them",
        rule=at_least(1),
        aliases=("--data-parallel-size", "--dp"),
    )
    dp_schedule_policy: Literal["cache_aware", "fewest_running", "round_robin"] = flag(
        "cache_aware", "which of the groups takes a request"
    )
    ep_size: int = flag(
        1,
        "groups of devices that the experts are spread over; within a group each expert is divided",
        rule=at_least(1),
        aliases=("--expert-parallel-size", "--ep"),
    )
    enable_sequence_parallel: bool = flag(
        False, "divide the tokens between attention and MLP, too, over the devices of a group"
    )
    collective_overlap_tokens: int | None = flag(
        None,
        "a step of at least twice as many tokens is computed in two parts, which hold as many as rows decode in any case, and "
        "exchanges one part's data between devices while it multiplies the other's; 0: steps have one part",
        unset="512 on TPU v6e and v7x for models without experts, else 0",
        rule=at_least(0),
    )
    nnodes: int = flag(1, "machines, each with an equal share of the devices", rule=between(1, 1024))
    node_rank: int = flag(0, "which of the machines this is", rule=at_least(0), per_host=True)
    dist_init_addr: str | None = flag(
        None,
        "address and port of machine 0",
        unset="not needed with one machine",
        metavar="HOST:PORT",
        rule=_HOST_PORT,
        per_host=True,
    )
    dist_token: str | None = flag(
        None,
        "the secret by which the machines know each other (better set by its environment variable)",
        unset="none: whoever reaches the port can join",
        metavar="TOKEN",
        secret=True,
        per_host=True,  # it is proved, not sent
    )
    dist_timeout: float = flag(
        300.0, "seconds to wait for the other machines at start", metavar="SECONDS", rule=NOT_NEGATIVE, per_host=True
    )

    log_level: Literal["debug", "info", "warning", "error", "critical"] = flag(
        "info", "what is logged", per_host=True, group=LOGGING
    )
    profiler_dir: str | None = flag(
        None,
        "folder that /start_profile may write to",
        unset="/start_profile is off; an Engine writes to a new folder among the temporary files",
        metavar="PATH",
        per_host=True,
    )
    decode_log_interval: int = flag(
        40, "decode steps between two 'Decode batch' lines", rule=at_least(1), per_host=True
    )

    watchdog_timeout: float = flag(
        300.0,
        "seconds after which an engine that has requests and finishes no step counts as hung, and the server ends; 0: never",
        metavar="SECONDS",
        rule=NOT_NEGATIVE,
        per_host=True,
    )
    soft_watchdog_timeout: float = flag(
        30.0, "likewise, after which /ready answers 503; 0: never", metavar="SECONDS", rule=NOT_NEGATIVE, per_host=True
    )

    def __post_init__(self) -> None:
        """Raise FlagError for the values that cannot be honoured."""
        super().__post_init__()
        refuse(mistakes_in(FLAGS, {each.name: getattr(self, each.name) for each in FLAGS}, lambda name: ""))
        refuse([FlagError(message.split()[0].rstrip(","), message) for message in self._misfits()])
        _ = self.speculation

    def _misfits(self) -> Iterator[str]:
        """Say which values do not fit together, a sentence each that begins with the flag."""
        if no_backend := about_unknown(self.attention_backend):
            yield no_backend
        if self.node_rank >= self.nnodes:
            yield f"--node-rank is {self.node_rank}; it must be below --nnodes, which is {self.nnodes}"
        yield from self.misfits_of_adapters({self.model_path, self.served_model_name or self.model_path})
        yield from self.misfits_of_task(self.speculative_flag)
        if self.nnodes > 1:
            yield from self._misfits_of_machines()
        tokens, page_size, devices = self.max_total_tokens, self.page_size, self.num_devices
        if devices % self.nnodes:
            each = f"--tp-size is {self.tp_size or 1} and --dp-size {self.dp_size}: {devices} devices"
            yield f"{each}, which --nnodes {self.nnodes} machines cannot share evenly"
        if tokens is not None and page_size is not None and tokens < page_size:
            yield f"--max-total-tokens is {tokens}; it must hold a page, and --page-size is {page_size}"

    def _misfits_of_machines(self) -> Iterator[str]:
        if self.dist_init_addr is None:
            yield f"--nnodes is {self.nnodes}; --dist-init-addr must say where machine 0 is, as HOST:PORT"
        elif self.dist_init_addr.endswith(":65535"):
            yield f"--dist-init-addr is {self.dist_init_addr}; the port above it is needed, too"
        if self.compile_only:
            reason = "programs over several machines are compiled when all of them have started"
            yield f"--compile-only cannot be had with --nnodes {self.nnodes}: {reason}"
        if self.skip_server_warmup:
            reason = "a program runs on all machines at once, so all must have compiled it"
            yield f"--skip-server-warmup cannot be had with --nnodes {self.nnodes}: {reason}"

    def notices(self) -> dict[str, str]:
        """Return, by flag, a sentence about each accepted value that has no effect, or a risk; to be logged once."""
        found = {}
        if self.trust_remote_code:
            found["--trust-remote-code"] = (
                "--trust-remote-code has no effect: models run on our own code, code from a model folder is never run."
            )
        if self.dist_init_addr is not None and self.nnodes == 1:
            found["--dist-init-addr"] = "--dist-init-addr is not used: there is one machine (--nnodes 1)."
        if self.enable_sequence_parallel and self.tp_size in (None, 1):
            found["--enable-sequence-parallel"] = "--enable-sequence-parallel has no effect with --tp-size 1."
        if self.collective_overlap_tokens and self.tp_size in (None, 1):
            found["--collective-overlap-tokens"] = "--collective-overlap-tokens has no effect with --tp-size 1."
        if self.dp_size == 1 and self.dp_schedule_policy != "cache_aware":
            found["--dp-schedule-policy"] = "--dp-schedule-policy has no effect with --dp-size 1."
        if self.schedule_low_priority_values_first and self.schedule_policy != "priority":
            name = "--schedule-low-priority-values-first"
            found[name] = f"{name} has no effect without --schedule-policy priority."
        if self.nnodes > 1 and self.dist_token is None:
            who = "whoever reaches the port of --dist-init-addr"
            found["--dist-token"] = f"There is no --dist-token: {who} can join as one of the machines."
        return found

    def warnings(self) -> list[str]:
        """Return a sentence about each risk that a server with these values takes."""
        found = []
        variable = variable_name(BY_NAME["api_key"], ENV_PREFIX)
        if self.api_key is None and os.environ.get(variable) == "":
            found.append(f"{variable} is empty, which counts as unset: clients need no key.")
        if self.api_key is None and not self.is_local:
            found.append(
                f"--host is {self.host} and there is no --api-key: whoever reaches the port controls the server."
            )
        return found

    @property
    def num_devices(self) -> int:
        return (self.tp_size or 1) * self.dp_size

    @property
    def speculation(self) -> Speculation | None:
        """The source of drafts; None: there are none. Raises FlagError where flags do not fit together."""
        return speculation_of(self, self.model_path, self.tp_size or 1, self.dp_size)

    @property
    def priority_sign(self) -> Literal[-1, 0, 1]:
        """1 where requests of greater `priority` come first, -1 where those of smaller do, 0 where it does not count."""
        if self.schedule_policy != "priority":
            return 0
        return -1 if self.schedule_low_priority_values_first else 1

    @property
    def downloads(self) -> Downloads:
        """The source of models given by an id. ModelScope's variables are read here, Hugging Face's by its library."""
        domain = os.environ.get("MODELSCOPE_DOMAIN") or MODELSCOPE
        endpoint = domain if "://" in domain else f"https://{domain}"
        token = os.environ.get("MODELSCOPE_API_TOKEN")
        return Downloads(self.download_source, self.download_dir, endpoint, token)

    def changed(self) -> dict[str, Setting]:
        """Return the values that differ from their defaults, for people to read: secrets are hidden."""
        values = ((each, getattr(self, each.name)) for each in FLAGS)
        return {each.name: each.shown(value) for each, value in values if not each.is_default(value)}

    def to_dict(self) -> dict[str, Setting]:
        """Return all values, for people to read: secrets are hidden."""
        return {each.name: each.shown(getattr(self, each.name)) for each in FLAGS}

    @classmethod
    def from_cli(
        cls,
        argv: Sequence[str] | None = None,
        environ: Mapping[str, str] | None = None,
        prog: str = "python -m sgl_jax.launch_server",
    ) -> ServerArgs:
        """Read the flags: command line over environment over config file over defaults. Raises FlagError.

        `argv` and `environ` None: this process's. `--help`, whose text names `prog`, and `--version` print and exit.
        """
        environ = os.environ if environ is None else environ
        mistakes: Mistakes = []
        command_line = read_command_line(
            FLAGS,
            sys.argv[1:] if argv is None else argv,
            mistakes,
            ELSEWHERE,
            usage=f"{prog} --model-path PATH [flags]",
            description="Serve a large language model to OpenAI clients.",
            epilog=_EPILOG,
        )
        variables = read_environ(FLAGS, environ, ENV_PREFIX, mistakes, ELSEWHERE)
        config = command_line.pop("config", variables.pop("config", None))
        in_file = read_config(FLAGS, str(config), mistakes, ELSEWHERE) if config is not None else {}
        values = {"compilation_cache_dir": default_compilation_cache_dir(environ)} | in_file | variables | command_line

        def source(name: str) -> str:
            if name in command_line:
                return ""
            by_variable = f" (set by {variable_name(BY_NAME[name], ENV_PREFIX)})" if name in variables else ""
            return by_variable or (f" (set in {config})" if name in in_file else "")

        read: dict[str, Any] = {name: BY_NAME[name].read(value) for name, value in values.items()}
        mistakes += mistakes_in(FLAGS, read, source)
        if "model_path" not in values and not any("--model-path" in str(each) for each in mistakes):
            mistakes.append(FlagError("", f"--model-path is missing; give {BY_NAME['model_path'].about.help}"))
        refuse(mistakes)
        return cls(**read)  # which checks how the values fit together


FLAGS = flags_of(ServerArgs)
BY_NAME = {each.name: each for each in FLAGS}

_EPILOG = f"""Every flag is also an environment variable ({variable_name(BY_NAME["page_size"], ENV_PREFIX)}=16 for
--page-size 16) and a key of the config file (page-size: 16). The command line wins over the environment, which wins over
the config file; --no-disable-radix-cache and its like take back a switch set there."""
