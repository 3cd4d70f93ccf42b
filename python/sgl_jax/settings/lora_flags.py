"""Flags of LoRA adapters."""

import dataclasses
import os
from collections.abc import Collection, Iterator

from sgl_jax.settings.adapter_paths import AdapterPath, adapter_path, wrong_name
from sgl_jax.settings.flag_parser import FlagError, option_named
from sgl_jax.settings.flags import at_least, flag

LORA = "LoRA adapters"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraFlags:
    """Flags about adapters, and what follows from all of them together."""

    enable_lora: bool | None = flag(
        None,
        "take requests for LoRA adapters (docs/features/lora.md)",
        unset="on with --lora-paths or --lora-dir",
        group=LORA,
    )
    lora_paths: tuple[str, ...] = flag(
        (),
        "adapters to load at the start: PATH, NAME=PATH, or JSON with lora_name, lora_path and pinned, or with name, path "
        "and base_model_name; a path is a folder or a hub id, and without a name it is the name",
        unset="none",
        aliases=("--lora-modules",),
        metavar="ADAPTER",
    )
    lora_dir: str | None = flag(
        None,
        "a folder; an adapter in it is loaded when a request first names it",
        unset="none",
        metavar="PATH",
    )
    max_loras_per_batch: int = flag(8, "adapters on the devices at a time", rule=at_least(1), aliases=("--max-loras",))
    max_loaded_loras: int | None = flag(
        None,
        "adapters in the host's memory at a time",
        unset="4 for each of --max-loras-per-batch",
        rule=at_least(1),
        aliases=("--max-cpu-loras",),
    )
    max_lora_rank: int | None = flag(
        None, "highest rank of an adapter", unset="that of --lora-paths, 16 without any", rule=at_least(1)
    )
    lora_target_modules: tuple[str, ...] = flag(
        (),
        "modules that adapters may change, such as q_proj and gate_up_proj, or all",
        unset="those of --lora-paths, all without any",
        metavar="MODULE",
    )

    def __post_init__(self) -> None:
        """Take lists, which Python and JSON have for several values, as tuples."""
        for name in ("lora_paths", "lora_target_modules"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))

    @property
    def lora_enabled(self) -> bool:
        """Whether the launch takes adapters."""
        return bool(self.enable_lora or self.lora_paths or self.lora_dir)

    @property
    def adapters(self) -> tuple[AdapterPath, ...]:
        """The adapters of --lora-paths. Raises FlagError for one that cannot be read."""
        return tuple(adapter_path(each)[0] for each in self.lora_paths)

    @property
    def most_loaded_loras(self) -> int:
        """Adapters that hosts keep in memory: --max-loaded-loras, or four for each slot."""
        return self.max_loaded_loras or 4 * self.max_loras_per_batch

    def misfits_of_adapters(self, served: Collection[str]) -> Iterator[str]:
        """Say which values do not fit together, a sentence each, the flag first. `served`: the model's names."""
        fields = dataclasses.fields(LoraFlags)
        given = [
            each.name for each in fields if getattr(self, each.name) != each.default and each.name != "enable_lora"
        ]
        if given and (self.enable_lora is False or not self.lora_enabled):
            off = "with --no-enable-lora" if self.enable_lora is False else "without --enable-lora"
            yield f"{', '.join(map(option_named, given))} would have no effect {off}"
        slots, loaded = self.max_loras_per_batch, self.max_loaded_loras
        if loaded is not None and loaded < slots:
            yield f"--max-loaded-loras is {loaded}; it must be at least --max-loras-per-batch, which is {slots}"
        if self.lora_dir is not None and not os.path.isdir(self.lora_dir):
            yield f"--lora-dir is {self.lora_dir}; there is no such folder"
        try:
            adapters = [adapter_path(each) for each in self.lora_paths]
        except FlagError as error:
            yield str(error)
            return
        names: set[str] = set()
        for (name, _, _), base in adapters:
            if name in names:
                yield f"--lora-paths has the name {name} twice; give each adapter a name of its own"
            elif problem := wrong_name(name, served):
                yield f"--lora-paths has the name {name}; {problem}"
            if base not in (None, *served):
                model = " or ".join(sorted(served))
                yield f"--lora-paths has {name} for the base model {base}; it must be the served one, {model}"
            names.add(name)
        if (pinned := sum(each.pinned for each, _ in adapters)) >= slots:
            limit = f"--max-loras-per-batch, which is {slots}"
            yield f"--lora-paths has {pinned} pinned adapters; they must be fewer than {limit}"
