"""Messages between the API side and the engine side (a thread or a process), encoded as msgpack, never pickled.

A request is named by an int key on the wire, unique within one API process; its public id stays with the API side.
"""

from typing import Literal, NamedTuple, Self

import msgspec

from sgl_jax.engine.pooling_info import Pooled as Pooled
from sgl_jax.engine.pooling_info import PoolingInfo as PoolingInfo
from sgl_jax.request import FinishReason, SamplingParams


class _Message(msgspec.Struct, tag=True, frozen=True, omit_defaults=True):
    """Map that names its type."""


class _CallMessage(_Message, frozen=True):
    """Command that is answered, or its answer, which has the same number."""

    call: int


class Generate(_Message, frozen=True):
    """Start a request. The API side has checked it: the prompt is not empty and fits with max_tokens; n is 1."""

    key: int
    prompt_ids: list[int]
    params: SamplingParams
    namespace: str = ""  # requests of different namespaces never share cached prefixes
    adapter: int = 0  # number of an AdapterInfo; 0: the model itself


class Abort(_Message, frozen=True):
    """Stop these requests, whatever their state; unknown keys are ignored. Each live one gets a Finished(abort)."""

    keys: list[int]


class FlushCache(_CallMessage, frozen=True):
    """Drop every cached prefix that no running request holds. Answered by CacheFlushed."""


class StartProfile(_CallMessage, frozen=True):
    """Record what engine and device do. Answered by ProfileAnswer, or by Refused if a profile runs already."""

    output_dir: str | None = None  # None: --profiler-dir, else a new folder
    num_steps: int | None = None  # the profile ends by itself after so many complete steps; None: when it is stopped
    host_tracer_level: int | None = None  # JAX's, from 0 (nothing of the host) to 3 (everything); None: 2
    python_tracer_level: int | None = None  # 1: every Python call; None: 0


class StopProfile(_CallMessage, frozen=True):
    """End the profile and write it. Answered by ProfileAnswer when it is written, or by Refused if none runs."""


class GetProfile(_CallMessage, frozen=True):
    """Ask for the state of the profile. Answered by ProfileAnswer."""


class LoadAdapter(_CallMessage, frozen=True):
    """Read an adapter and check that it fits. Answered by AdapterLoaded, or by Refused with what is wrong."""

    name: str
    path: str  # a folder of each host, or a hub id
    pinned: bool = False


class UnloadAdapter(_CallMessage, frozen=True):
    """Forget an adapter once the requests that use it have ended. Answered by AdapterUnloaded. The API side sends no further
    request that uses it."""

    adapter: int


class CompileGrammar(_CallMessage, frozen=True):
    """Compile the grammar of requests to come. Answered by GrammarCompiled, or by Refused with what is wrong."""

    kind: str  # this and `text` as in request.Grammar
    text: str


PauseMode = Literal["abort", "retract", "in_place"]  # requests end; they wait again; they keep their rows
MemoryTag = Literal["kv_cache", "weights"]
WeightsFormat = Literal["auto", "safetensors", "gguf"]


class PauseGeneration(_CallMessage, frozen=True):
    """Plan no step until ContinueGeneration. This and the next four are answered by StateChanged when no step is in flight."""

    mode: PauseMode = "abort"


class ContinueGeneration(_CallMessage, frozen=True):
    """Go on after a pause."""


class UpdateWeights(_CallMessage, frozen=True):
    """Read other weights of the same model and use them from then on, or answer by Refused. Cached prefixes are dropped."""

    path: str
    load_format: WeightsFormat = "auto"
    abort_all: bool = False  # requests end, and are not computed anew
    version: str = ""  # a name for the weights


class ReleaseMemory(_CallMessage, frozen=True):
    """Delete arrays on the devices, and plan no step until they are back. Answered by Refused while requests run."""

    tags: list[MemoryTag]


class ResumeMemory(_CallMessage, frozen=True):
    """Put released arrays back."""

    tags: list[MemoryTag]


class Shutdown(_Message, frozen=True):
    """Leave the loop at once; running requests are dropped. The API side drains before it sends this."""


Command = (
    Generate
    | Abort
    | FlushCache
    | StartProfile
    | StopProfile
    | GetProfile
    | LoadAdapter
    | UnloadAdapter
    | CompileGrammar
    | PauseGeneration
    | ContinueGeneration
    | UpdateWeights
    | ReleaseMemory
    | ResumeMemory
    | Shutdown
)


class AdapterInfo(msgspec.Struct, frozen=True):
    """Loaded LoRA adapter. Each load has a number of its own: an adapter that is loaded again is another one."""

    number: int  # from 1 on
    name: str
    path: str
    rank: int  # the highest of its matrices
    num_matrices: int  # modules of the checkpoint that it changes
    pinned: bool = False  # it never leaves its slot on the device


class EngineInfo(msgspec.Struct, frozen=True):
    """Settings as the engine resolved them at start: sent once, in Ready."""

    model_path: str
    architecture: str
    dtype: str
    platform: str  # "cpu" | "gpu" | "tpu"
    device_kind: str
    num_devices: int
    vocab_size: int
    context_length: int  # tokens of prompt plus output that one request may have
    eos_token_ids: list[int]
    page_size: int
    max_total_tokens: int  # tokens of KV in the pool
    max_running_requests: int
    chunked_prefill_size: int
    num_programs: int
    weight_bytes: int  # on all devices together
    kv_bytes_per_token: int
    parameters_per_token: int  # parameters that multiply a token: all matrices and the head, no embedding
    start_seconds: float
    quantization: str = ""  # scheme in which matrices are held; empty: as plain floats
    adapters: list[AdapterInfo] = []  # loaded for --lora-paths
    max_lora_rank: int = 0  # 0: the launch takes no adapters
    takes_grammars: bool = False  # requests may have a grammar
    priority_sign: Literal[-1, 0, 1] = (
        0  # 1, -1: requests of greater, or smaller, priority come first; 0: they have none
    )
    device_bytes: int = 0  # memory of each device, of which weights, adapters' slots and KV take these:
    device_weight_bytes: int = 0
    device_adapter_bytes: int = 0
    device_kv_bytes: int = 0
    programs: list[str] = []  # names, one for each bucket of steps and each kind of row load
    simulated: bool = False  # drafts count whatever is sampled: --speculative-simulated-acceptance
    pooling: PoolingInfo | None = None  # the launch makes vectors; None: it generates


class Starting(_Message, frozen=True):
    """How far a start is; sent a few times a second, before Ready."""

    weights: float  # share that has been read
    num_ready: int  # programs that are ready
    num_programs: int  # for which it waits
    compiles: bool  # some were not in the compile cache
    seconds_left: int | None  # None: nothing is known yet

    @property
    def programs_text(self) -> str:
        if not self.num_programs:
            return "compiled beside requests"
        first = ", compiling: the first start takes longest" if self.compiles else ""
        left = "" if self.seconds_left is None else f", about {self.seconds_left} s left"
        return f"{self.num_ready} of {self.num_programs}{first}{left}"


class Ready(_Message, frozen=True):
    """Weights are loaded and every program is compiled."""

    info: EngineInfo


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probability of one token, and of the best ones at that position (as many as were asked for), best first."""

    logprob: float
    top_ids: list[int] = []
    top_logprobs: list[float] = []


class PromptScored(msgspec.Struct, frozen=True, array_like=True):
    """Scores of a prompt, sent with its first token. `logprobs[0]` is None: nothing comes before that token."""

    key: int
    num_cached_tokens: int
    logprobs: list[TokenLogprobs | None] | None = None  # one per prompt token, when asked for
    queue_seconds: float = 0.0  # from its arrival in the engine to its first step


class Finished(msgspec.Struct, frozen=True, array_like=True):
    key: int
    reason: FinishReason


class DraftCounts(NamedTuple):
    """Drafts that were verified: in how many steps of a row, how many, and how many of them were accepted."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def accept_length(self) -> float:
        """Tokens that a step with drafts gives a row on average: the accepted drafts, and the token sampled after them."""
        return 1 + self.accepted / max(self.steps, 1)

    @property
    def accept_rate(self) -> float:
        return self.accepted / max(self.drafted, 1)

    def since(self, before: Self) -> Self:
        return self._make(now - then for now, then in zip(self, before, strict=True))


class Stats(msgspec.Struct, frozen=True, omit_defaults=True):
    """Gauges, which are current values, and counters, which are totals since the start."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0  # share of the pool's pages that are not free, cached prefixes not counted
    cached_usage: float = 0.0  # share of the pool's pages with cached prefixes that no request uses
    gen_throughput: float = 0.0  # tokens/s over the last decode log interval
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    generated_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    step_seconds: float = 0.0  # all of them
    decode_steps: int = 0  # steps without prompt tokens
    decode_step_seconds: float = 0.0
    resident_bytes: int = 0  # memory of the engine's process; 0: not known
    compiles_after_ready: int = 0
    num_compiling: int = 0  # programs that are not compiled yet
    spec_accept_length: float = 1.0  # over the last decode log interval, as DraftCounts defines it
    spec_accept_rate: float = 0.0
    draft_steps: int = 0  # these three make DraftCounts
    drafted_tokens: int = 0
    accepted_drafts: int = 0
    adapters_on_device: int = 0  # slots in use
    adapter_loads: int = 0  # times that an adapter was put into a slot
    grammars_compiled: int = 0  # with those that failed
    grammar_compile_seconds: float = 0.0
    grammar_masks: int = 0
    grammar_mask_seconds: float = 0.0
    accepted_per_position: list[int] = []  # by the draft's place in a row; empty: the launch does not speculate

    @property
    def drafts(self) -> DraftCounts:
        return DraftCounts(self.draft_steps, self.drafted_tokens, self.accepted_drafts)


class StepOutput(_Message, frozen=True):
    """Results of one step, one message per step: `tokens[i]` is the next token of request `keys[i]`.

    A finished request's last token is in `tokens` (a stop token included) and its Finished in `finished`.
    """

    keys: list[int] = []
    tokens: list[int] = []
    finished: list[Finished] = []
    prompts: list[PromptScored] = []
    logprobs: dict[int, TokenLogprobs] = {}  # by index into keys, for the requests that asked
    stats: Stats | None = None  # several times a second, and always when the engine falls idle
    drafts: list[tuple[int, int, int]] = []  # key, verified and accepted drafts of each request that had drafts
    pooled: list[Pooled] = []  # in a pooling launch, one for each request that finished and was not aborted


class CacheFlushed(_CallMessage, frozen=True):
    num_pages: int  # pages that became free


class AdapterLoaded(_CallMessage, frozen=True):
    adapter: AdapterInfo


class AdapterUnloaded(_CallMessage, frozen=True):
    num_pages: int  # pages with its cached prefixes, which became free


class GrammarCompiled(_CallMessage, frozen=True):
    """Requests with the grammar can run."""


class StateChanged(_CallMessage, frozen=True):
    message: str
    num_waiting: int = 0  # live requests that wait until generation goes on
    holds: bool = False  # no step is planned until another call
    weights: tuple[str, str] | None = None  # path and version of those that are new


class ProfileStatus(msgspec.Struct, frozen=True):
    """State of the profile that runs, or else of the last one."""

    running: bool = False
    output_dir: str = ""
    started_at: float = 0.0  # Unix time; 0: there has been none yet
    num_steps: int | None = None  # as requested; None: until it is stopped or at its limits
    steps_done: int = 0  # complete steps in the profile
    files: list[str] = []  # written by the last profile
    error: str = ""  # why it could not be written
    ended: str = ""  # why no more is recorded


class ProfileAnswer(_CallMessage, frozen=True):
    status: ProfileStatus


class Refused(_CallMessage, frozen=True):
    """Answer to a command that the engine cannot carry out, now or at all."""

    message: str
    param: str = ""  # the wrong field of the command; empty: it cannot be carried out now


class EngineDied(_Message, frozen=True):
    """The engine cannot go on. Every request ends with this error and the server exits non-zero."""

    message: str


Event = (
    Starting
    | Ready
    | StepOutput
    | CacheFlushed
    | AdapterLoaded
    | AdapterUnloaded
    | GrammarCompiled
    | StateChanged
    | ProfileAnswer
    | Refused
    | EngineDied
)
