"""Builds lora_kernels._C from csrc/. Needs a C++17 compiler with GCC's vector extensions (GCC or Clang); no torch.

The CPU kernels are compiled once per instruction set and chosen at run time, so a wheel runs on every processor of
its architecture. Only what changed is compiled again.
"""

import os
import platform
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
# name -> (lanes of a vector, flags). avx2_wide is AVX-512's width in AVX2's registers: its logic, tested anywhere.
ISAS = {"generic": (4, [])}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {"avx2": (8, AVX2), "avx2_wide": (16, AVX2), "avx512": (16, AVX512)}

# ISO C++ would forbid fusing a multiplication and an addition; errno and traps would forbid vectorising.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
# The warnings are GCC's: about vector arguments of inlined functions, and about its own AVX-512 header.
CXX_FLAGS += ["-fno-trapping-math", "-Wall", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# Apple's compiler has no OpenMP; the kernels then run on one thread.
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]


def compile_commands(build_dir: Path) -> dict[Path, list[str]]:
    """Each object file and the command that makes it."""
    import pybind11

    compiler = os.environ.get("CXX", "c++").split()
    flags = [*CXX_FLAGS, *OPENMP, *os.environ.get("CXXFLAGS", "").split()]
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    units = [("bindings", "csrc/bindings.cpp", includes), ("isa", "csrc/cpu/isa.cpp", [])]
    for source in sorted(Path("csrc/cpu").glob("*_kernels.cpp")):
        for isa, (lanes, isa_flags) in ISAS.items():
            defines = [f"-DLK_ISA={isa}", f"-DLK_LANES={lanes}"]
            units.append((f"{source.stem}_{isa}", str(source), [*defines, *isa_flags]))
    return {
        build_dir / f"{name}.o": [*compiler, *flags, *extra, "-c", source, "-o", str(build_dir / f"{name}.o")]
        for name, source, extra in units
    }


def run(command: list[str]) -> None:
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)


class BuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        build_dir = Path(self.build_temp)
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)

        commands = compile_commands(build_dir)
        newest_header = max(path.stat().st_mtime for path in [*Path("csrc").rglob("*.h"), Path(__file__)])
        stale = [
            command
            for object_file, command in commands.items()
            if self.force
            or not object_file.exists()
            or object_file.stat().st_mtime < max(newest_header, Path(command[-3]).stat().st_mtime)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, stale))
        if stale or not target.exists():
            shared = ["-shared"] if sys.platform != "darwin" else ["-bundle", "-undefined", "dynamic_lookup"]
            linker = [*os.environ.get("CXX", "c++").split(), *shared, *OPENMP]
            run([*linker, *os.environ.get("LDFLAGS", "").split(), *map(str, commands), "-o", str(target)])


setup(
    ext_modules=[Extension("lora_kernels._C", sources=[], depends=[str(p) for p in Path("csrc").rglob("*.*")])],
    cmdclass={"build_ext": BuildExt},
)
