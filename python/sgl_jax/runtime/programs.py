"""Programs that a runner dispatches, made from abstract arguments, so that they also compile for absent devices."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np

from sgl_jax.models.adapters import AdapterRoom, Adapters
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.weights import Weights
from sgl_jax.ops.attention.api import AnyPool
from sgl_jax.ops.kernels import Kernels
from sgl_jax.parallel.grid import MeshAxis
from sgl_jax.parallel.placement import Axes, Placement
from sgl_jax.runtime.adapter_arrays import LOAD_ADAPTER, AdapterArrays, ReadAdapter
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.runtime.compiler import Program
from sgl_jax.runtime.device_state import STATE_AXES, DeviceState, StateSizes, initial_state
from sgl_jax.runtime.layout import PlanLayout
from sgl_jax.runtime.loads import LOADS, LoadLayout
from sgl_jax.runtime.placed_weights import weight_axes
from sgl_jax.runtime.pool import Pool
from sgl_jax.runtime.pooling_step import PooledOutputs, pooling_step
from sgl_jax.runtime.sampler import Logprobs
from sgl_jax.runtime.step import StepOutputs, step
from sgl_jax.runtime.step_spec import Drafter, StepSpec
from sgl_jax.step_plan import pages_per_row

# Names of device values.
WEIGHTS, ADAPTERS, KV, STATE, OUTPUTS = "weights", "adapters", "kv", "state", "outputs"
_LEAF = cast(jax.Array, 0)  # stands for an array of a step's outputs
_LOGPROBS = Logprobs(_LEAF, _LEAF, _LEAF)
_OUTPUTS, _POOLED = StepOutputs(_LEAF, _LEAF, _LOGPROBS, _LOGPROBS), PooledOutputs(_LEAF)


@dataclasses.dataclass(frozen=True)
class RunnerConfig:
    compute_dtype: str  # dtype of activations and of products
    weight_dtype: str  # dtype of weights for which no weight format declares another
    pools: tuple[Pool, ...]  # KV pools of one device: the target's, and a draft model's if that has another shape
    page_size: int
    num_pages: int  # P, pages of a layer in each data rank, scratch page included
    num_rows: int  # R, requests running at once on all ranks
    context_length: int
    buckets: tuple[Bucket, ...]  # sizes are per rank
    num_ranks: int = 1  # M
    width: int = 1  # W of the widest bucket
    lookahead: int = 0  # tokens beyond a step's own that its drafter writes KV of
    keeps_tokens: bool = False  # the drafter reads each row's tokens
    takes_grammars: bool = False  # rows may have a mask
    adapters: AdapterRoom | None = None  # None: the launch takes no adapters
    simulated_acceptance: float | None = None  # share of drafts that count whatever is sampled; None: they are verified

    @property
    def overrun(self) -> int:
        """Tokens beyond the context that a row may need pages for (step_plan.pages_per_row)."""
        return 2 * (self.width - 1) + self.lookahead

    @property
    def pages_per_row(self) -> int:
        return pages_per_row(self.context_length, self.width, self.page_size, self.lookahead)

    def state_sizes(self, model: DecoderConfig, num_shards: int = 1) -> StateSizes:
        """Return the sizes of the row state. Drafts are computed beyond the context, like pages (step_plan.pages_per_row). No
        tokens are counted in a launch that makes vectors."""
        has_features = model.draft is not None and model.draft.kind != "standalone"
        return StateSizes(
            self.num_rows,
            self.pages_per_row,
            num_shards if model.pooling else model.vocab_size,
            self.width,
            num_tokens=self.context_length + 2 * self.width if self.keeps_tokens else 1,
            feature_dim=model.draft.decoder.hidden_size if has_features and model.draft else 1,
            feature_dtype=self.compute_dtype,
            takes_grammars=self.takes_grammars,
            num_shards=num_shards,
        )

    def layout(self, bucket: Bucket) -> PlanLayout:
        return PlanLayout(bucket, self.page_size, self.num_rows, self.num_ranks, self.lookahead)

    def loads(self, model: DecoderConfig) -> list[LoadLayout]:
        """Return the layouts of row loads, one for each kind."""
        sizes = self.state_sizes(model)
        absent = {"tokens": not self.keeps_tokens, "mask": not self.takes_grammars}
        absent |= dict.fromkeys(("counts", "bias"), model.pooling is not None)
        kinds = [kind for kind in LOADS if not absent.get(kind.name)]
        return [LoadLayout(kind, self.num_rows, kind.size(sizes)) for kind in kinds]


def make_programs(
    model: DecoderConfig,
    config: RunnerConfig,
    kernels: Kernels,
    placement: Placement,
    weights: Weights[jax.ShapeDtypeStruct],
    drafter: Drafter | None = None,
    read_adapter: ReadAdapter | None = None,
) -> list[Program]:
    """Make every program of a launch, small buckets first. `weights` are abstract, with their shardings. `read_adapter` reads
    an adapter from its source, where programs are to be run."""
    grid = placement.grid
    limits = config.num_pages, config.compute_dtype
    spec = StepSpec(model.shard(grid), kernels, *limits, grid, drafter, config.adapters, config.simulated_acceptance)
    axes, kv_axes = weight_axes(model, stacked=weights.stacked), [pool.order.axes for pool in config.pools]
    kv, state = abstract_kv(config, placement), abstract_state(model, config, placement)
    slots = adapter_arrays(model, config, placement, stacked=weights.stacked)
    adapters, adapter_axes = (slots.abstract, slots.axes) if slots else (None, None)
    programs, (body, results) = [], (pooling_step, _POOLED) if model.pooling else (step, _OUTPUTS)
    for bucket in sorted(config.buckets):
        layout, overlaps = config.layout(bucket), bucket.num_parts > 1
        of_bucket = dataclasses.replace(spec, grid=dataclasses.replace(grid, sequence=True)) if overlaps else spec
        function = functools.partial(body, spec=of_bucket, layout=layout)
        function = placement.run(function, (axes, adapter_axes, kv_axes, STATE_AXES, ()), (kv_axes, STATE_AXES, ()))
        jitted = jax.jit(_named(function, step_name(bucket)), donate_argnums=(2, 3))
        args = weights, adapters, kv, state, _vector(layout.size, placement)
        takes, gives = (WEIGHTS, ADAPTERS, KV, STATE), (KV, STATE, OUTPUTS)
        outputs = kv, state, results
        programs.append(Program(step_name(bucket), jitted, args, takes, gives, outputs=outputs, overlaps=overlaps))
    for load in config.loads(model):
        run = functools.partial(_load, load=load, axis=grid.all_axes)
        run = _named(placement.run(run, (STATE_AXES, ()), (STATE_AXES,)), load.kind.program)
        jitted = jax.jit(run, donate_argnums=0)
        args = state, _vector(load.size, placement)
        programs.append(Program(load.kind.program, jitted, args, (STATE,), (STATE,), outputs=(state,)))
    if slots is not None:
        run = _named(placement.run(slots.load, (adapter_axes, (), ("devices",)), (adapter_axes,)), LOAD_ADAPTER)
        args = adapters, _vector(1, placement), slots.abstract_vectors
        jitted, values = jax.jit(run, donate_argnums=0), (ADAPTERS,)
        programs.append(Program(LOAD_ADAPTER, jitted, args, values, values, read_adapter, outputs=(adapters,)))
    return programs


def adapter_arrays(
    model: DecoderConfig, config: RunnerConfig, placement: Placement, *, stacked: bool
) -> AdapterArrays | None:
    """Return the forms of a launch's adapters; None without any."""
    if config.adapters is None:
        return None
    return AdapterArrays(model, config.adapters, config.compute_dtype, placement, stacked)


def _named[**P, R](function: Callable[P, R], name: str) -> Callable[P, R]:
    """Return the function with a name of its own. Profiles tell compiled programs apart by it."""

    def named(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    named.__name__ = re.sub(r"\W+", "_", name)
    return named


def _load(state: DeviceState, vector: jax.Array, *, load: LoadLayout, axis: MeshAxis) -> tuple[DeviceState]:
    return (load.run(state, vector, axis=axis),)


def step_name(bucket: Bucket) -> str:
    width = f" width={bucket.width}" if bucket.width > 1 else ""
    return f"tokens={bucket.num_tokens} rows={bucket.num_rows}{width}"


def abstract_kv(config: RunnerConfig, placement: Placement) -> list[jax.ShapeDtypeStruct]:
    def abstract(pool: Pool) -> jax.ShapeDtypeStruct:
        shape = placement.whole_shape(pool.shape(config.num_pages, config.page_size), pool.order.axes)
        return jax.ShapeDtypeStruct(shape, np.dtype(pool.dtype), sharding=placement.sharding(pool.order.axes))

    return [*map(abstract, config.pools)]


def abstract_state(model: DecoderConfig, config: RunnerConfig, placement: Placement) -> DeviceState:
    def place(x: jax.Array, axes: Axes) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement.sharding(axes))

    return jax.tree.map(place, jax.eval_shape(_initial_state(model, config, placement)), STATE_AXES)


def pool_makers(
    config: RunnerConfig, placement: Placement, make_pool: Callable[[tuple[int, ...], str], AnyPool]
) -> list[Callable[[], jax.Array]]:
    """Return functions that make the KV pools of every device, with the attention backend's. Each compiles once."""

    def maker(pool: Pool) -> Callable[[], jax.Array]:
        axes, shape = pool.order.axes, pool.shape(config.num_pages, config.page_size)
        on_each = placement.run(lambda: make_pool(shape, pool.dtype), (), axes)
        return jax.jit(on_each, out_shardings=placement.sharding(axes))

    return [*map(maker, config.pools)]


def empty_adapters(
    model: DecoderConfig, config: RunnerConfig, placement: Placement, *, stacked: bool
) -> Adapters[jax.Array] | None:
    """Make the adapters' slots on their devices, with zeros; None in a launch without."""
    slots = adapter_arrays(model, config, placement, stacked=stacked)
    return None if slots is None else zeros(slots.abstract)


def empty_state(model: DecoderConfig, config: RunnerConfig, placement: Placement) -> DeviceState:
    """Make the state without rows on its devices."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(model, config, placement))
    return jax.jit(_initial_state(model, config, placement), out_shardings=shardings)()


def _initial_state(model: DecoderConfig, config: RunnerConfig, placement: Placement) -> Callable[[], DeviceState]:
    return functools.partial(initial_state, config.state_sizes(model, placement.grid.num_devices))


def _vector(size: int, placement: Placement) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size,), np.int32, sharding=placement.sharding())


def zeros(abstract: Any) -> Any:
    """Make zeros of the shapes, dtypes and shardings of a tree of abstract arrays, on their devices."""
    make = functools.partial(jax.tree.map, lambda x: jax.numpy.zeros(x.shape, x.dtype), abstract)
    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))()
