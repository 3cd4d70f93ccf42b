"""Serve large language models with JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgl_jax.request import SamplingParams
    from sgl_jax.server.chat_engine import ChatEngine as Engine

    __version__: str

__all__ = ["Engine", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    # Loaded when first used: `import sgl_jax` and `--help` stay instant.
    if name == "Engine":
        from sgl_jax.server.chat_engine import ChatEngine

        return ChatEngine
    if name == "SamplingParams":
        from sgl_jax.request import SamplingParams

        return SamplingParams
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("sgl-jax")
        except PackageNotFoundError:  # a copied folder
            return "unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
