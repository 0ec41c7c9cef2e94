"""`python tools/check_wheel.py dist/*.whl`: whether a wheel holds what it should, nothing else, and is small."""

import re
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_BYTES = 40 << 20


def problems(wheel: Path, cuda: bool) -> list[str]:
    """What is wrong with the wheel; `cuda` says whether the CUDA C++ kernels must be in it."""
    with zipfile.ZipFile(wheel) as archive:
        names = {info.filename for info in archive.infolist() if not info.is_dir()}
    package = {name for name in names if not re.match(r"lora_kernels-[^/]+\.dist-info/", name)}
    files = (ROOT / "lora_kernels").rglob("*.*")
    source = {str(path.relative_to(ROOT)) for path in files if path.suffix in (".py", ".pyi", ".typed")}
    extensions = {name.split(".")[0].rpartition("/")[2] for name in package if name.endswith((".so", ".pyd"))}
    modules = {name for name in package if name.startswith("lora_kernels/") and not name.endswith((".so", ".pyd"))}
    found = []
    if missing := source - modules:
        found.append(f"these are missing: {', '.join(sorted(missing))}")
    if stray := package - source - {name for name in package if re.match(r"lora_kernels/_(C|cuda)\.", name)}:
        found.append(f"these do not belong in it: {', '.join(sorted(stray))}")
    if extensions != (expected := {"_C", "_cuda"} if cuda else {"_C"}):
        found.append(f"it has the extensions {sorted(extensions)}; expected: {sorted(expected)}")
    if wheel.stat().st_size >= MAX_BYTES:
        found.append(f"it has {wheel.stat().st_size / 2**20:.1f} MiB; allowed: {MAX_BYTES >> 20}")
    return found


def main() -> None:
    import runpy

    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    cuda = bool(setup["cuda_archs"](inplace=False)) and setup["find_nvcc"]() is not None
    for wheel in map(Path, sys.argv[1:]):
        found = problems(wheel, cuda)
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, {'with' if cuda else 'without'} CUDA C++ kernels")
        if found:
            raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
