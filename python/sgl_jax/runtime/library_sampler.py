"""Sampler and log probabilities by the library for CPUs (ops/cpu/sampling.cc), where one device has the whole vocabulary.

It computes what runtime/sampler.py says, each line by itself. The sampler of plain XLA consists of a hundred small kernels, which
are most of what a step program takes to compile on a CPU; this is one call.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sgl_jax.ops.cpu.library import Library
from sgl_jax.request import MAX_LOGPROBS
from sgl_jax.runtime.device_state import IN_PROMPT, DeviceState
from sgl_jax.step_plan import Param, RowFlag

_COLUMNS = np.array(
    [
        Param.SEED,
        Param.FLAGS,
        Param.TOP_K,
        Param.TEMPERATURE,
        Param.TOP_P,
        Param.MIN_P,
        Param.PRESENCE,
        Param.FREQUENCY,
        Param.REPETITION,
    ],
    np.int64,
)
_FLAGS = np.array([RowFlag.BIAS, RowFlag.PENALTIES, RowFlag.GRAMMAR], np.int64)


def sample(
    logits: Float[Array, "S V"],
    rows: Int[Array, " S"],
    position: Int[Array, " S"],
    samples: Bool[Array, " S"],
    params: Int[Array, "S params"],
    drafts: Int[Array, "S D"],
    state: DeviceState,
    library: Library,
) -> Int[Array, " S"]:
    """Return the next token of each line; 0 for lines that do not sample. The arguments are those of SampleLines."""
    call = jax.ffi.ffi_call(library.sample, jax.ShapeDtypeStruct((len(logits),), jnp.int32))
    of_rows = state.token_counts, state.bias_ids, state.bias_values, state.bias_until, state.grammar_mask
    options = {"columns": _COLUMNS, "flags": _FLAGS, "in_prompt": np.int64(IN_PROMPT)}
    return call(logits, rows, position, samples, params, drafts, *of_rows, **options)


def token_logprobs(
    logits: Float[Array, "n V"], chosen: Int[Array, " n"], wanted: Bool[Array, ""], library: Library
) -> tuple[Float[Array, " n"], Int[Array, "n K"], Float[Array, "n K"]]:
    """Return what Logprobs holds; zeros unless wanted."""
    n = len(logits)
    shapes = ((n,), jnp.float32), ((n, MAX_LOGPROBS), jnp.int32), ((n, MAX_LOGPROBS), jnp.float32)
    call = jax.ffi.ffi_call(library.logprobs, [jax.ShapeDtypeStruct(*each) for each in shapes])
    own, ids, values = call(logits, chosen, wanted.reshape(1))
    return own, ids, values
