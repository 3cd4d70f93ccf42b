"""Models of plans: a path or a hub id as the server takes it, or the name of a bundled config.json."""

import dataclasses
from pathlib import Path

from sgl_jax.engine.adapter_plan import plan_adapters
from sgl_jax.engine.kv_cache import with_kv_dtype
from sgl_jax.engine.pooling_plan import with_pooling
from sgl_jax.engine.speculation_plan import with_draft
from sgl_jax.models.adapters import AdapterRoom
from sgl_jax.models.bundled import PREFIX, bundled
from sgl_jax.models.checkpoint import open_checkpoint
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.families import decoder_config, known_families
from sgl_jax.settings.server_args import ServerArgs


@dataclasses.dataclass(frozen=True)
class PlannedModel:
    config: DecoderConfig
    stored_dtype: str | None
    source: str  # path or name of the config
    adapters: AdapterRoom | None = None  # None: the launch takes no adapters


def bundled_path(path: str) -> str | None:
    """Return the bundled config that a name or hub id stands for, as config:NAME; None for any other path."""
    names = {name.lower(): name for name in bundled()}
    name = names.get(path.rpartition("/")[2].removesuffix("-Instruct").lower())
    return PREFIX + name if name is not None and not Path(path).expanduser().exists() else None


def find_model(args: ServerArgs) -> PlannedModel:
    """Do as `read_model` does. A name or hub id whose config is bundled needs no network."""
    return read_model(args, bundled_path(args.model_path))


def read_model(args: ServerArgs, path: str | None = None) -> PlannedModel:
    """Read the configs of the launch's model, or of another at `path`, with the draft model that its flags ask for.

    Tensors of the model and of the draft model are named by folders that have them; else configs alone are read, and
    programs may differ where only tensors would tell. Raises ModelError.
    """
    checkpoint = open_checkpoint(path or args.model_path, load_format="dummy", downloads=args.downloads)
    families = known_families(args.model_package)
    config = decoder_config(checkpoint.config, checkpoint.generation_config, families=families)
    draft = args.speculation.draft_model_path if args.speculation else None
    dummy = draft is None or args.load_format == "dummy" or not _has_tensors(draft)
    stored = {}
    if not dummy and _has_tensors(args.model_path):
        stored = open_checkpoint(args.model_path, load_format=args.load_format).tensors
    config = with_pooling(args, config.for_context(args.context_length), checkpoint)
    config, _ = with_draft(args, config, families, stored, dummy=dummy)
    adapters = plan_adapters(args, config, families)
    return PlannedModel(with_kv_dtype(args, config), checkpoint.dtype, str(checkpoint.path), adapters)


def _has_tensors(path: str) -> bool:
    file = Path(path).expanduser()
    return any(each.suffix in (".safetensors", ".gguf") for each in (file, *file.glob("*")))
