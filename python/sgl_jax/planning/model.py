"""Models of plans: a path or a hub id as the server takes it, or the name of a bundled config.json."""

import dataclasses
from pathlib import Path

from sgl_jax.engine.kv_cache import with_kv_dtype
from sgl_jax.engine.speculation_plan import with_draft
from sgl_jax.models.bundled import PREFIX, bundled
from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.families import decoder_config, known_families
from sgl_jax.settings.hub import HUGGING_FACE, Downloads
from sgl_jax.settings.server_args import ServerArgs


@dataclasses.dataclass(frozen=True)
class PlannedModel:
    config: DecoderConfig
    stored_dtype: str | None
    source: str  # path or name of the config


def find_model(
    path: str, downloads: Downloads = HUGGING_FACE, package: str | None = None, context_length: int | None = None
) -> PlannedModel:
    """Read a model's configs. A name or hub id whose config is bundled needs no network. Raises ModelError."""
    return read_model(bundled_path(path) or path, downloads, package, context_length)


def bundled_path(path: str) -> str | None:
    """Return the bundled config that a name or hub id stands for, as config:NAME; None for any other path."""
    names = {name.lower(): name for name in bundled()}
    name = names.get(path.rpartition("/")[2].removesuffix("-Instruct").lower())
    return PREFIX + name if name is not None and not Path(path).expanduser().exists() else None


def read_model(
    path: str, downloads: Downloads = HUGGING_FACE, package: str | None = None, context_length: int | None = None
) -> PlannedModel:
    """Read the configs at a path or hub id, or a bundled one; `package` is --model-package, `context_length`
    --context-length. Raises ModelError."""
    checkpoint = open_checkpoint(path, load_format="dummy", downloads=downloads)
    config = decoder_config(checkpoint.config, checkpoint.generation_config, families=known_families(package))
    return PlannedModel(config.for_context(context_length), checkpoint.dtype, str(checkpoint.path))


def drafting(args: ServerArgs, model: PlannedModel) -> PlannedModel:
    """Return the model with the draft model that the flags ask for. Its tensors are named by a folder that has them; else the
    config alone is read, and programs may differ where only they would tell. Raises ModelError."""
    path = args.speculation.draft_model_path if args.speculation else None
    has_tensors = path is not None and any(Path(path).expanduser().glob("*.safetensors"))
    config, _ = with_draft(args, model.config, known_families(args.model_package), dummy=not has_tensors)
    return dataclasses.replace(model, config=with_kv_dtype(args, config))
