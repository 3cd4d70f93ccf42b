"""The architecture, as imports: they point one way (docs/architecture.md), and what must stay light stays light.

A new room, or a new file at the top of the package, needs a row in MAY_IMPORT.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import sgl_jax

PYTHON = Path(__file__).resolve().parents[1] / "python"
PACKAGE = PYTHON / "sgl_jax"

PLAIN_DATA = ("request", "step_plan", "engine.messages")  # records that rooms hand to each other

# By room, the modules of sgl_jax it may import besides its own; a name stands for the module and everything in it.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "request": (),
    "settings": (),
    "step_plan": ("request",),
    "observability": ("engine.messages",),
    "cache": (),
    "scheduler": ("cache", "request", "step_plan"),
    "constrained": ("request", "text"),
    "ops": (),
    "parallel": (),
    "models": ("ops", "parallel", "settings.hub", "settings.speculation"),
    "multihost": ("settings",),
    "runtime": ("models", "ops", "parallel", "request", "step_plan", "observability"),
    # A GGUF file carries its vocabulary, and a folder that of its model: text/ takes the reading of files from models/.
    "text": ("request", "settings.hub", "models.gguf_file", "models.model_errors", "models.folder_files"),
    "engine": (
        "scheduler",
        "cache",
        "runtime",
        "models",
        "ops",
        "parallel",
        "multihost",
        "constrained",
        "text",
        "observability",
        "settings",
        *PLAIN_DATA,
    ),
    "planning": ("engine", "runtime", "models", "ops", "parallel", "observability", "settings"),
    "compile": ("planning", "observability", "settings"),
    "server": ("engine", "text", "observability", "settings", *PLAIN_DATA),
    "launch_server": ("server", "engine", "planning", "observability", "settings"),
    "tools": (
        "Engine",  # as programs import it
        "engine",
        "models",
        "observability",
        "ops",
        "planning",
        "runtime",
        "scheduler",
        "settings",
        "text",
        *PLAIN_DATA,
    ),
    "bench_serving": ("tools.benchmark",),
    "bench_one_batch_server": ("tools.benchmark",),
    "bench_one_batch": ("tools.benchmark",),
    "bench_offline_throughput": ("tools.benchmark",),
    "measure_limits": ("tools.benchmark",),
    "check_env": ("tools", "settings"),
    "run_batch": ("tools",),
    "__main__": ("settings",),
    "__init__": ("server.chat_engine", "request"),
}

NOWHERE = {"torch", "transformers", "pickle"}  # test oracles, and a format that runs what it reads
BUT = {("text.from_transformers", "transformers")}  # the optional extra, imported where it is called
JAX = {"jax", "jaxlib"}
WITHOUT_JAX = (
    "constrained",
    "cache",
    "scheduler",
    "text",
    "server",
    "observability",
    "multihost",
    "launch_server",
    "settings",
    "runtime.control_groups",
    *PLAIN_DATA,
)
READS_ENVIRONMENT = "settings.server_args"


def modules(package: Path) -> Iterator[tuple[str, ast.Module]]:
    """Every module by its name inside the package, `engine.messages` or `__init__`, with its source tree."""
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        yield name, ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(name: str, tree: ast.Module) -> Iterator[str]:
    """Full names of all that is imported, at the top, in functions and for types alike."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import in line {node.lineno}; write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def violations(package: Path) -> list[str]:
    found = []
    for name, tree in modules(package):
        room = name.split(".")[0]
        if room not in MAY_IMPORT:
            found.append(f"{name} belongs to no room in MAY_IMPORT")
            continue
        for imported in imports(name, tree):
            top, _, inside = imported.partition(".")
            if top in NOWHERE and (name, top) not in BUT:
                found.append(f"{name} imports {top}")
            if top in JAX and within(name, WITHOUT_JAX):
                found.append(f"{name} imports {top}")
            # `from sgl_jax import __version__` names no module.
            if top == "sgl_jax" and inside != "__version__" and not within(inside, (room, *MAY_IMPORT[room])):
                found.append(f"{name} imports {imported}")
        if name != READS_ENVIRONMENT:
            found += [f"{name} reads the environment in line {line}" for line in environment_reads(tree)]
    return found


def environment_reads(tree: ast.Module) -> Iterator[int]:
    names = {"environ", "environb", "getenv", "getenvb"}
    # `os.environ["A"] = "1"` is for libraries that take their settings from nowhere else.
    set_only = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
    }
    for node in ast.walk(tree):
        if id(node) in set_only:
            continue
        if isinstance(node, ast.Attribute) and node.attr in names and isinstance(node.value, ast.Name):
            if node.value.id == "os":
                yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for alias in node.names if alias.name in names)


def test_imports_point_one_way() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("cache/a.py", "import jax.numpy as jnp", "cache.a imports jax"),
        ("cache/a.py", "from sgl_jax.request import Request", "cache.a imports sgl_jax.request.Request"),
        ("scheduler/a.py", "def f():\n    import jax", "scheduler.a imports jax"),
        (
            "scheduler/a.py",
            "from sgl_jax.runtime.step import make_step",
            "scheduler.a imports sgl_jax.runtime.step.make_step",
        ),
        ("ops/b/a.py", "from sgl_jax.models import moe", "ops.b.a imports sgl_jax.models.moe"),
        ("models/__init__.py", "import sgl_jax.runtime", "models imports sgl_jax.runtime"),
        ("runtime/a.py", "from sgl_jax import scheduler", "runtime.a imports sgl_jax.scheduler"),
        ("text/a.py", "from sgl_jax.models.gguf import x", "text.a imports sgl_jax.models.gguf.x"),
        ("engine/a.py", "from sgl_jax.server import app", "engine.a imports sgl_jax.server.app"),
        ("engine/messages.py", "import jax", "engine.messages imports jax"),
        ("server/a.py", "from transformers import AutoTokenizer", "server.a imports transformers"),
        ("runtime/a.py", "import os\nos.environ['A']", "runtime.a reads the environment in line 2"),
        ("runtime/a.py", "from os import getenv", "runtime.a reads the environment in line 1"),
        ("attic/a.py", "", "attic.a belongs to no room in MAY_IMPORT"),
    ],
)
def test_the_check_itself_sees_each_kind_of_violation(tmp_path: Path, path: str, source: str, message: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert violations(tmp_path) == [message]


def test_setting_a_variable_for_a_library_is_not_reading_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "runtime" / "a.py"
    file.parent.mkdir()
    file.write_text("import os\nos.environ['A'] = 'b'\n")
    assert violations(tmp_path) == []


def test_the_check_itself_lets_the_right_direction_pass(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "a.py").write_text(
        "import os\nfrom sgl_jax import __version__\nfrom sgl_jax.engine import service\n"
    )
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "server_args.py").write_text(
        "import os\nos.environ\nfrom sgl_jax.settings.flags import Flag\n"
    )
    assert violations(tmp_path) == []


def test_what_must_run_without_jax_does_not_load_it_through_others() -> None:
    names = [name for name, _ in modules(PACKAGE) if within(name, WITHOUT_JAX)]
    loads = "\n".join(f"import sgl_jax.{name}" for name in names)
    check = f"{loads}\nimport sys\nprint(sorted({JAX | NOWHERE - {'pickle'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.strip() == "[]", result.stderr


def test_importing_the_package_loads_nothing() -> None:
    check = "import sys; before = set(sys.modules); import sgl_jax; print(sorted(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=True)
    loaded = ast.literal_eval(result.stdout)
    assert not [
        name for name in loaded if name.startswith("sgl_jax.") or name.split(".")[0] in JAX | {"numpy", "msgspec"}
    ]


def test_version_is_the_packages() -> None:
    assert sgl_jax.__version__ == metadata.version("sgl-jax")


# Class names that two rooms still define. Take a name off when you rename one of the classes; add none.
SHARED_CLASS_NAMES = {"About", "Chip", "Probe", "Rows"}


def test_a_name_is_of_one_room() -> None:
    """A file name or a class name leads a reader to one place. Only implementations of one interface share file names."""
    files: dict[str, set[str]] = defaultdict(set)
    classes: dict[str, set[str]] = defaultdict(set)
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).parts
        if path.name != "__init__.py" and not (
            parts[0] == "ops" and path.stem in {"api", "native", "pallas_tpu", "reference"}
        ):
            files[path.stem].add("/".join(parts))
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].add(parts[0])
    assert {name: sorted(paths) for name, paths in files.items() if len(paths) > 1} == {}
    assert {name for name, rooms in classes.items() if len(rooms) > 1} <= SHARED_CLASS_NAMES
