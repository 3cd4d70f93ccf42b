"""Decisions about adapters before they are loaded: how many slots, of which rank, and for which matrices."""

from sgl_jax.models.adapters import ADAPTED_SITES, AdapterRoom, adapted_matrices
from sgl_jax.models.decoder_config import DecoderConfig
from sgl_jax.models.families import Families, tensor_names
from sgl_jax.models.lora_files import AdapterFiles, open_adapter
from sgl_jax.models.names import TensorNames
from sgl_jax.models.spec import Site
from sgl_jax.models.weights import declare_plain
from sgl_jax.parallel.placement import Placement
from sgl_jax.runtime.adapter_store import AdapterStore
from sgl_jax.runtime.programs import RunnerConfig, adapter_arrays
from sgl_jax.settings.hub import Downloads, local_path
from sgl_jax.settings.server_args import ServerArgs

_DEFAULT_RANK = 16
_FILES = ("adapter_config.json", "adapter_model.safetensors")


def plan_adapters(args: ServerArgs, model: DecoderConfig, families: Families) -> AdapterRoom | None:
    """Return the slots of a launch, for the adapters of --lora-paths where flags do not say more; None for a launch that
    takes no adapters. Raises ValueError for an adapter that does not fit the model or the flags."""
    if not args.lora_enabled:
        return None
    names = tensor_names(model, families)
    files = [open_files(each.path, model, names, args.downloads) for each in args.adapters]
    rank = args.max_lora_rank or max((each.rank for each in files), default=_DEFAULT_RANK)
    in_model = {site for layer in declare_plain(model, "float32").layers for site, _ in adapted_matrices(layer)}
    if args.lora_target_modules:
        wanted = _sites_of(args.lora_target_modules, names, in_model)
    else:
        wanted = {site for each in files for site in each.sites} or in_model
    room = AdapterRoom(args.max_loras_per_batch, rank, tuple(site for site in ADAPTED_SITES if site in wanted))
    for each in files:
        _check_room(each, room, names)
    return room


def adapter_store(
    args: ServerArgs,
    model: DecoderConfig,
    families: Families,
    config: RunnerConfig,
    placement: Placement,
    *,
    stacked: bool,
) -> AdapterStore | None:
    """Return where a host keeps adapters in memory; None in a launch that takes none."""
    arrays = adapter_arrays(model, config, placement, stacked=stacked)
    if arrays is None:
        return None
    names = tensor_names(model, families)

    def opened(path: str) -> AdapterFiles:
        files = open_files(path, model, names, args.downloads)
        _check_room(files, arrays.slots, names)
        return files

    return AdapterStore(opened, arrays)


def open_files(path: str, model: DecoderConfig, names: TensorNames, downloads: Downloads) -> AdapterFiles:
    """Open the adapter in a folder, or fetch the one with a hub id. Raises ValueError."""
    return open_adapter(local_path(path, _FILES, downloads), model, names)


def _sites_of(modules: tuple[str, ...], names: TensorNames, in_model: set[Site]) -> set[Site]:
    """Return the products of the named modules, in the checkpoint's names. Raises ValueError for a module that is not there."""
    if "all" in modules:
        return in_model
    by_module = {module: site for site in in_model for module in _modules_of(site, names)}
    if unknown := [module for module in modules if module not in by_module]:
        known = f"this model has {', '.join(sorted(by_module))}, or write all"
        raise ValueError(f"--lora-target-modules names {', '.join(unknown)}; {known}")
    return {by_module[module] for module in modules}


def _modules_of(site: Site, names: TensorNames) -> list[str]:
    """Return the last parts of the names of a product's modules, as the checkpoint has them."""
    return [pattern.removesuffix(".weight").rpartition(".")[2] for pattern in names.layer[site]]


def _check_room(files: AdapterFiles, room: AdapterRoom, names: TensorNames) -> None:
    """Raises ValueError for an adapter that has no room in the slots."""
    if files.rank > room.rank:
        raise ValueError(f"--max-lora-rank is {room.rank}; the adapter {files.path} has rank {files.rank}")
    outside = sorted(module for site in files.sites if site not in room.sites for module in _modules_of(site, names))
    if outside:
        cure = "name them in --lora-target-modules, or load it with --lora-paths"
        raise ValueError(f"the adapter {files.path} changes {', '.join(outside)}, for which slots have no room; {cure}")
