"""Data the tests need, and what keeps one test from changing another. Everything but the default model lies in tests/data."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from checkpoints import write_checkpoint

# With libtpu installed jax looks for a TPU first. These keep the search short and silent where there is none.
for _name, _value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v6e-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}.items():
    os.environ.setdefault(_name, _value)

# A busy machine is no failure of a property.
hypothesis.settings.register_profile("tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("tests")

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = REPOSITORY / "tests" / "data"
sys.path.append(str(REPOSITORY / "benchmarks"))  # its scripts are tested, too


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A trained 260-thousand-parameter Llama in Hugging Face format."""
    return DATA / "stories260k"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of what other programs gave for models, templates and tokenizers."""
    return DATA / "golden"


@pytest.fixture(autouse=True)
def logging_restored() -> Iterator[None]:
    """Put back what a test changes of the loggers that `observability.log.setup` takes over, and let all say again what they say
    once."""
    loggers = [logging.getLogger(name) for name in ("", "sgl_jax", "uvicorn", "uvicorn.error", "uvicorn.access")]
    before = [(one.handlers[:], one.filters[:], one.level, one.propagate) for one in loggers]
    yield
    for one, (handlers, filters, level, propagate) in zip(loggers, before, strict=True):
        one.handlers[:], one.filters[:] = handlers, filters
        one.setLevel(level)
        one.propagate = propagate
    for one in logging.Logger.manager.loggerDict.values():
        vars(one).pop("said_once", None)


@pytest.fixture(autouse=True)
def compile_cache_of_its_own() -> Iterator[None]:
    """Switch jax's compile cache off after a test whose engine switched it on: it would stay on for later tests."""
    yield
    if (jax := sys.modules.get("jax")) is not None and jax.config.jax_compilation_cache_dir is not None:
        from jax.experimental.compilation_cache import compilation_cache

        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def tokenizers() -> Path:
    """Folder of small tokenizers: qwen2.5 and qwen3, cut to their first 2000 tokens, and sentencepiece."""
    return DATA / "tokenizers"


@pytest.fixture(scope="session")
def checkpoint(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model, by name: `stories260k`, or one that `checkpoints` makes when a test first asks for it."""
    base = tmp_path_factory.getbasetemp()
    made = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "checkpoints"  # one for all workers
    made.mkdir(exist_ok=True)

    def find(name: str) -> Path:
        folder = made / name
        if name == "stories260k":
            return stories260k
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=made) as place:
                write_checkpoint(name, Path(place) / name)
                with contextlib.suppress(OSError):  # another worker was first
                    (Path(place) / name).rename(folder)
        return folder

    return find


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model, SmolLM2-135M-Instruct, as `make model` fetches it."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    found = sorted((REPOSITORY / ".models").glob(f"**/{name}"))
    if not found:
        pytest.skip(f"no {name} under {REPOSITORY / '.models'}; `make model` fetches it")
    return found[0]


# The files that take longest. Workers take files in this order, and the others after them, so that none is left with a long
# one when the rest is done.
LONG_FILES = (
    "e2e/test_families_exact.py",
    "e2e/test_engine_exact.py",
    "tools/benchmark/test_one_batch.py",
    "tools/benchmark/test_offline.py",
    "parallel/test_grids.py",
    "multihost/test_two_hosts.py",
    "scheduler/test_properties.py",
    "e2e/test_server.py",
    "e2e/test_default_model_exact.py",
    "e2e/test_families_size.py",
    "e2e/test_families_reference.py",
    "runtime/test_runner.py",
    "server/test_lifecycle.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fa-examples", type=int, default=4, help="random batches per property of the fa kernels")
    parser.addoption("--reverse", action="store_true", help="run the tests last to first: each must pass in any order")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    rank = {str(Path(__file__).parent / file): i for i, file in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(str(item.path), len(rank)))
    if config.getoption("--reverse"):
        items.reverse()
