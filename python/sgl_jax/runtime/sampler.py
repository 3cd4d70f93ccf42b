"""Sampler inside the step program: any mix of parameters in one batch, without a recompile.

Parameters apply in Hugging Face's order: logit_bias, penalties, temperature, top_k, top_p, min_p. The last three become one
threshold per line, the smallest logit that is kept. It is read off the CANDIDATES best logits where that is exact, else found
by bisection. Then one uniform number, drawn from the request's seed and the position, picks the token by inverting the
cumulative distribution in vocabulary order. The vocabulary is never sorted. Lines that need more than the best token are
processed in blocks, to bound the [lines, vocabulary] temporaries.

A line is one token to sample. A decoding row has W of them: after its last token and after each of its W - 1 drafts. Lines do
not depend on each other.

With tensor parallelism each device holds a shard of the vocabulary, V here; devices exchange only candidates and sums.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sgl_jax.ops.cpu.library import Library
from sgl_jax.parallel.grid import ONE_DEVICE, MeshAxis
from sgl_jax.request import MAX_LOGPROBS
from sgl_jax.runtime import library_sampler
from sgl_jax.runtime.device_state import IN_PROMPT, DeviceState
from sgl_jax.runtime.grammar_mask import constrain
from sgl_jax.runtime.layout import param_of
from sgl_jax.step_plan import Param, RowFlag

Filters = tuple[Int[Array, " S"], Float[Array, " S"], Float[Array, " S"]]  # top_k, top_p, min_p of each line

CANDIDATES = 64
_BLOCK = 256  # vocabulary entries whose sum or maximum is taken first, to invert the distribution or find the best
_LINES_BYTES = 20 << 20  # float32 logits of a block of lines; VMEM of a TPU holds several such arrays


class Logprobs(NamedTuple):
    """Log probabilities under the model's own distribution, before bias, penalties and temperature. Zeros unless asked for."""

    chosen: jax.Array  # f32[n]
    top_ids: jax.Array  # i32[n, MAX_LOGPROBS], best first
    top_logprobs: jax.Array  # f32[n, MAX_LOGPROBS]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampleLines:
    """Lines of the sampler: one token to sample each."""

    rows: jax.Array  # i32[lines]: row of the device state
    position: jax.Array  # i32[lines]: position of the sampled token in its sequence
    samples: jax.Array  # bool[lines]: False if the token is not used
    params: jax.Array  # i32[lines, len(Param)]
    drafts: jax.Array  # i32[lines, W - 1]: drafts before the line, which penalties count as output; -1: none

    def param(self, column: Param) -> jax.Array:
        return param_of(self.params, column)


def sample(
    logits: Float[Array, "S V"],
    lines: SampleLines,
    state: DeviceState,
    axis: MeshAxis = ONE_DEVICE,
    library: Library | None = None,
) -> Int[Array, " S"]:
    """Return the next token of each of S lines; an arbitrary one for lines that do not sample. `library`: computes it where one
    device has the whole vocabulary."""
    if library is not None and axis.size == 1:
        of_lines = lines.rows, lines.position, lines.samples, lines.params, lines.drafts
        return library_sampler.sample(logits, *of_lines, state, library)
    draws = lines.samples & (lines.param(Param.TEMPERATURE) > 0)
    asked = (has_flag(lines.params, RowFlag.BIAS | RowFlag.PENALTIES | RowFlag.GRAMMAR) | draws).any()
    num_lines, block = len(logits), lines_at_once(logits.shape[-1])
    if num_lines <= block:
        return lax.cond(asked, lambda: _sample(logits, lines, state, axis), lambda: best_token(logits, axis))

    def sample_block(i, tokens):
        first = jnp.minimum(i * block, num_lines - block)  # the last block may repeat lines of the one before
        block_lines = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, block), lines)
        block_logits = lax.dynamic_slice_in_dim(logits, first, block)
        sampled = _sample(block_logits, block_lines, state, axis)
        return lax.dynamic_update_slice_in_dim(tokens, sampled, first, 0)

    def sample_blocks() -> Int[Array, " S"]:
        return lax.fori_loop(0, -(-num_lines // block), sample_block, jnp.zeros(num_lines, jnp.int32))

    return lax.cond(asked, sample_blocks, lambda: best_token(logits, axis))


def lines_at_once(vocab_size: int) -> int:
    """Return how many lines are sampled together: the largest power of two whose float32 logits fit _LINES_BYTES, and at least
    8, which fill one tile of a TPU."""
    return max(8, 1 << (_LINES_BYTES // (4 * vocab_size)).bit_length() - 1)


def _sample(logits: Float[Array, "S V"], lines: SampleLines, state: DeviceState, axis: MeshAxis) -> Int[Array, " S"]:
    logits = _adjust(logits, lines, state, axis)
    greedy = best_token(logits, axis)
    temperature = lines.param(Param.TEMPERATURE)
    random = lines.samples & (temperature > 0)

    def draw() -> Int[Array, " S"]:
        # The best logit becomes 0, so that no temperature, however small, makes it overflow.
        scaled = (logits - axis.max(logits.max(-1, keepdims=True))) / jnp.where(random, temperature, 1.0)[:, None]
        filters = top_k, top_p, min_p = lines.param(Param.TOP_K), lines.param(Param.TOP_P), lines.param(Param.MIN_P)
        filtered = random & ((top_k < logits.shape[-1] * axis.size) | (top_p < 1) | (min_p > 0))
        threshold = lax.cond(
            filtered.any(),
            lambda: jnp.where(filtered, _threshold(scaled, filters, filtered, axis), -jnp.inf),
            lambda: jnp.full(len(scaled), -jnp.inf),
        )
        drawn = _invert(scaled, threshold, uniforms(lines), axis)
        return jnp.where(random, drawn, greedy)

    return lax.cond(random.any(), draw, lambda: greedy)


def token_logprobs(
    logits: Float[Array, "n V"],
    chosen: Int[Array, " n"],
    wanted: Bool[Array, ""],
    axis: MeshAxis = ONE_DEVICE,
    library: Library | None = None,
) -> Logprobs:
    """Return log probabilities of the chosen tokens and of the best ones; zeros unless wanted. `library`: as for `sample`."""
    if library is not None and axis.size == 1:
        return Logprobs(*library_sampler.token_logprobs(logits, chosen, wanted, library))

    def compute() -> Logprobs:
        top = axis.max(logits.max(-1))
        norm = top + jnp.log(axis.sum(jnp.exp(logits - top[:, None]).sum(-1)))
        values, ids = _top_k(logits, MAX_LOGPROBS, axis)
        short = MAX_LOGPROBS - values.shape[-1]
        values = jnp.pad(values - norm[:, None], ((0, 0), (0, short)), constant_values=-jnp.inf)
        local, own = axis.mine(chosen, logits.shape[-1])
        picked = jnp.take_along_axis(logits, local[:, None], axis=-1, mode="clip")[:, 0]
        picked = axis.sum(jnp.where(own, picked, 0.0))
        return Logprobs(picked - norm, jnp.pad(ids, ((0, 0), (0, short))), values)

    return lax.cond(wanted, compute, lambda: no_logprobs(len(logits)))


def no_logprobs(n: int) -> Logprobs:
    wide = (n, MAX_LOGPROBS)
    return Logprobs(jnp.zeros(n, jnp.float32), jnp.zeros(wide, jnp.int32), jnp.zeros(wide, jnp.float32))


def has_flag(params: Int[Array, "rows params"], flag: RowFlag) -> Bool[Array, " rows"]:
    """Return, for each row or line, whether any bit of `flag` is set."""
    return (param_of(params, Param.FLAGS) & int(flag)) != 0


def best_token(x: Float[Array, "S V"], axis: MeshAxis, offsets: Int[Array, " V"] | None = None) -> Int[Array, " S"]:
    """Return the first of the largest logits in the whole vocabulary. `offsets` are added to the ids of this shard."""
    best = lax.platform_dependent(x, cpu=_argmax_by_blocks, default=lambda x: x.argmax(-1))[:, None].astype(jnp.int32)
    values = axis.concatenate(jnp.take_along_axis(x, best, axis=-1))
    ids = best + axis.index() * x.shape[-1]
    ids = axis.concatenate(ids if offsets is None else ids + offsets[best])
    return jnp.take_along_axis(ids, jnp.argmax(values, axis=-1, keepdims=True), axis=-1)[:, 0]


def _argmax_by_blocks(x: Float[Array, "S V"]) -> Int[Array, " S"]:
    """Return the index of the first largest number of each line. XLA for CPU vectorises a maximum, but no argmax."""
    block = math.gcd(x.shape[-1], _BLOCK)
    blocks = x.reshape(len(x), -1, block)
    best = jnp.argmax(blocks.max(-1), axis=-1)
    within = jnp.argmax(jnp.take_along_axis(blocks, best[:, None, None], axis=1)[:, 0], axis=-1)
    return best * block + within


def _top_k(x: Float[Array, "n V"], k: int, axis: MeshAxis) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
    """Return the k largest logits of the whole vocabulary, best first, and their ids; all if there are fewer."""
    # XLA for TPU has an operation for this, but sorts all of x instead if it sees that only parts of the result are used.
    # Hence the barriers; jaxlib 0.11.2 fails to compile one around both results.
    values, ids = map(lax.optimization_barrier, lax.top_k(x, min(k, x.shape[-1])))
    if axis.size > 1:
        values = axis.concatenate(values)
        ids = axis.concatenate(ids + axis.index() * x.shape[-1])
        values, indices = lax.top_k(values, min(k, values.shape[-1]))
        ids = jnp.take_along_axis(ids, indices, axis=-1)
    return values, ids.astype(jnp.int32)


def _adjust(
    logits: Float[Array, "S V"], lines: SampleLines, state: DeviceState, axis: MeshAxis = ONE_DEVICE
) -> Float[Array, "S V"]:
    """Apply logit_bias and held-back stop tokens, then repetition, frequency and presence penalties, then grammars' masks."""
    biased, penalised, bound = (has_flag(lines.params, f) for f in (RowFlag.BIAS, RowFlag.PENALTIES, RowFlag.GRAMMAR))
    # Line by line: for all lines at once XLA for TPU copies all of token_counts for the gather, sorts the indices of the
    # scatter, and takes ten seconds to compile both (benchmarks/LOG.md).

    def add_bias(x):
        rows = lines.rows
        in_force = biased[:, None] & (lines.position[:, None] < state.bias_until[rows])
        values = jnp.where(in_force, state.bias_values[rows], 0.0)
        ids, _ = axis.mine(state.bias_ids[rows], x.shape[-1])
        return lax.map(lambda line: line[0].at[line[1]].add(line[2], mode="drop"), (x, ids, values))

    def penalise(x):
        ids, _ = axis.mine(lines.drafts, x.shape[-1])
        counts = lax.map(lambda line: state.token_counts[line[0]].at[line[1]].add(1, mode="drop"), (lines.rows, ids))
        in_output = counts & (IN_PROMPT - 1)
        repetition = lines.param(Param.REPETITION)[:, None]
        y = jnp.where(counts != 0, jnp.where(x > 0, x / repetition, x * repetition), x)
        y -= lines.param(Param.FREQUENCY)[:, None] * in_output
        y -= lines.param(Param.PRESENCE)[:, None] * (in_output > 0)
        return jnp.where(penalised[:, None], y, x)

    logits = lax.cond(biased.any(), add_bias, lambda x: x, logits)
    logits = lax.cond(penalised.any(), penalise, lambda x: x, logits)
    return lax.cond(bound.any(), lambda x: constrain(x, state.grammar_mask, lines.rows, bound), lambda x: x, logits)


def uniforms(lines: SampleLines) -> Float[Array, " S"]:
    """Return one number in [0, 1) per line, from the request's seed and the sampled position."""

    def one(seed, position):
        return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), position))

    return jax.vmap(one)(lines.param(Param.SEED).astype(jnp.uint32), lines.position)


def _threshold(
    x: Float[Array, "S V"], filters: Filters, filtered: Bool[Array, " S"], axis: MeshAxis = ONE_DEVICE
) -> Float[Array, " S"]:
    """Return the smallest logit that each line keeps. It is the same however the other lines' thresholds are found."""
    top_k, top_p, min_p = filters
    vocab_size = x.shape[-1] * axis.size
    best, _ = _top_k(x, CANDIDATES, axis)  # [S, C], descending
    num_candidates = best.shape[-1]
    weights = jnp.exp(best - best[:, :1])
    k_is_candidate = top_k <= num_candidates
    kth = jnp.take_along_axis(best, jnp.clip(top_k, 1, num_candidates)[:, None] - 1, axis=-1)
    kth = jnp.where(k_is_candidate[:, None], kth, -jnp.inf)
    # Sum over the tokens that top_k keeps, with all that tie with the k-th; over all tokens if k exceeds the candidates.
    mass = axis.sum(jnp.where(x >= kth, jnp.exp(x - best[:, :1]), 0.0).sum(-1))
    goal = jnp.where(top_p >= 1, jnp.inf, top_p * mass)  # else rounding could drop tokens though top_p is off
    in_k = jnp.where(best >= kth, weights, 0.0)
    mass_before = jnp.cumsum(in_k, axis=-1) - in_k
    keep = (best >= kth) & (mass_before < goal[:, None]) & (weights >= min_p[:, None])
    num_kept = jnp.maximum(keep.sum(-1), 1)
    found = jnp.take_along_axis(best, num_kept[:, None] - 1, axis=-1)[:, 0]
    # True where the threshold is among the candidates and `mass` is right.
    exact = k_is_candidate | ((num_kept < num_candidates) & ((top_k >= vocab_size) | (top_p >= 1)))
    return lax.cond(
        (exact | ~filtered).all(), lambda: found, lambda: jnp.where(exact, found, _bisect_threshold(x, filters, axis))
    )


def _bisect_threshold(x: Float[Array, "S V"], filters: Filters, axis: MeshAxis = ONE_DEVICE) -> Float[Array, " S"]:
    """Find the same threshold by bisection over the bits of the logits: exact in 32 passes for top_k and 32 for top_p."""
    top_k, top_p, min_p = filters
    top = axis.max(x.max(-1))
    weights = jnp.exp(x - top[:, None])
    k = jnp.minimum(top_k, x.shape[-1] * axis.size)
    k_cut = _largest(lambda t: axis.sum((x >= t[:, None]).sum(-1)) >= k, len(x))
    in_k = jnp.where(x >= k_cut[:, None], weights, 0.0)
    goal = top_p * axis.sum(in_k.sum(-1))
    p_cut = _largest(lambda t: axis.sum(jnp.where(x >= t[:, None], in_k, 0.0).sum(-1)) >= goal, len(x))
    p_cut = jnp.where(top_p >= 1, -jnp.inf, p_cut)
    return jnp.minimum(jnp.maximum(jnp.maximum(k_cut, p_cut), top + jnp.log(min_p)), top)


def _largest(holds, num_rows: int) -> Float[Array, " S"]:
    """Return the largest float t per line for which holds(t), which must be true for -inf and false above some t."""

    def as_float(order: Int[Array, " S"]) -> Float[Array, " S"]:  # monotonic map from i32
        return lax.bitcast_convert_type(jnp.where(order < 0, order ^ 0x7FFFFFFF, order), jnp.float32)

    infinity = 0x7F800000
    low = jnp.full(num_rows, ~infinity, jnp.int32)  # the order of -inf
    high = jnp.full(num_rows, infinity, jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        ok = holds(as_float(middle))
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    low, _ = lax.fori_loop(0, 32, halve, (low, high))
    return as_float(low)


def _invert(
    x: Float[Array, "S V"], threshold: Float[Array, " S"], uniform: Float[Array, " S"], axis: MeshAxis = ONE_DEVICE
) -> Int[Array, " S"]:
    """Return the token at which the cumulative distribution of the kept logits exceeds `uniform`: first find its device, then
    its block, then the token. The best logit of the whole vocabulary must be 0."""
    num_rows, vocab_size = x.shape
    weights = jnp.where(x >= threshold[:, None], jnp.exp(x), 0.0)
    weights = jnp.pad(weights, ((0, 0), (0, -vocab_size % _BLOCK))).reshape(num_rows, -1, _BLOCK)
    block_sums = weights.sum(-1)
    device_sums = axis.concatenate(block_sums.sum(-1, keepdims=True))
    device, goal = _exceeding(device_sums, uniform * device_sums.sum(-1))
    block, goal = _exceeding(block_sums, goal)
    within, _ = _exceeding(weights[jnp.arange(num_rows), block], goal)
    token = axis.index() * vocab_size + block * _BLOCK + within
    return axis.sum(jnp.where(device == axis.index(), token, 0)).astype(jnp.int32)


def _exceeding(weights: Float[Array, "S n"], goal: Float[Array, " S"]) -> tuple[Int[Array, " S"], Float[Array, " S"]]:
    """Return the first index at which the cumulative weight exceeds the goal, and the goal less the weight before it.

    Never returns an index without weight. Parallel prefix sums are not monotonic, so rounding could otherwise select one.
    """
    cumulative = jnp.cumsum(weights, axis=-1)
    indices = jnp.arange(weights.shape[-1])
    last = jnp.max(jnp.where(weights > 0, indices, 0), axis=-1, keepdims=True)
    index = jnp.min(jnp.where((cumulative > goal[:, None]) & (weights > 0), indices, last), axis=-1)
    before = cumulative[jnp.arange(len(goal)), index - 1]
    return index, jnp.maximum(goal - jnp.where(index > 0, before, 0.0), 0.0)
