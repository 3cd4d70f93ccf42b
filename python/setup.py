"""Builds the library for CPUs, once for each instruction set. Everything else about the package is in pyproject.toml.

Without a C++ compiler the package installs without it, and its operations run in plain XLA.
"""

import copy
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("sgl_jax", "ops", "cpu")
# Names of the instruction sets (ops/cpu/library.py chooses among them), and the compiler's flags for each.
X86 = {
    "x86_64_v4_bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mprefer-vector-width=512"],
    "x86_64_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "x86_64_v3": ["-march=x86-64-v3"],
}
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-g0", "-w"]


class BuildLibraries(build_ext):
    """Compiles with XLA's headers, which jaxlib brings."""

    def finalize_options(self) -> None:
        super().finalize_options()
        import jaxlib

        self.include_dirs.append(str(Path(jaxlib.__file__).parent / "include"))
        self.parallel = True

    def build_extension(self, ext: Extension) -> None:
        """Keep the objects of each library apart: their sources are the same."""
        own = copy.copy(self)
        own.build_temp = str(Path(self.build_temp, ext.name))
        super(BuildLibraries, own).build_extension(ext)


def libraries() -> list[Extension]:
    if sys.platform == "win32":
        return []  # its compiler has no vector types
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    sources = [
        str(FOLDER / name)
        for name in ("adapters.cc", "attention.cc", "dense.cc", "quantised.cc", "sampling.cc", "untouched.cc")
    ]
    headers = [str(FOLDER / name) for name in ("eight_bits.h", "matrix.h", "products.h", "threads.h", "vectors.h")]
    return [
        Extension(
            f"sgl_jax.ops.cpu.{name}",
            sources,
            depends=headers,
            extra_compile_args=FLAGS + flags,
            language="c++",
            optional=True,
            py_limited_api=True,  # they call nothing of Python, so one wheel is for all its versions
        )
        for name, flags in {**(X86 if is_x86 else {}), "baseline": []}.items()
    ]


setup(
    ext_modules=libraries(),
    cmdclass={"build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp312"}},
)
