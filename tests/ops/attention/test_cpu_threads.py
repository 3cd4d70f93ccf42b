"""The attention library's threads, under a thread sanitizer."""

import shutil
import subprocess
from pathlib import Path

import jaxlib
import pytest

from sgl_jax.ops.cpu import library

COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_threads_share_a_call_without_races_and_with_equal_results(tmp_path: Path) -> None:
    folders = [Path(library.__file__).parent, Path(jaxlib.__file__).parent / "include"]
    source, program = Path(__file__).with_name("threads.cc"), tmp_path / "threads"
    flags = ["-std=c++17", "-O1", "-g", "-w", "-fsanitize=thread", "-pthread"]
    command = [COMPILER, *flags, *(f"-I{folder}" for folder in folders), str(source), "-o", str(program)]
    if subprocess.run(command, check=False, capture_output=True, text=True, timeout=200).returncode:
        pytest.skip("the compiler has no thread sanitizer")
    run = subprocess.run([program], check=False, capture_output=True, text=True, timeout=100)
    assert (run.returncode, run.stderr) == (0, "")
    assert len(sums := run.stdout.split()) == 5
    assert len(set(sums)) == 1
