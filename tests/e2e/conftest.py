import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
from exact import Build

from quick_compiles import quick_compiles
from sgl_jax.engine import launch_plan
from sgl_jax.engine.core import Core
from sgl_jax.engine.startup import build_core
from sgl_jax.runtime.buckets import Bucket
from sgl_jax.settings.server_args import ServerArgs


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Start engine cores in this process, which share a compile cache. With `bucket` a core has one step program, or one of each
    width. Such a core is compiled quickly, and others as in a launch, unless `optimised` says otherwise."""
    compile_cache = str(tmp_path_factory.mktemp("compiled"))

    def start(model: Path, bucket: Bucket | None = None, *, optimised: bool | None = None, **options) -> Core:
        defaults = {"dtype": "float32", "device": "cpu", "random_seed": 0, "max_total_tokens": 8192}
        options = defaults | {"compilation_cache_dir": compile_cache} | options
        if bucket is not None:
            options |= {"max_running_requests": bucket.num_rows, "chunked_prefill_size": bucket.num_tokens}
        args = ServerArgs(model_path=str(model), **options)
        optimised = bucket is None if optimised is None else optimised
        how = contextlib.nullcontext() if optimised else quick_compiles()
        with how, pytest.MonkeyPatch.context() as patch:
            if bucket is not None:
                patch.setattr(launch_plan, "make_buckets", lambda *_, width=1, **__: (replace(bucket, width=width),))
            return build_core(args)

    return start
