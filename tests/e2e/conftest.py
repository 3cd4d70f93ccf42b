from dataclasses import replace
from pathlib import Path

import pytest
from exact import Build

from sgl_jax.engine import launch_plan
from sgl_jax.engine.core import Core
from sgl_jax.engine.startup import build_core
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.settings.server_args import ServerArgs


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Start engine cores in this process, which share a compile cache. With `bucket` a core has one step program, or one of each width."""
    compile_cache = str(tmp_path_factory.mktemp("compiled"))

    def start(model: Path, bucket: Bucket | None = None, **options) -> Core:
        defaults = {"dtype": "float32", "device": "cpu", "random_seed": 0, "max_total_tokens": 8192}
        options = defaults | {"compilation_cache_dir": compile_cache} | options
        if bucket is not None:
            options |= {"max_running_requests": bucket.num_rows, "chunked_prefill_size": bucket.num_tokens}
        args = ServerArgs(model_path=str(model), **options)
        with pytest.MonkeyPatch.context() as patch:
            if bucket is not None:
                patch.setattr(launch_plan, "make_buckets", lambda *_, width=1, **__: (replace(bucket, width=width),))
            return build_core(args)

    return start
