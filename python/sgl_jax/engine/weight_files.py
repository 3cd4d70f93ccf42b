"""Reads a model's weights: at the launch, and again from other files while it serves."""

import dataclasses
import functools
import textwrap
from collections.abc import Mapping

import jax

from sgl_jax.engine.kv_cache import with_kv_dtype
from sgl_jax.engine.pooling_plan import pooling_of, with_pooling
from sgl_jax.engine.quantisation import held
from sgl_jax.engine.speculation_plan import with_draft
from sgl_jax.models.checkpoint import Checkpoint, LoadFormat, open_checkpoint
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.families import Families, decoder_config
from sgl_jax.models.loader import Placer, Report, load_weights, random_weights
from sgl_jax.models.model_errors import ModelError
from sgl_jax.models.weights import Weights, declare
from sgl_jax.parallel.placement import Placement
from sgl_jax.runtime.held_arrays import Put, ReadWeights
from sgl_jax.runtime.host_weights import HostPlacer, stack_host_layers
from sgl_jax.runtime.placed_weights import DevicePlacer
from sgl_jax.runtime.platform import Platform
from sgl_jax.settings.server_args import ServerArgs

_MAY_DIFFER = ("eos_token_ids", "draft")  # the launch's stay
_FORMATS: Mapping[str, LoadFormat] = {"auto": "auto", "safetensors": "safetensors", "gguf": "gguf"}


def describe_model(
    args: ServerArgs, families: Families, checkpoint: Checkpoint, platform: Platform, device_kind: str, *, dummy: bool
) -> tuple[DecoderConfig, Checkpoint | None]:
    """Return a checkpoint's model as the launch holds it, and the checkpoint of its draft model, if it has one of its own."""
    model = decoder_config(checkpoint.config, checkpoint.generation_config, checkpoint.tensors, families)
    model = with_pooling(args, model.for_context(args.context_length), checkpoint)
    model, draft = with_draft(args, model, families, checkpoint.tensors, dummy=dummy)
    return with_kv_dtype(args, held(args, model, platform, device_kind)), draft


def read_weights[Placed](
    checkpoint: Checkpoint,
    draft: Checkpoint | None,
    model: DecoderConfig,
    families: Families,
    dtype: str,
    seed: int,
    placer: Placer[Placed],
    report: Report | None = None,
) -> Weights[Placed]:
    """Read the weights, or make random ones for --load-format dummy."""
    if checkpoint.format == "dummy":
        return random_weights(model, dtype, seed, placer=placer, report=report)
    # A quantised GGUF stands for the weights of the model it was made from, whatever the dtype.
    rounded_to = checkpoint.dtype if checkpoint.format == "gguf" and model.weight_scheme is None else None
    return load_weights(
        checkpoint, model, dtype, draft=draft, families=families, rounded_to=rounded_to, placer=placer, report=report
    )


def other_weights(
    args: ServerArgs,
    families: Families,
    model: DecoderConfig,
    dtype: str,
    platform: Platform,
    device_kind: str,
    placement: Placement,
) -> ReadWeights:
    """Return a function that reads, from a folder, a file or a hub id, other weights of the launch's model into the host's
    memory."""
    placer = HostPlacer(DevicePlacer(placement))

    def read(path: str, load_format: str) -> list[Put]:
        if model.kv_dtype == "int8":
            cure = "start a launch for them, or this one with a KV cache of float8"
            raise ModelError(f"--kv-cache-dtype int8 has scales that were measured on the launch's weights: {cure}")
        checkpoint = open_checkpoint(path, load_format=_FORMATS[load_format], downloads=args.downloads)
        found, draft = describe_model(args, families, checkpoint, platform, device_kind, dummy=False)
        _check_same(found, model)
        if (pooling := pooling_of(args, found, checkpoint)) is not None and pooling.kind != "embed":
            raise ModelError(
                f"--task is {pooling.kind}; the head's weights cannot be exchanged: start a launch of them"
            )
        weights = read_weights(checkpoint, draft, model, families, dtype, 0, placer)
        if platform.stacks_layers:
            weights = stack_host_layers(weights, declare(model, dtype, stacked=True))
        return [functools.partial(each.put) for each in jax.tree.leaves(weights)]

    return read


def _check_same(found: DecoderConfig, launched: DecoderConfig) -> None:
    """Raises ModelError for a model that differs from the launch's in more than its weights."""
    for field in dataclasses.fields(launched):
        theirs, ours = getattr(found, field.name), getattr(launched, field.name)
        if field.name not in _MAY_DIFFER and theirs != ours:
            theirs, ours = (textwrap.shorten(str(each), 80, placeholder="…") for each in (theirs, ours))
            cure = "weights of the same model can be taken, another model needs a launch"
            raise ModelError(f"its {field.name} is {theirs}, and that of the launch {ours}; {cure}")
