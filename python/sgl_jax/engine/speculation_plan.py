"""Decisions of a launch about speculative decoding: how many drafts, for how many requests at once, and by which drafter."""

import dataclasses
import functools
import logging
from collections.abc import Mapping

from sgl_jax.models.checkpoint import Checkpoint, open_checkpoint
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.draft_checkpoint import describe, draft_config
from sgl_jax.models.families import Families
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.stored import StoredTensor
from sgl_jax.models.weights import draft_parameters, parameters_per_token
from sgl_jax.runtime import drafters
from sgl_jax.runtime.platform import Platform
from sgl_jax.runtime.step_spec import Drafter
from sgl_jax.settings.server_args import ServerArgs
from sgl_jax.settings.speculation import Speculation

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SpeculationPlan:
    width: int = 1  # W, the last token and the drafts that a step computes in each decoding row
    max_rows: int = 1  # decoding rows of a data rank up to which steps have this width
    lookahead: int = 0  # tokens beyond a step's own whose KV the drafter writes
    keeps_tokens: bool = False  # the drafter reads each row's tokens
    draft_cost: float = 0.0  # time that drafts are expected to take, in steps of width 1


def plan_speculation(
    wanted: Speculation | None, model: DecoderConfig, platform: Platform, num_ranks: int
) -> SpeculationPlan:
    """Decide how wide steps are. The tokens of all data ranks are multiplied together. Beyond the device's ridge, where a step
    begins to be limited by its products, each draft costs as much as a token, so more rows than that do not speculate."""
    if wanted is None:
        return SpeculationPlan()
    num_drafts = wanted.num_drafts or platform.ngram_drafts
    width = num_drafts + 1
    by_model = model.draft is not None
    return SpeculationPlan(
        width,
        wanted.max_batch_size or max(1, platform.ridge_tokens // (width * num_ranks)),
        lookahead=num_drafts if by_model else 0,
        keeps_tokens=not by_model,
        draft_cost=num_drafts * draft_parameters(model) / parameters_per_token(model),
    )


def draft_model_name(args: ServerArgs) -> str:
    """Return the name of the model that makes drafts, for messages; empty: there is none."""
    wanted = args.speculation
    if wanted is None or wanted.algorithm == "NGRAM":
        return ""
    return wanted.draft_model_path or f"the MTP layers of {args.model_path}"


def with_draft(
    args: ServerArgs, model: DecoderConfig, families: Families, stored: Mapping[str, StoredTensor], *, dummy: bool
) -> tuple[DecoderConfig, Checkpoint | None]:
    """Return the model, which has the `stored` tensors, with a description of its draft model, and the draft model's checkpoint
    if it has one of its own; with `dummy` its config alone. Raises ModelError for a draft model that does not fit."""
    wanted = args.speculation
    if wanted is None or wanted.algorithm == "NGRAM":
        return model, None
    path, load_format = wanted.draft_model_path, "dummy" if dummy else "auto"
    checkpoint = open_checkpoint(path, load_format=load_format, downloads=args.downloads) if path else None
    draft = draft_config(checkpoint, model, wanted.algorithm, families, stored)
    if (draft.decoder.mla is None) != (model.mla is None):
        raise ModelError(f"{path}: one of the model and its draft model has latent attention; both or neither must")
    logger.info("Drafts come from the %s", describe(draft))
    return dataclasses.replace(model, draft=draft), checkpoint


def drafter_of(wanted: Speculation | None) -> Drafter | None:
    """Return the function that makes drafts inside a step."""
    if wanted is None:
        return None
    if wanted.algorithm == "NGRAM":
        return functools.partial(drafters.by_ngram, min_ngram=wanted.min_ngram, max_ngram=wanted.max_ngram)
    return drafters.by_model
