"""Scheduler and engine core for tests, over a fake device whose output can be computed by hand."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

import numpy as np

from fakes.fake_arrays import FakeArrays
from fakes.fake_core import fake_info
from fakes.fake_runner import FakeRunner, continuation, kv_chain, logprob_of, two_of_three
from sgl_jax.cache.prefix_cache import PrefixCache
from sgl_jax.engine.adapter_loads import Adapters
from sgl_jax.engine.core import Core
from sgl_jax.engine.grammar_compiles import Grammars
from sgl_jax.engine.messages import (
    AdapterLoaded,
    AdapterUnloaded,
    CacheFlushed,
    Event,
    Generate,
    GrammarCompiled,
    PoolingInfo,
    PromptScored,
    Refused,
    StateChanged,
    Stats,
    StepOutput,
    TokenLogprobs,
)
from sgl_jax.engine.pooler import Pooler
from sgl_jax.engine.trainer_calls import TrainerCalls
from sgl_jax.request import FinishReason, Grammar, Request, SamplingParams
from sgl_jax.scheduler.adapter_slots import AdapterSlots
from sgl_jax.scheduler.grammar_rows import CompiledGrammar
from sgl_jax.scheduler.scheduler import Scheduler
from sgl_jax.scheduler.scheduler_config import SchedulerConfig
from sgl_jax.scheduler.widths import Widths
from sgl_jax.step_plan import StepPlan, StepTokens


class ByRows(Widths):
    """Widths that a function chooses from the number of rows, 1 to `rows`."""

    def __init__(self, choose: Callable[[int], int], rows: int):
        super().__init__(max(map(choose, range(1, rows + 1))), rows)
        self._choose = choose

    def __call__(self, num_rows: int) -> int:
        return self._choose(num_rows)


def make_scheduler(
    *,
    num_usable_pages: int = 64,
    page_size: int = 4,
    rows: int = 4,
    context_length: int = 64,
    step_tokens: int = 16,
    prefill_tokens: int | None = None,
    policy: str = "fcfs",
    radix: bool = True,
    ranks: int = 1,
    placement: str = "cache_aware",
    width: Callable[[int], int] = lambda num_decoding: 1,
    lookahead: int = 0,
    adapters: AdapterSlots | None = None,
    find_grammar: Callable[[Grammar], CompiledGrammar | None] | None = None,
) -> Scheduler:
    """Make a scheduler. Pages, rows and token budgets are per rank."""
    widths, limits = ByRows(width, rows), (rows, context_length, step_tokens, prefill_tokens or step_tokens)
    return Scheduler(
        SchedulerConfig(*limits, policy, placement, widths.width, rows, lookahead=lookahead),
        [PrefixCache(num_usable_pages + 1, page_size, enabled=radix) for _ in range(ranks)],
        widths,
        adapters,
        find_grammar,
    )


def step_tokens(
    plan: StepPlan, tokens: np.ndarray, num_accepted: np.ndarray | None = None, num_drafted: np.ndarray | None = None
) -> StepTokens:
    """Make a step's result of tokens [S] or [S, W]. By default decoding rows have all drafts, and all are accepted."""
    tokens = tokens.reshape(len(plan.rows), plan.width).astype(np.int32)
    if num_accepted is None:
        num_accepted = np.where(plan.from_device, plan.width, 1)
    if num_drafted is None:
        num_drafted = np.where(plan.from_device, plan.width - 1, 0)
    return StepTokens(tokens, num_accepted, num_drafted, None, None)


def make_request(
    key: int,
    prompt: list[int],
    *,
    max_tokens: int = 40,
    stop: tuple[int, ...] = (),
    namespace: str = "",
    urgency: int = 0,
    **params,
) -> Request:
    """Make a request; requests arrive in the order of their keys."""
    return Request(
        key=key,
        prompt=np.array(prompt, np.int32),
        params=SamplingParams(max_tokens=max_tokens, **params),
        namespace=namespace,
        seed=key,
        max_total_tokens=len(prompt) + max_tokens,
        stop_token_ids=np.array(stop, np.int32),
        arrival=key,
        urgency=urgency,
    )


def make_core(
    *,
    overlap: bool = True,
    vocab_size: int = 512,
    step_seconds: float = 0.0,
    random_seed: int | None = 0,
    eos: int = 511,
    decode_log_interval: int = 40,
    draft_model: str = "",
    draft_is_right: Callable[[int], bool] = two_of_three,
    adapters: Adapters | None = None,
    grammars: Grammars | None = None,
    pooling: PoolingInfo | None = None,
    arrays: FakeArrays | None = None,
    **scheduler_options,
) -> Core:
    parts = {"adapters": adapters.slots if adapters else None, "find_grammar": grammars.find if grammars else None}
    scheduler = make_scheduler(**scheduler_options, **parts)
    config, caches = scheduler.config, scheduler.caches
    runner = FakeRunner(
        num_ranks=len(caches),
        num_rows=len(caches) * config.max_running_requests,
        num_pages=caches[0].num_usable_pages + 1,
        page_size=caches[0].page_size,
        context_length=config.context_length,
        vocab_size=vocab_size,
        step_seconds=step_seconds,
        width=config.width,
        lookahead=config.lookahead,
        draft_is_right=draft_is_right,
        pooling=pooling.method if pooling else None,
    )
    if arrays is not None:
        arrays.runner = runner
    sign = 1 if config.policy == "priority" else 0
    sizes = {"vocab_size": vocab_size, "context_length": config.context_length}
    info = fake_info(**sizes, eos_token_id=eos, priority_sign=sign, pooling=pooling)
    return Core(
        scheduler,
        runner,
        info,
        overlap=overlap,
        random_seed=random_seed,
        decode_log_interval=decode_log_interval,
        draft_model=draft_model,
        adapters=adapters,
        grammars=grammars,
        pooler=Pooler(pooling) if pooling else None,
        trainer=TrainerCalls(arrays),
    )


@dataclasses.dataclass
class Answer:
    """Events that have come back for a request."""

    request: Request
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    prompt: PromptScored | None = None
    reason: FinishReason | None = None
    vector: list[float] | None = None  # in a pooling launch

    def check(self, vocab_size: int) -> None:
        """Check that the answer is the one computed by hand, or its beginning if the request was aborted."""
        request, params = self.request, self.request.params
        limit = request.max_total_tokens - len(request.prompt)
        right = continuation(request, limit, vocab_size)
        stops = set(request.stop_token_ids.tolist())
        end = next((i + 1 for i, token in enumerate(right) if token in stops), None)
        assert self.reason is not None, "never finished"
        if self.reason.type == "abort":
            assert self.tokens == right[: len(self.tokens)]
            assert len(self.tokens) < (end or limit or 1)
        elif end is not None:
            assert self.tokens == right[:end]
            assert self.reason == FinishReason("stop", right[end - 1])
        else:
            assert self.tokens == right
            assert self.reason == FinishReason("length")
        kv = kv_chain([*request.prompt.tolist(), *self.tokens], request.adapter)
        if params.logprobs is not None:
            before = kv[len(request.prompt) - 1 : -1]
            expected = [_scored(k, t, params.logprobs, vocab_size) for k, t in zip(before, self.tokens, strict=True)]
            assert self.logprobs == expected
        else:
            assert self.logprobs == []
        if self.tokens or self.reason.type != "abort":
            assert self.prompt is not None
            scores = None
            if params.prompt_logprobs is not None:
                following = request.prompt.tolist()[1:]
                k = params.prompt_logprobs
                scores = [None, *(_scored(kv[i], t, k, vocab_size) for i, t in enumerate(following))]
            assert self.prompt.logprobs == scores
            assert 0 <= self.prompt.num_cached_tokens < len(request.prompt)


def _scored(kv: int, token: int, num_top: int, vocab_size: int) -> TokenLogprobs:
    logprob = logprob_of(kv, token)
    ids = [(token + 1 + j) % vocab_size for j in range(num_top)]
    return TokenLogprobs(logprob, ids, [logprob - j for j in range(num_top)])


class Client:
    """Talks to a core and sorts its events by request."""

    def __init__(self, core: Core):
        self.core = core
        self.answers: dict[int, Answer] = {}
        self.flushed: list[CacheFlushed] = []
        self.stats: list[Stats] = []
        self.said: list[AdapterLoaded | AdapterUnloaded | GrammarCompiled | Refused | StateChanged] = []

    def submit(self, key: int, prompt: list[int], *, namespace: str = "", adapter: int = 0, **params) -> None:
        self.core.handle(Generate(key, prompt, SamplingParams(**params), namespace, adapter))
        request = self.core.scheduler.requests.get(key)
        assert request is not None
        self.answers[key] = Answer(request)

    def step(self) -> None:
        for event in self.core.step():
            self._take(event)
        self.core.scheduler.check_invariants()

    def run(self, max_steps: int = 1000) -> None:
        """Step until there is nothing to do."""
        for _ in range(max_steps):
            if not self.core.busy:
                return
            self.step()
        raise AssertionError(f"still busy after {max_steps} steps")

    @property
    def tokens(self) -> dict[int, list[int]]:
        return {key: answer.tokens for key, answer in self.answers.items()}

    def _take(self, event: Event) -> None:
        if isinstance(event, CacheFlushed):
            self.flushed.append(event)
            return
        if isinstance(event, AdapterLoaded | AdapterUnloaded | GrammarCompiled | Refused | StateChanged):
            self.said.append(event)
            return
        assert isinstance(event, StepOutput)
        if event.stats is not None:
            self.stats.append(event.stats)
        assert len(event.keys) == len(event.tokens)
        assert max(Counter(event.keys).values(), default=0) <= self.core.scheduler.config.width
        for i, (key, token) in enumerate(zip(event.keys, event.tokens, strict=True)):
            answer = self.answers[key]
            assert answer.reason is None, "a token after the end"
            assert type(token) is int
            answer.tokens.append(token)
            if (scored := event.logprobs.get(i)) is not None:
                answer.logprobs.append(scored)
        for prompt in event.prompts:
            answer = self.answers[prompt.key]
            assert answer.prompt is None
            assert len(answer.tokens) == min(1, answer.request.max_total_tokens - len(answer.request.prompt))
            answer.prompt = prompt
        for pooled in event.pooled:
            self.answers[pooled.key].vector = np.frombuffer(pooled.vector, "<f4").tolist()
        for finished in event.finished:
            answer = self.answers[finished.key]
            assert answer.reason is None, "finished twice"
            answer.reason = finished.reason
