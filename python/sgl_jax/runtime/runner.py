"""Owns what lives on the device — weights, KV pool, row state — and the programs that change it."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sgl_jax.models.config import DecoderConfig
from sgl_jax.models.weights import Weights
from sgl_jax.ops.kernels import Kernels
from sgl_jax.parallel.placement import Placement
from sgl_jax.runtime.buckets import pick
from sgl_jax.runtime.compiler import Compiled, CompileWatch, compile_all, matmul_precision
from sgl_jax.runtime.layout import PlanLayout
from sgl_jax.runtime.machine_limits import Rates, measure_rates
from sgl_jax.runtime.placed_weights import abstract_weights
from sgl_jax.runtime.programs import (
    RunnerConfig,
    abstract_kv,
    abstract_state,
    loader_name,
    make_programs,
    step_name,
    zeros,
)
from sgl_jax.runtime.sampler import Logprobs
from sgl_jax.runtime.state import LOADERS, loader_size, pack_bias, pack_counts, pack_pages
from sgl_jax.runtime.step import StepOutputs
from sgl_jax.runtime.tracing import JaxTracer
from sgl_jax.step_plan import Param, RowLoad, StepPlan

_LOADER_NAMES = frozenset(map(loader_name, LOADERS))


@dataclasses.dataclass(frozen=True)
class InFlight:
    """A launched step: its results are on their way."""

    plan: StepPlan
    outputs: StepOutputs


@dataclasses.dataclass(frozen=True)
class StepTokens:
    """A finished step on the host, in the plan's row order."""

    tokens: np.ndarray  # i32[S]
    logprobs: Logprobs | None  # numpy, [S, …]; None unless some row asked
    prompt_logprobs: Logprobs | None  # numpy, [T, …]


class ModelRunner:
    """`compile` and `start` make it ready; programs compile from what the weights will look like, so the weights may be
    read meanwhile."""

    def __init__(
        self, model: DecoderConfig, config: RunnerConfig, kernels: Kernels, placement: Placement, *, stacks_layers: bool
    ):
        self.config = config
        self.watch = CompileWatch()
        weights = abstract_weights(model, config.weight_dtype, placement, stacked=stacks_layers)
        self.programs = make_programs(model, config, kernels, placement, weights)
        self.tracer = JaxTracer()
        self._model = model
        self._devices = [*placement.mesh.devices.flat]
        self._placement = placement
        self._layouts = {b: config.layout(b) for b in config.buckets}
        self._weights: Weights[jax.Array] | None = None
        self._kv: Any = None
        self._state: Any = None
        self._calls: dict[str, Any] = {}
        # Told each program and its vector before they run, where other processes must run them, too.
        self.announce: Callable[[str, np.ndarray], None] | None = None
        self._compiles_when_ready = 0

    @property
    def compiles_after_ready(self) -> int:
        return self.watch.count - self._compiles_when_ready

    def compile(self, report: Callable[[int, int, Compiled], None], stopped: threading.Event) -> None:
        """Every program; from any thread. `stopped`: as for compile_all."""
        with jax.default_matmul_precision(matmul_precision(self.config.compute_dtype)):
            self._calls = compile_all(self.programs, self.watch, report, stopped=stopped)

    def start(self, weights: Weights[jax.Array], meet: Callable[[], Any] = lambda: None) -> None:
        """Make KV and state, and run each program once, so that serving compiles nothing and starts at full speed.

        `meet` is called before, to wait until every process has compiled: a collective does not wait for minutes.
        """
        self._weights = weights
        self._kv = zeros(abstract_kv(self.config, self._placement))
        self._state = zeros(abstract_state(self._model, self.config, self._placement))
        meet()
        nothing = empty_plan(self.config.num_ranks)
        for layout in self._layouts.values():
            self.collect(InFlight(nothing, self._step(step_name(layout.bucket), layout.pack(nothing))))
        for name in LOADERS:
            size = loader_size(name, self.config.pages_per_row, self._model.vocab_size)
            vector = np.zeros(size, np.int32)
            vector[0] = self.config.num_rows
            self._load(loader_name(name), vector)
        jax.block_until_ready(self._state)
        self._compiles_when_ready = self.watch.count

    def launch(self, plan: StepPlan) -> InFlight:
        """Start a step: one vector to the device, one dispatch; rows with uncommon state load it first."""
        for load in plan.loads:
            self._load_row(load)
        layout = self._layout(plan)
        return InFlight(plan, self._step(step_name(layout.bucket), layout.pack(plan)))

    def collect(self, flight: InFlight) -> StepTokens:
        """Wait for a launched step and bring its tokens to the host, and logprobs only where asked for."""
        plan, outputs = flight.plan, flight.outputs
        rows, tokens = self._layout(plan).places(plan)

        def logprobs(of: Logprobs, places: Any) -> Logprobs:
            return Logprobs(*(np.asarray(each)[places] for each in of))

        return StepTokens(
            tokens=np.asarray(outputs.tokens)[rows],
            logprobs=logprobs(outputs.logprobs, rows) if plan.wants_logprobs else None,
            prompt_logprobs=logprobs(outputs.prompt_logprobs, tokens) if plan.wants_prompt_logprobs else None,
        )

    def measure_limits(self) -> Rates:
        """What the devices can do. Raises NotMeasured."""
        with self.watch.ignored():
            return measure_rates(self._devices, self.config.compute_dtype)

    def _layout(self, plan: StepPlan) -> PlanLayout:
        """That of the smallest bucket which holds every rank's tokens."""
        if self.config.num_ranks == 1:
            most = plan.num_tokens
        else:
            most = int(np.bincount(plan.rank, plan.num_new, 1).max())
        return self._layouts[pick(self.config.buckets, most)]

    def execute(self, name: str, vector: np.ndarray) -> None:
        """Run a program that another process announced; it reads the results."""
        if name in _LOADER_NAMES:
            self._load(name, vector)
        else:
            self._step(name, vector)

    def _step(self, name: str, vector: np.ndarray) -> StepOutputs:
        if self.announce is not None:
            self.announce(name, vector)
        self._kv, self._state, outputs = self._calls[name](self._weights, self._kv, self._state, vector)
        return outputs

    def _load_row(self, load: RowLoad) -> None:
        if load.pages is not None:
            self._load(loader_name("pages"), pack_pages(load.row, load.pages, self.config.pages_per_row))
        if load.request is not None:
            p = load.request.params
            if p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1:
                self._load(loader_name("counts"), pack_counts(load.row, load.request, self._model.vocab_size))
            if p.logit_bias or p.min_tokens:
                self._load(loader_name("bias"), pack_bias(load.row, load.request))

    def _load(self, name: str, vector: np.ndarray) -> None:
        if self.announce is not None:
            self.announce(name, vector)
        self._state = self._calls[name](self._state, vector)


@functools.cache
def empty_plan(num_ranks: int) -> StepPlan:
    """A plan of no rows: what a warm-up runs."""
    ints, bools = np.empty(0, np.int32), np.empty(0, np.bool_)
    return StepPlan(
        keys=np.empty(0, np.int64),
        rows=ints,
        rank=ints,
        start=ints,
        num_new=ints,
        num_short=np.zeros(num_ranks, np.int32),
        samples=bools,
        from_device=bools,
        next_token=ints,
        tokens=ints,
        params=np.empty((0, len(Param)), np.int32),
        page_updates=np.empty((3, 0), np.int32),
        loads=[],
    )
