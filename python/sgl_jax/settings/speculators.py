"""Draft models in the layout of the speculators library (https://github.com/vllm-project/speculators): config.json names the
model that they were made for, their verifier."""

import dataclasses
from pathlib import Path

import msgspec

from sgl_jax.settings.flag_parser import FlagError
from sgl_jax.settings.hub import local_path
from sgl_jax.settings.server_args import ServerArgs


class _Verifier(msgspec.Struct):
    name_or_path: str | None = None


class _Method(msgspec.Struct):
    speculative_tokens: int | None = None


class _Speculators(msgspec.Struct):
    algorithm: str | None = None
    verifier: _Verifier | None = None
    proposal_methods: list[_Method] | None = None


class _Config(msgspec.Struct):
    speculators_config: _Speculators | None = None


def with_verifier(args: ServerArgs) -> ServerArgs:
    """Return the launch that is meant by a speculators checkpoint as --model-path: its verifier is served, under the name of
    the checkpoint, which drafts. Any other launch is returned as it is. Raises FlagError and HubError."""
    path = args.model_path
    if path.startswith("config:"):
        return args
    folder = local_path(path, ["config.json"], args.downloads)
    about = _speculators_config(folder / "config.json")
    if about is None:
        return args
    if about.algorithm != "eagle3":
        known = "of speculators' algorithms only eagle3 is built"
        raise FlagError("--model-path", f"--model-path is {path}, a draft model for {about.algorithm}; {known}")
    verifier = about.verifier.name_or_path if about.verifier else None
    if not verifier or args.speculation:
        cure = f"give its target's path, and {path} as --speculative-draft-model-path"
        raise FlagError("--model-path", f"--model-path is {path}, a draft model; {cure}")
    beside = (place for place in (folder / verifier, folder.parent / verifier) if place.exists())
    return dataclasses.replace(
        args,
        model_path=str(next(beside, verifier)),
        served_model_name=args.served_model_name or path,
        speculative_algorithm="EAGLE3",
        speculative_draft_model_path=path,
        speculative_num_steps=about.proposal_methods[0].speculative_tokens if about.proposal_methods else None,
    )


def _speculators_config(file: Path) -> _Speculators | None:
    """Return that part of a config.json, None where there is none. Whoever loads the model says what is wrong with a file."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Config).speculators_config
    except (OSError, msgspec.DecodeError):
        return None
