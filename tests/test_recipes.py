"""Tests of the recipes in docs/architecture.md, on a copy of the package.

A recipe is a set of edits, each of which inserts lines after a line of the source. A script then uses the addition. Recipes
for a weight format, an attention backend and a sampling parameter are also tested in their rooms.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import sgl_jax

PACKAGE = Path(sgl_jax.__file__).parent

Edits = list[tuple[str, str, str]]  # a file, a line of it, and the text that comes after the line


def run_edited(folder: Path, edits: Edits, script: str) -> str:
    """Return the output of a script that imports a copy of the package with the edits."""
    shutil.copytree(PACKAGE, folder / "sgl_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name, line, text in edits:
        path = folder / "sgl_jax" / name
        lines = path.read_text(encoding="utf-8").splitlines()
        at = [i for i, each in enumerate(lines) if each.strip() == line]
        assert len(at) == 1, f"{name} has the line {line!r} {len(at)} times"
        indent = lines[at[0]][: len(lines[at[0]]) - len(lines[at[0]].lstrip())] + "    " * line.endswith(":")
        lines[at[0] + 1 : at[0] + 1] = textwrap.indent(textwrap.dedent(text).strip(), indent).splitlines()
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_plan_column_is_one_declaration_and_one_line_that_fills_it(tmp_path: Path) -> None:
    edits: Edits = [
        (
            "step_plan.py",
            "start: Annotated[np.ndarray, Column(Per.ROW)]  # i32[S] tokens computed before this step",
            "adapter: Annotated[np.ndarray, Column(Per.ROW, -1)]  # i32[S]",
        ),
        ("scheduler/scheduler.py", "rows=rows,", "adapter=t.key[rows].astype(np.int32) * 10,"),
    ]
    script = """
        import jax, numpy as np
        from sgl_jax.cache.prefix_cache import PrefixCache
        from sgl_jax.request import Request, SamplingParams
        from sgl_jax.runtime.buckets import Bucket
        from sgl_jax.runtime.layout import PlanLayout
        from sgl_jax.scheduler.scheduler_config import SchedulerConfig
        from sgl_jax.scheduler.scheduler import Scheduler
        from sgl_jax.step_plan import empty_plan

        scheduler = Scheduler(SchedulerConfig(4, 64, 16, 16), [PrefixCache(33, 4)])
        for key in (3, 5):
            scheduler.add(Request(key, np.arange(1, 4, dtype=np.int32), SamplingParams(), "", 0, 20, np.empty(0, np.int32), key))
        layout = PlanLayout(Bucket(16, 4), 4, spare_row=4)
        unpack = jax.jit(lambda vector: layout.unpack(vector).adapter)
        print(unpack(layout.pack(scheduler.schedule())).tolist(), len(empty_plan(1).adapter))
    """
    assert run_edited(tmp_path, edits, script) == "[30, 50, 0, 0] 0\n"


def test_a_row_load_is_an_entry_of_a_table_and_its_array_of_the_state(tmp_path: Path) -> None:
    functions = """
        def _pack_mark(load, payload):
            payload[:] = [load.row, 7, 9]
            return load.pages is None

        def _store_mark(state, row, payload, axis):
            return dataclasses.replace(state, mark=_put_row(state.mark, row, payload))
    """
    edits: Edits = [
        ("runtime/device_state.py", "page_table: jax.Array  # i32[R + 1, pages]", "mark: jax.Array  # i32[R + 1, 3]"),
        ("runtime/device_state.py", "last_token=jnp.zeros(n, jnp.int32),", "mark=jnp.zeros((n, 3), jnp.int32),"),
        ("runtime/loads.py", "_FOREVER = 2**31 - 1", functions),
        (
            "runtime/loads.py",
            'LoadKind("pages", lambda sizes: sizes.pages_per_row, _pack_pages, _store_pages),',
            'LoadKind("mark", lambda sizes: 3, _pack_mark, _store_mark),',
        ),
    ]
    script = """
        import jax, numpy as np
        from sgl_jax.parallel.grid import ONE_DEVICE
        from sgl_jax.runtime.loads import LOADS, LoadLayout, pack_loads
        from sgl_jax.runtime.device_state import StateSizes, initial_state
        from sgl_jax.step_plan import RowLoad

        sizes = StateSizes(8, 4, 16)
        layouts = {kind.program: LoadLayout(kind, 8, kind.size(sizes)) for kind in LOADS if kind.name != "tokens"}
        state = initial_state(sizes)
        loads = [RowLoad(2, np.array([5], np.int32), None), RowLoad(3, None, None), RowLoad(6, None, None)]
        for name, vector in pack_loads([*layouts.values()], loads):
            print(name)
            run = jax.jit(lambda state, vector, layout=layouts[name]: layout.run(state, vector, axis=ONE_DEVICE))
            state = run(state, vector)
        print(np.asarray(state.mark)[[2, 3, 6]].tolist())
    """
    assert run_edited(tmp_path, edits, script) == "load pages\nload mark\n[[0, 0, 0], [3, 7, 9], [6, 7, 9]]\n"


def test_a_sampling_parameter_for_the_device_is_a_field_and_a_column(tmp_path: Path) -> None:
    edits: Edits = [
        (
            "request.py",
            "class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):",
            """
            depth: Annotated[int, About("how far to look", 0, 9, column="DEPTH")] = 4
            warmth: Annotated[float, About("how friendly", 0.0, 9.0, column="WARMTH")] = 0.5
            """,
        ),
        ("step_plan.py", "TOP_K = enum.auto()  # vocabulary size or more: off", "DEPTH = enum.auto()"),
        ("step_plan.py", "REPETITION = enum.auto()", "WARMTH = enum.auto()"),
    ]
    script = """
        import numpy as np
        from sgl_jax.request import Request, SamplingParams
        from sgl_jax.scheduler.rows import encode_params
        from sgl_jax.step_plan import Param

        asked = SamplingParams(depth=7, warmth=2.5, top_k=3)
        row = encode_params(Request(1, np.array([1], np.int32), asked, "", 0, 20, np.empty(0, np.int32), 1))
        print(row[Param.DEPTH], row[Param.WARMTH :].view(np.float32)[0], row[Param.TOP_K])
    """
    assert run_edited(tmp_path, edits, script) == "7 2.5 3\n"
