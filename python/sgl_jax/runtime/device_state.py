"""State that a running row keeps on the device between steps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sgl_jax.parallel.grid import ONE_DEVICE, MeshAxis
from sgl_jax.request import MAX_EOS_TOKENS, MAX_LOGIT_BIAS, MAX_STOP_TOKENS

BIAS_WIDTH = MAX_LOGIT_BIAS + MAX_STOP_TOKENS + MAX_EOS_TOKENS
IN_PROMPT = 1 << 30  # bit of a token count: the token occurs in the prompt
NO_DRAFT = -1  # a draft that no sampled token equals


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceState:
    """Arrays with R rows and a spare last one, which padding reads and writes. B = BIAS_WIDTH; W of the widest bucket. What no
    drafter of the launch reads has one column."""

    length: jax.Array  # i32[R + 1]: tokens whose KV is final; the next step of a decoding row starts here
    last_token: jax.Array  # i32[R + 1]: the token at that position, sampled last
    draft: jax.Array  # i32[R + 1, max(W - 1, 1)]: guesses at the tokens that follow it, or NO_DRAFT
    tokens: jax.Array  # i32[R + 1, C]: all tokens of the row, for n-grams
    feature: jax.Array  # [R + 1, D]: the draft model's feature of the token before last_token
    page_table: jax.Array  # i32[R + 1, pages]
    token_counts: jax.Array  # i32[R + 1, V]: times in the output, plus IN_PROMPT; for rows with penalties
    bias_ids: jax.Array  # i32[R + 1, B]: tokens whose logit changes, for rows with RowFlag.BIAS
    bias_values: jax.Array  # f32[R + 1, B]
    bias_until: jax.Array  # i32[R + 1, B]: the bias applies to sampled positions below it
    grammar_mask: jax.Array  # bool[R + 1, V]: tokens that may come next, for rows with RowFlag.GRAMMAR


_REPLICATED: Any = ()
_VOCAB_SHARDED: Any = (None, "vocab")
# Logical axes of each array.
STATE_AXES = DeviceState(**{each.name: _REPLICATED for each in dataclasses.fields(DeviceState)})
STATE_AXES = dataclasses.replace(STATE_AXES, token_counts=_VOCAB_SHARDED, grammar_mask=_VOCAB_SHARDED)


@dataclasses.dataclass(frozen=True)
class StateSizes:
    """Sizes of a launch's row state."""

    num_rows: int  # R
    pages_per_row: int
    vocab_size: int  # V, of one device's shard or of all
    width: int = 1  # W
    # At least one column each: jaxlib 0.11.2 crashes when it compiles a program with an empty array on several devices.
    num_tokens: int = 1  # C
    feature_dim: int = 1  # D
    feature_dtype: str = "float32"
    takes_grammars: bool = False
    num_shards: int = 1  # devices over which the columns of tokens are divided: an array that nobody reads has as many

    @property
    def nbytes(self) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(lambda: initial_state(self))))


def initial_state(sizes: StateSizes) -> DeviceState:
    """Make the state of empty rows and the spare one."""
    n = sizes.num_rows + 1
    return DeviceState(
        length=jnp.zeros(n, jnp.int32),
        last_token=jnp.zeros(n, jnp.int32),
        draft=jnp.full((n, max(sizes.width - 1, 1)), NO_DRAFT, jnp.int32),
        tokens=jnp.zeros((n, sizes.num_tokens), jnp.int32),
        feature=jnp.zeros((n, sizes.feature_dim), sizes.feature_dtype),
        page_table=jnp.zeros((n, sizes.pages_per_row), jnp.int32),
        token_counts=jnp.zeros((n, sizes.vocab_size), jnp.int32),
        bias_ids=jnp.zeros((n, BIAS_WIDTH), jnp.int32),
        bias_values=jnp.zeros((n, BIAS_WIDTH), jnp.float32),
        bias_until=jnp.zeros((n, BIAS_WIDTH), jnp.int32),
        grammar_mask=jnp.zeros((n, sizes.vocab_size if sizes.takes_grammars else sizes.num_shards), jnp.bool_),
    )


def apply_page_updates(state: DeviceState, updates: Int[Array, "3 U"]) -> DeviceState:
    """Set entries of the page tables: (row, index, page) for each of U updates."""
    row, index, page = updates
    return dataclasses.replace(state, page_table=state.page_table.at[row, index].set(page))


def store_samples(
    state: DeviceState,
    rows: Int[Array, " S"],
    length: Int[Array, " S"],
    tokens: Int[Array, "S W"],
    num_accepted: Int[Array, " S"],
    samples: Bool[Array, " S"],
    counted: Bool[Array, " S"],
    axis: MeshAxis = ONE_DEVICE,
) -> DeviceState:
    """Store each row's length and, if it samples, its last accepted token. Accepted tokens of `counted` rows are counted."""
    accepted = jnp.arange(tokens.shape[1]) < num_accepted[:, None]
    ids, _ = axis.mine(tokens, state.token_counts.shape[-1])
    added = (accepted & (counted & samples)[:, None]).astype(jnp.int32)
    last = jnp.take_along_axis(tokens, num_accepted[:, None] - 1, axis=1)[:, 0]
    return dataclasses.replace(
        state,
        length=state.length.at[rows].set(length),
        last_token=state.last_token.at[rows].set(jnp.where(samples, last, state.last_token[rows])),
        token_counts=state.token_counts.at[rows[:, None], ids].add(added, mode="drop"),
    )
