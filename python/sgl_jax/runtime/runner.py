"""Runner of the compiled programs, and owner of the weights, KV pool and row state on the device."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast

import jax
import numpy as np

from sgl_jax.models.adapters import Adapters
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.weights import Weights
from sgl_jax.ops.kernels import Kernels
from sgl_jax.parallel.placement import Placement
from sgl_jax.runtime import programs
from sgl_jax.runtime.adapter_arrays import LOAD_ADAPTER
from sgl_jax.runtime.adapter_copies import HOST_CALLS, AdapterCopies
from sgl_jax.runtime.buckets import Bucket, pick
from sgl_jax.runtime.compiler import Compiled, CompileWatch, Kept, Program, compile_all, matmul_precision
from sgl_jax.runtime.device_state import DeviceState
from sgl_jax.runtime.layout import PlanLayout
from sgl_jax.runtime.loads import pack_loads
from sgl_jax.runtime.placed_weights import abstract_weights
from sgl_jax.runtime.pooling_step import PooledOutputs, PoolingFlight
from sgl_jax.runtime.programs import ADAPTERS, KV, OUTPUTS, STATE, WEIGHTS, RunnerConfig, step_name, zeros
from sgl_jax.runtime.sampler import Logprobs
from sgl_jax.runtime.step import StepOutputs
from sgl_jax.runtime.step_spec import Drafter, Pools
from sgl_jax.runtime.tracing import JaxTracer
from sgl_jax.step_plan import StepPlan, StepTokens, TokenScores, empty_plan

# Called right before a program runs, with its name, its vector and the source of its payload ("" without one).
type Announce = Callable[[str, np.ndarray, str], None]
type Report = Callable[[int, int, Compiled], None]
type DeviceValue = Weights[jax.Array] | Adapters[jax.Array] | DeviceState | StepOutputs | PooledOutputs | Pools | None
_FIRST_ANSWER_S = 1.0  # in which nothing is compiled behind, because tracing and requests share the interpreter


def announce_to_nobody(program: str, vector: np.ndarray, source: str) -> None:
    """Do nothing: the Announce of a runner whose devices all belong to this process."""


@dataclasses.dataclass(frozen=True)
class InFlight:
    """Launched step that has not been collected."""

    plan: StepPlan
    outputs: StepOutputs
    rows: np.ndarray | slice  # indices of the plan's rows in the padded outputs
    tokens: np.ndarray | slice  # likewise of its tokens

    def collect(self) -> StepTokens:
        """Wait for the step and copy its tokens to the host; logprobs only if a row asked for them."""
        plan, outputs = self.plan, self.outputs
        if plan.width == 1:  # always one token without drafts, and a transfer costs
            num_accepted, num_drafted = np.ones(len(plan.rows), np.int32), np.zeros(len(plan.rows), np.int32)
        else:
            num_accepted, num_drafted = np.asarray(outputs.counts)[self.rows].T
        return StepTokens(
            np.asarray(outputs.tokens)[self.rows],
            num_accepted,
            num_drafted,
            _scores(outputs.logprobs, self.rows, plan.width) if plan.wants_logprobs else None,
            _scores(outputs.prompt_logprobs, self.tokens) if plan.wants_prompt_logprobs else None,
        )


def _scores(found: Logprobs, indices: np.ndarray | slice, width: int = 1) -> TokenScores:
    """Copy the scores of these rows or tokens to the host; `found` has `width` lines for each."""
    arrays = (np.asarray(each) for each in found)
    return TokenScores(*(x.reshape(-1, width, *x.shape[1:])[indices].reshape(-1, *x.shape[1:]) for x in arrays))


class ModelRunner:
    """Runs steps and loads. `compile` and `start` make it ready. Programs compile from abstract weights, so the weights may
    be read at the same time, and steps run for which the programs are there."""

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
        kept: Kept | None = None,
        adapters: AdapterCopies | None = None,
    ):
        """`adapters`: copies in the hosts' memory, in a launch that takes any."""
        self.config = config
        self.watch = CompileWatch()
        weights = abstract_weights(model, config.weight_dtype, placement, stacked=stacks_layers)
        read_adapter = adapters.vectors if adapters is not None else None
        self.programs = programs.make_programs(model, config, kernels, placement, weights, drafter, read_adapter)
        self.tracer = JaxTracer()
        self._model = model
        self._kept = kept
        self._devices = [*placement.mesh.devices.flat]
        self._placement = placement
        self._announce = announce
        self._adapters = adapters
        self._pool_makers = programs.pool_makers(config, placement, kernels.attention.make_pool)
        self._layouts = {bucket: config.layout(bucket) for bucket in config.buckets}
        self._loads = config.loads(model)
        self._by_name = {program.name: program for program in self.programs}
        self._calls: dict[str, jax.stages.Compiled] = {}  # programs that are compiled
        self._buckets: tuple[Bucket, ...] = ()  # compiled ones
        self._compiling: list[Future[None]] = []
        self._begin_others: Callable[[], object] | None = None  # compiles what waits for the end of `start`
        self.stopped = threading.Event()
        self._values: dict[str, DeviceValue] = {}
        self._compiles_when_ready = 0

    @property
    def compiles_after_ready(self) -> int:
        return self.watch.count - self._compiles_when_ready

    @property
    def pools(self) -> Pools:
        """The KV pools, until the next step takes them."""
        return cast(Pools, self._values[KV])

    @property
    def num_compiling(self) -> int:
        """Programs that are not compiled yet. Raises the error of one that cannot be."""
        left = len(self.programs) - len(self._calls)
        for each in self._compiling if left else ():
            if each.done():
                each.result()
        return left

    def num_needed(self, behind: bool) -> int:
        """Return how many programs `compile` makes before requests can run."""
        return len(by_need(self.programs, self.config.buckets)[0]) if behind else len(self.programs)

    def compile(self, report: Report, *, behind: bool = False) -> Future[None]:
        """Begin to compile every program in threads, until `close`. With `behind` only those that requests need; a thread of
        low priority compiles the others from the end of `start` on. `report`: as for compile_all."""
        needed, others = by_need(self.programs, self.config.buckets)
        self._begin_others = functools.partial(self._begin, others, report, behind=True) if behind else None
        return self._begin(needed if behind else [*needed, *others], report)

    def _begin(self, programs: Sequence[Program], report: Report, behind: bool = False) -> Future[None]:
        thread = ThreadPoolExecutor(1, thread_name_prefix="sgl-jax-compile")
        self._compiling.append(thread.submit(self._compile, programs, report, behind))
        thread.shutdown(wait=False)
        return self._compiling[-1]

    def _compile(self, programs: Sequence[Program], report: Report, behind: bool) -> None:
        def keep(done: int, total: int, compiled: Compiled) -> None:
            self._calls[compiled.program.name] = compiled.call
            self._buckets = tuple(bucket for bucket in self.config.buckets if step_name(bucket) in self._calls)
            report(done, total, compiled)

        if behind:
            self.stopped.wait(_FIRST_ANSWER_S)
        with jax.default_matmul_precision(matmul_precision(self.config.compute_dtype)):
            compile_all(programs, self.watch, keep, stopped=self.stopped, behind=behind, kept=self._kept)

    def close(self) -> None:
        """Begin to compile no further program. Those that are being compiled hold up nothing but the interpreter's end."""
        self.stopped.set()

    def start(self, weights: Weights[jax.Array], barrier: Callable[[], object] = lambda: None) -> None:
        """Make the KV pool and row state, and run each compiled program once, since the first run takes longer. Where programs
        are compiled behind, each runs for a request first: that costs a CPU 0.2 s at most, and running a large step more.

        `barrier` waits until every process has compiled: a collective would not wait for minutes.
        """
        self._values = {
            WEIGHTS: weights,
            ADAPTERS: programs.empty_adapters(self._model, self.config, self._placement, stacked=weights.stacked),
            KV: self.empty_pools(),
            STATE: programs.empty_state(self._model, self.config, self._placement),
        }
        barrier()
        if self._begin_others is None:
            self._run_once()
        jax.block_until_ready(self._values[STATE])
        self._compiles_when_ready = self.watch.count
        if self._begin_others is not None:
            self._begin_others()

    def _run_once(self) -> None:
        empty_steps = {
            step_name(bucket): layout.pack(empty_plan(self.config.num_ranks, bucket.width))
            for bucket, layout in self._layouts.items()
        }
        for program in [each for each in self.programs if each.name in self._calls]:
            vector = empty_steps.get(program.name, np.zeros(program.vector_shape, np.int32))
            payload = program.args[len(program.takes) + 1 :]
            jax.block_until_ready(self._call(program, vector, *map(zeros, payload)))

    def empty_pools(self) -> Pools:
        return [make() for make in self._pool_makers]

    def take(self, name: str) -> DeviceValue:
        """Take a device value away, once it is computed. No program runs until it has come back with `give`."""
        return jax.block_until_ready(self._values.pop(name))

    def give(self, name: str, value: DeviceValue) -> None:
        self._values[name] = value

    def can_launch(self, plan: StepPlan) -> bool:
        """Whether a step's row loads and a bucket that holds it are compiled."""
        if not self.num_compiling:
            return True
        try:
            self._layout(plan)
        except ValueError:  # no compiled bucket holds it
            return False
        if plan.adapter_loads and LOAD_ADAPTER not in self._calls:
            return False
        return all(program in self._calls for program, _ in pack_loads(self._loads, plan.loads))

    def launch(self, plan: StepPlan) -> InFlight | PoolingFlight:
        """Start a step with one copy to the device and one dispatch, after one dispatch for each kind of row load in it, and for
        each adapter that it puts into a slot."""
        for slot, source in plan.adapter_loads:
            self.run(LOAD_ADAPTER, np.array([slot], np.int32), source)
        for program, vector in pack_loads(self._loads, plan.loads):
            self.run(program, vector)
        layout = self._layout(plan)
        outputs = self.run(step_name(layout.bucket), layout.pack(plan))
        rows, tokens = layout.padded_indices(plan)
        if isinstance(outputs, PooledOutputs):
            return PoolingFlight(plan, outputs, rows, wants_all=self._model.pooling == "mean")
        assert isinstance(outputs, StepOutputs)
        return InFlight(plan, outputs, rows, tokens)

    def run(self, name: str, vector: np.ndarray, source: str = "") -> DeviceValue:
        """Announce a program to the other processes and run it here. Return its result, if it has one."""
        self._announce(name, vector, source)
        return self.execute(name, vector, source)

    def execute(self, name: str, vector: np.ndarray, source: str = "") -> DeviceValue:
        """Run a program, with the payload read from the source, or do what host 0 asks of adapters in memory. Return its result,
        if it has one."""
        if name in HOST_CALLS and self._adapters is not None:
            return self._adapters.carry_out(name, source)
        program = self._by_name[name]
        payload = () if program.read is None else (program.read(source),)
        return self._call(program, vector, *payload)

    def _call(self, program: Program, vector: np.ndarray, *payload: object) -> DeviceValue:
        """Run a compiled program and keep the device values it gives."""
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
        """Return the layout of the smallest compiled bucket that holds every rank's tokens and rows."""
        if self.config.num_ranks == 1:
            tokens, rows = plan.num_tokens, len(plan.rows)
        else:
            tokens = int(np.bincount(plan.rank, plan.num_new, 1).max())
            rows = int(np.bincount(plan.rank, minlength=1).max())
        return self._layouts[pick(self._buckets, tokens, rows, plan.width)]


def by_need(programs: Sequence[Program], buckets: Sequence[Bucket]) -> tuple[list[Program], list[Program]]:
    """Divide programs into those that requests need, the soonest first, and the others. Needed are, for each width, the smallest
    step, which decodes, and the largest, which can stand in for every other; and the row loads."""
    ordered = sorted(buckets)
    smallest = {bucket.width: step_name(bucket) for bucket in reversed(ordered)}
    largest = {bucket.width: step_name(bucket) for bucket in ordered}
    steps = {program.name: program for program in programs if OUTPUTS in program.gives}
    loads = [program for program in programs if OUTPUTS not in program.gives]
    first = dict.fromkeys((*smallest.values(), *largest.values()))
    return [*map(steps.__getitem__, first), *loads], [each for name, each in steps.items() if name not in first]
