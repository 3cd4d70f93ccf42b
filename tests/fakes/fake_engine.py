"""An engine of this process around a core that a test gives."""

from __future__ import annotations

from collections.abc import Callable

from sgl_jax.engine.engine import Engine
from sgl_jax.engine.loop import EngineCore
from sgl_jax.engine.service import GenerationService
from sgl_jax.engine.transport import ThreadTransport
from sgl_jax.text.tokenizer import Tokenizer


class FakeEngine(Engine):
    """`build_core` is called in the engine's thread."""

    def __init__(self, build_core: Callable[[], EngineCore], tokenizer: Tokenizer):
        self._start(GenerationService(ThreadTransport(build_core), tokenizer))
