"""The CUDA kernels compiled by nvcc for every shipped architecture, and what the binaries say. Needs no GPU."""

import runpy
import subprocess
from pathlib import Path

import kernel_report
import pytest
from places import ROOT

SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
NVCC = SETUP["find_nvcc"]()
ARCHS = [f"sm_{arch}" for arch in SETUP["CUDA_ARCHS"].split(",")]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """A row for each kernel instance and architecture; see tools/kernel_report.py."""
    if NVCC is None:
        pytest.skip("there is no nvcc")
    folder, rows = tmp_path_factory.mktemp("cuda"), []
    for command in SETUP["cuda_commands"](NVCC, SETUP["CUDA_ARCHS"].split(",")):
        source = Path(command[-1])
        if source.suffix != ".cu":
            continue
        object_file = folder / f"{source.stem}.o"
        result = subprocess.run([*command, "-o", object_file], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        assert "warning" not in result.stderr, result.stderr[-4000:]
        rows += kernel_report.cuda_rows(object_file)
    print("\n" + kernel_report.cuda_table(rows))
    return rows


@pytest.mark.slow
def test_every_architecture_without_spills_and_with_tensor_cores(kernels):
    assert {row["arch"] for row in kernels} == set(ARCHS)
    per_arch = [{row["mangled"] for row in kernels if row["arch"] == arch} for arch in ARCHS]
    assert len(per_arch[0]) > 50 and all(names == per_arch[0] for names in per_arch)
    problems = kernel_report.cuda_problems(kernels)
    assert not problems, "\n".join(problems)


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
