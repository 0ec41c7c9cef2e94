"""Builds the extensions of lora_kernels from csrc/. Needs a C++17 compiler (GCC or Clang) and no torch.

_C: the CPU kernels, compiled once per instruction set and chosen at run time, so that a wheel runs on every processor
of its architecture. _cuda: the CUDA kernels, where nvcc is found. _simt: the CUDA kernels as host code, for tests, in
development builds only. ninja compiles them, and only what changed again.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from ninja import ninja_syntax
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
# name -> (lanes of a vector, flags)
ISAS, TEST_ISAS = {"generic": (4, [])}, {}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {"avx2": (8, AVX2), "avx512": (16, AVX512)}
    # AVX-512's width in AVX2's registers: its logic, tested anywhere.
    TEST_ISAS = {"avx2_wide": (16, AVX2)}

# ISO C++ would forbid fusing a multiplication and an addition; errno and traps would forbid vectorising.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
# The warnings are GCC's: about vector arguments of inlined functions, and about its own AVX-512 header.
CXX_FLAGS += ["-fno-trapping-math", "-Wall", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# Apple's compiler has no OpenMP; the kernels then run on one thread.
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]


# "package": what a wheel has. "tests", the default of a build in place: also what only tests use. "none": nothing.
BUILD_VARIABLE = "LORA_KERNELS_BUILD"
# Architectures to compile the CUDA kernels for, such as "80,90a", or "none". Unset: the list below for a wheel, none
# for a build in place, which then takes one minute and not ten. PTX of the lowest serves later GPUs.
CUDA_ARCHS_VARIABLE = "LORA_KERNELS_CUDA_ARCHS"
CUDA_ARCHS = "80,86,89,90a,100,120"


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH, or of NVIDIA's packages on PyPI (nvidia-cuda-nvcc)."""
    candidates = [Path(os.environ["CUDA_HOME"], "bin/nvcc")] if "CUDA_HOME" in os.environ else []
    candidates += [Path(found)] if (found := shutil.which("nvcc")) else []
    nvidia = importlib.util.find_spec("nvidia")
    for folder in nvidia.submodule_search_locations or [] if nvidia else []:
        candidates += sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True)
    return next((str(path) for path in candidates if path.exists()), None)


def cuda_archs(inplace: bool) -> list[str]:
    """The architectures that were asked for, as nvcc spells them, lowest first."""
    text = os.environ.get(CUDA_ARCHS_VARIABLE, "none" if inplace else CUDA_ARCHS)
    names = [name.removeprefix("sm_") for name in re.split(r"[,; ]+", text.strip()) if name]
    if names in ([], ["none"]):
        return []
    if bad := [name for name in names if not re.fullmatch(r"[0-9]{2,3}[af]?", name)]:
        raise SystemExit(f"{CUDA_ARCHS_VARIABLE} is {text!r}: {bad[0]!r} is not an architecture such as 80 or sm_90a")
    return sorted(set(names), key=lambda name: int(name.rstrip("af")))


def python_includes() -> list[str]:
    import pybind11

    return [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]


def cpu_commands(tests: bool) -> list[list[str]]:
    """Compiler commands of _C, each without its output and ending with the source."""
    isas = ISAS | (TEST_ISAS if tests else {})
    defines = [f"-DLK_HAS_{isa.upper()}" for isa in isas if isa in TEST_ISAS]
    compiler = [*os.environ.get("CXX", "c++").split(), *CXX_FLAGS, *OPENMP, *os.environ.get("CXXFLAGS", "").split()]
    commands = [[*compiler, *python_includes(), "-c", "csrc/bindings.cpp"]]
    once = ("bfloat16", "isa", "layers", "scratch", "threads")
    commands += [[*compiler, *defines, "-c", f"csrc/cpu/{name}.cpp"] for name in once]
    commands.append([*compiler, "-c", "csrc/triton/driver.cpp"])
    for source in sorted(Path("csrc/cpu").glob("*_kernels.cpp")):
        for isa, (lanes, isa_flags) in isas.items():
            commands.append([*compiler, f"-DLK_ISA={isa}", f"-DLK_LANES={lanes}", *isa_flags, "-c", str(source)])
    return commands


def simt_commands() -> list[list[str]]:
    """Compiler commands of _simt."""
    # Contraction off: what says __fmul_rn must round. -g1: messages name lines.
    flags = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DLK_SIMT", "-Icsrc"]
    flags += ["-Wall", "-Wno-unknown-pragmas", *os.environ.get("CXXFLAGS", "").split()]
    compiler = [*os.environ.get("CXX", "c++").split(), *flags]
    # csrc/simt/memory.cpp is the run-time library of this instrumentation: it sees each load and store of a kernel.
    kernels = [*compiler, "-fsanitize=thread", "-x", "c++", "-c"]
    commands = [[*kernels, str(source)] for source in sorted(Path("csrc/cuda").glob("*.cu"))]
    commands += [[*compiler, "-c", str(source)] for source in sorted(Path("csrc/simt").glob("*.cpp"))]
    return [*commands, [*compiler, *python_includes(), "-c", "csrc/cuda/bindings.cpp"]]


def cuda_commands(nvcc: str, archs: list[str]) -> list[list[str]]:
    """Compiler commands of _cuda."""
    compiler = [nvcc, "-std=c++17", "-O3", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden", *nvcc_host_compiler()]
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    lowest = archs[0].rstrip("af")
    code += [f"-gencode=arch=compute_{lowest},code=compute_{lowest}", "--threads=0"]
    commands = [[*compiler, *code, "-c", str(source)] for source in sorted(Path("csrc/cuda").glob("*.cu"))]
    return [*commands, [*compiler, *python_includes(), "-c", "csrc/cuda/bindings.cpp"]]


def nvcc_host_compiler() -> list[str]:
    return [f"-ccbin={os.environ['CXX'].split()[0]}"] if "CXX" in os.environ else []


def nvcc_library_dirs(nvcc: str) -> list[str]:
    # The packages on PyPI keep the static runtime in lib, where their nvcc doesn't look.
    library = Path(nvcc).resolve().parents[1] / "lib"
    return [f"-L{library}"] if (library / "libcudart_static.a").exists() else []


def object_name(command: list[str]) -> str:
    """The name of what a command compiles: a source may be compiled once for each instruction set."""
    isa = [flag.removeprefix("-DLK_ISA=") for flag in command if flag.startswith("-DLK_ISA=")]
    return ".".join([Path(command[-1]).stem, *isa, "o"])


class BuildExt(build_ext):
    """Has ninja build the extensions."""

    def finalize_options(self) -> None:
        self.inplace = self.inplace or self.editable_mode
        shared = ["-shared"] if sys.platform != "darwin" else ["-bundle", "-undefined", "dynamic_lookup"]
        linker = [*os.environ.get("CXX", "c++").split(), *shared, *os.environ.get("LDFLAGS", "").split()]
        # name -> compiler commands and linker command
        build = os.environ.get(BUILD_VARIABLE, "tests" if self.inplace else "package")
        if build not in ("none", "package", "tests"):
            raise SystemExit(f"{BUILD_VARIABLE} is {build!r}; allowed: none, package, tests")
        self.units = {"_C": (cpu_commands(build == "tests"), [*linker, *OPENMP])}
        if build == "tests" and sys.platform == "linux":
            self.units["_simt"] = (simt_commands(), linker)
        self.without_cuda = None
        archs, nvcc = cuda_archs(self.inplace), find_nvcc()
        if not archs:
            asked = f"{CUDA_ARCHS_VARIABLE}={os.environ.get(CUDA_ARCHS_VARIABLE)}"
            self.without_cuda = asked if CUDA_ARCHS_VARIABLE in os.environ else (
                f"a build in place leaves them out unless {CUDA_ARCHS_VARIABLE} is set"
            )  # fmt: skip
        elif nvcc is None:
            self.without_cuda = "there is no nvcc in CUDA_HOME, PATH or the nvidia packages"
        else:
            self.units["_cuda"] = (
                cuda_commands(nvcc, archs),
                [nvcc, "-shared", "-cudart=static", *nvcc_host_compiler(), *nvcc_library_dirs(nvcc)],
            )
        if build == "none":
            self.units, self.without_cuda = {}, None
        self.distribution.ext_modules = [Extension(f"lora_kernels.{name}", sources=[]) for name in self.units]
        super().finalize_options()
        # build_ext itself resets `inplace` while it builds.
        self.in_source = bool(self.inplace) and not self.editable_mode
        if self.in_source:
            # From build/lib, _simt would get into the next wheel.
            self.build_lib = str(Path(self.build_temp).parent / "inplace")

    def run(self) -> None:
        if self.without_cuda:
            print(f"lora_kernels is built without its CUDA C++ kernels: {self.without_cuda}", flush=True)
        super().run()

    def build_extensions(self) -> None:
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        targets = [self.get_ext_fullpath(extension.name) for extension in self.extensions]
        with open(folder / "build.ninja", "w") as file:
            self.write_ninja(ninja_syntax.Writer(file), folder, targets)
        ninja = [sys.executable, "-m", "ninja", "-f", str(folder / "build.ninja")]
        if self.force:
            subprocess.run([*ninja, "-t", "clean"], check=True)
        subprocess.run([*ninja, *targets], check=True)
        if self.in_source:
            # For clangd and clang-tidy, which look into build/.
            with open(folder.parent / "compile_commands.json", "w") as file:
                subprocess.run([*ninja, "-t", "compdb", "compile"], check=True, stdout=file)

    def write_ninja(self, ninja: ninja_syntax.Writer, folder: Path, targets: list[str]) -> None:
        ninja.variable("builddir", str(folder))
        ninja.rule("compile", "$compiler $in -o $out -MMD -MF $out.d", description="$out", depfile="$out.d", deps="gcc")
        ninja.rule("link", "$linker $in -o $out", description="$out")
        for extension, target in zip(self.extensions, targets, strict=True):
            name = extension.name.rpartition(".")[2]
            commands, linker = self.units[name]
            objects = [str(folder / name / object_name(command)) for command in commands]
            for built, (*compiler, source) in zip(objects, commands, strict=True):
                ninja.build(built, "compile", source, variables={"compiler": ninja_syntax.escape(shlex.join(compiler))})
            ninja.build(target, "link", objects, variables={"linker": ninja_syntax.escape(shlex.join(linker))})


if __name__ == "__main__":
    setup(
        # Which extensions there are depends on how this is built; BuildExt knows.
        ext_modules=[Extension("lora_kernels._C", sources=[])],
        cmdclass={"build_ext": BuildExt},
    )
