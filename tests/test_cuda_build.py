"""The CUDA kernels compiled by nvcc for every shipped architecture, and what the binaries say. Needs no GPU."""

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
NVCC = SETUP["find_nvcc"]()
ARCHS = [f"sm_{arch}" for arch in SETUP["CUDA_ARCHS"].split(",")]
NO_MATRIX = {"reduce_kernel", "quantize_kernel", "quantize_absmax_kernel", "dequantize_kernel", "prepare_kernel",
             "step_kernel"}  # fmt: skip
# Registers above which fewer than two blocks of 256 threads fit on a multiprocessor of 64K registers.
TWO_BLOCKS = 128


def tool(name):
    """NVIDIA's cuobjdump or nvdisasm: the toolkit's, or the one that Triton brings."""
    if found := shutil.which(name):
        return Path(found)
    triton = pytest.importorskip("triton")
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return path if path.exists() else pytest.skip(f"there is no {name}")


def dump(option, object_file):
    """What cuobjdump says, as (architecture, text) for each binary in the object."""
    environment = {**os.environ, "PATH": f"{tool('nvdisasm').parent}:{os.environ['PATH']}"}
    command = [tool("cuobjdump"), option, object_file]
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    _, *parts = re.split(r"\narch = (sm_\w+)\n", text)
    return zip(parts[::2], parts[1::2], strict=True)


def kernel_name(mangled):
    return re.search(r"\d((?:[a-z]+_)+kernel)(?!s)", mangled)[1]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """A row for each kernel instance and architecture: registers, stack, shared memory, tensor core instructions."""
    if NVCC is None:
        pytest.skip("there is no nvcc")
    folder = tmp_path_factory.mktemp("cuda")
    rows = {}
    for command in SETUP["cuda_commands"](NVCC, SETUP["CUDA_ARCHS"].split(",")):
        source = Path(command[-1])
        if source.suffix != ".cu":
            continue
        object_file = folder / f"{source.stem}.o"
        result = subprocess.run([*command, "-o", object_file], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        assert "warning" not in result.stderr, result.stderr[-4000:]
        for arch, text in dump("--dump-resource-usage", object_file):
            for mangled, usage in re.findall(r"Function (\w+):\s+(REG:.*)", text):
                numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
                rows[arch, mangled] = {"source": source.name, "kernel": kernel_name(mangled), **numbers, "HMMA": 0}
        for arch, text in dump("-sass", object_file):
            for part in text.split("Function : ")[1:]:
                rows[arch, part.split()[0]]["HMMA"] = part.count("HMMA.16816.F32")
    for (arch, _), row in sorted(rows.items(), key=lambda item: (item[1]["source"], item[1]["kernel"], item[0][0])):
        print(
            f"{arch:8} {row['source']:15} {row['kernel']:24} " + " ".join(f"{k} {v}" for k, v in list(row.items())[2:])
        )
    return rows


@pytest.mark.slow
def test_every_architecture_without_spills_and_with_tensor_cores(kernels):
    assert {arch for arch, _ in kernels} == set(ARCHS)
    per_arch = [{mangled for arch, mangled in kernels if arch == one} for one in ARCHS]
    assert len(per_arch[0]) > 50 and all(names == per_arch[0] for names in per_arch)
    spills = {key: row for key, row in kernels.items() if row["STACK"] or row["LOCAL"]}
    assert not spills, spills
    no_matrix = {key for key, row in kernels.items() if row["kernel"] not in NO_MATRIX and not row["HMMA"]}
    assert not no_matrix, no_matrix
    # gemm_kernel<T, kWeightKMajor, kAligned>: without cp.async a thread holds a whole stage, and one block must do.
    crowded = {
        key: row
        for key, row in kernels.items()
        if row["kernel"] == "gemm_kernel" and "Lb1EEEv" in key[1] and row["REG"] > TWO_BLOCKS
    }
    assert not crowded, crowded


def test_architectures_are_read_from_the_environment(monkeypatch):
    archs, variable = SETUP["cuda_archs"], SETUP["CUDA_ARCHS_VARIABLE"]
    monkeypatch.delenv(variable, raising=False)
    assert archs(inplace=True) == [] and archs(inplace=False) == SETUP["CUDA_ARCHS"].split(",")
    monkeypatch.setenv(variable, "sm_90a; 80, 120")
    assert archs(inplace=True) == ["80", "90a", "120"]
    commands = SETUP["cuda_commands"]("nvcc", archs(inplace=True))
    assert any("-gencode=arch=compute_80,code=compute_80" in command for command in commands)
    for nothing in ("", "none"):
        monkeypatch.setenv(variable, nothing)
        assert archs(inplace=False) == []
    monkeypatch.setenv(variable, "80,hopper")
    with pytest.raises(SystemExit, match="'hopper' is not an architecture"):
        archs(inplace=True)


def test_nvcc_is_found_where_it_was_said_to_be(monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert SETUP["find_nvcc"]() == str(nvcc)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(nvcc.parent))
    assert SETUP["find_nvcc"]() == str(nvcc)
