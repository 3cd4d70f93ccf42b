from pathlib import Path

import pytest
from exact import Build

from sgl_jax.engine.core import Core
from sgl_jax.engine.startup import build_core
from sgl_jax.server_args import ServerArgs


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Start an engine core in this process; the compile cache is shared by all that are started here."""
    compile_cache = str(tmp_path_factory.mktemp("compiled"))

    def start(model: Path, **options) -> Core:
        options = {"dtype": "float32", "device": "cpu", "random_seed": 0, "max_total_tokens": 8192} | options
        return build_core(ServerArgs(model_path=str(model), compilation_cache_dir=compile_cache, **options))

    return start
