"""Owns what lives on the device, weights, KV pool and row state, and runs the programs that change it."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import jax
import numpy as np

from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.weights import Weights
from sgl_jax.ops.kernels import Kernels
from sgl_jax.parallel.placement import Placement
from sgl_jax.runtime.buckets import pick
from sgl_jax.runtime.compiler import Compiled, CompileWatch, Program, compile_all, matmul_precision
from sgl_jax.runtime.device_state import DeviceState
from sgl_jax.runtime.layout import PlanLayout
from sgl_jax.runtime.loads import pack_loads
from sgl_jax.runtime.placed_weights import abstract_weights
from sgl_jax.runtime.programs import (
    KV,
    OUTPUTS,
    STATE,
    WEIGHTS,
    RunnerConfig,
    abstract_kv,
    empty_state,
    make_programs,
    step_name,
    zeros,
)
from sgl_jax.runtime.sampler import Logprobs
from sgl_jax.runtime.speculate import Drafter
from sgl_jax.runtime.step import StepOutputs
from sgl_jax.runtime.tracing import JaxTracer
from sgl_jax.step_plan import StepPlan, StepTokens, TokenScores, empty_plan

# Told each program that is to run, its vector and the source of its payload ("": it has none), right before it runs.
type Announce = Callable[[str, np.ndarray, str], None]
type DeviceValue = Weights[jax.Array] | DeviceState | StepOutputs | jax.Array


def announce_to_nobody(program: str, vector: np.ndarray, source: str) -> None:
    """The Announce of a runner whose devices all belong to this process."""


@dataclasses.dataclass(frozen=True)
class InFlight:
    """A launched step: its results are on their way."""

    plan: StepPlan
    outputs: StepOutputs
    rows: np.ndarray | slice  # where the plan's rows and tokens are in the padded outputs
    tokens: np.ndarray | slice

    def collect(self) -> StepTokens:
        """Wait for the step and bring its tokens to the host, and logprobs only where asked for."""
        plan, outputs = self.plan, self.outputs
        return StepTokens(
            tokens=np.asarray(outputs.tokens)[self.rows],
            num_accepted=self._num_accepted(),
            logprobs=_scores(outputs.logprobs, self.rows, plan.width) if plan.wants_logprobs else None,
            prompt_logprobs=_scores(outputs.prompt_logprobs, self.tokens) if plan.wants_prompt_logprobs else None,
        )

    def _num_accepted(self) -> np.ndarray:
        if self.plan.width == 1:  # known, and a transfer costs
            return np.ones(len(self.plan.rows), np.int32)
        return np.asarray(self.outputs.num_accepted)[self.rows]


def _scores(found: Logprobs, at: np.ndarray | slice, width: int = 1) -> TokenScores:
    """The scores of the items at these places, `width` lines each."""
    lines = (np.asarray(each) for each in found)
    return TokenScores(*(x.reshape(-1, width, *x.shape[1:])[at].reshape(-1, *x.shape[1:]) for x in lines))


class ModelRunner:
    """Runs steps. `compile` and `start` make it ready; programs compile from what the weights will look like, so the weights
    may be read meanwhile."""

    def __init__(
        self,
        model: DecoderConfig,
        config: RunnerConfig,
        kernels: Kernels,
        placement: Placement,
        *,
        stacks_layers: bool,
        announce: Announce = announce_to_nobody,
        drafter: Drafter | None = None,
    ):
        self.config = config
        self.watch = CompileWatch()
        weights = abstract_weights(model, config.weight_dtype, placement, stacked=stacks_layers)
        self.programs = make_programs(model, config, kernels, placement, weights, drafter)
        self.tracer = JaxTracer()
        self._model = model
        self._devices = [*placement.mesh.devices.flat]
        self._placement = placement
        self._announce = announce
        self._layouts = {bucket: config.layout(bucket) for bucket in config.buckets}
        self._loads = config.loads(model)
        self._by_name = {program.name: program for program in self.programs}
        self._calls: dict[str, jax.stages.Compiled] = {}
        self._values: dict[str, DeviceValue] = {}
        self._compiles_when_ready = 0

    @property
    def compiles_after_ready(self) -> int:
        return self.watch.count - self._compiles_when_ready

    def compile(self, report: Callable[[int, int, Compiled], None], stopped: threading.Event) -> None:
        """Compile every program; from any thread. `stopped`: as for compile_all."""
        with jax.default_matmul_precision(matmul_precision(self.config.compute_dtype)):
            self._calls = compile_all(self.programs, self.watch, report, stopped=stopped)

    def start(self, weights: Weights[jax.Array], barrier: Callable[[], object] = lambda: None) -> None:
        """Make KV and state, and run each program once, so that serving compiles nothing and starts at full speed.

        `barrier` is called before, to wait until every process has compiled: a collective does not wait for minutes.
        """
        self._values = {
            WEIGHTS: weights,
            KV: zeros(abstract_kv(self.config, self._placement)),
            STATE: empty_state(self._model, self.config, self._placement),
        }
        barrier()
        empty_steps = {
            step_name(bucket): layout.pack(empty_plan(self.config.num_ranks, bucket.width))
            for bucket, layout in self._layouts.items()
        }
        for program in self.programs:
            vector = empty_steps.get(program.name, np.zeros(program.vector_shape, np.int32))
            jax.block_until_ready(self._call(program, vector, *_nothing_to_read(program)))
        jax.block_until_ready(self._values[STATE])
        self._compiles_when_ready = self.watch.count

    def launch(self, plan: StepPlan) -> InFlight:
        """Start a step: one vector to the device, one dispatch; before it, one of each kind of row load there is."""
        for program, vector in pack_loads(self._loads, plan.loads):
            self.run(program, vector)
        layout = self._layout(plan)
        outputs = self.run(step_name(layout.bucket), layout.pack(plan))
        assert isinstance(outputs, StepOutputs)
        return InFlight(plan, outputs, *layout.places(plan))

    def run(self, name: str, vector: np.ndarray, source: str = "") -> DeviceValue | None:
        """Run a program here and, announced, in every other process. Returns what it gives besides the values it takes."""
        self._announce(name, vector, source)
        return self.execute(name, vector, source)

    def execute(self, name: str, vector: np.ndarray, source: str = "") -> DeviceValue | None:
        """Run a program that another process announced, with the payload read here."""
        program = self._by_name[name]
        payload = () if program.read is None else (program.read(source),)
        return self._call(program, vector, *payload)

    def _call(self, program: Program, vector: np.ndarray, *payload: object) -> DeviceValue | None:
        taken = [self._values[name] for name in program.takes]
        given = self._calls[program.name](*taken, vector, *payload)
        result = None
        for name, value in zip(program.gives, given, strict=True):
            if name == OUTPUTS:
                result = value
            else:
                self._values[name] = value
        return result

    def _layout(self, plan: StepPlan) -> PlanLayout:
        """The layout of the smallest bucket which holds every rank's tokens and rows."""
        if self.config.num_ranks == 1:
            tokens, rows = plan.num_tokens, len(plan.rows)
        else:
            tokens = int(np.bincount(plan.rank, plan.num_new, 1).max())
            rows = int(np.bincount(plan.rank, minlength=1).max())
        return self._layouts[pick(self.config.buckets, tokens, rows, plan.width)]


def _nothing_to_read(program: Program) -> tuple[object, ...]:
    """A payload of zeros for a program that reads one."""
    return () if program.read is None else (zeros(program.args[-1]),)
