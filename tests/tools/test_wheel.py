"""A wheel from the source distribution, installed in an environment of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import check_wheel
import pytest
from places import ROOT


def run(*command, cwd, **variables):
    """What the command prints; it sees nothing of this checkout, and no setting of these tests."""
    dropped = ("PYTHONPATH", "TRITON_INTERPRET", "LORA_KERNELS_BACKEND")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    variables |= {"COLUMNS": "200", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    result = subprocess.run(command, cwd=cwd, env=environment | variables, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    # Of a copy, since setuptools writes its egg-info beside the source and lists what an old one there lists.
    ignore = shutil.ignore_patterns(".*", "build", "dist", "outputs", "*.egg-info", "*.so", "__pycache__", "tests")
    shutil.copytree(ROOT, folder / "checkout", ignore=ignore)
    build = "import sys, setuptools.build_meta as backend; print(backend.build_sdist(sys.argv[1]))"
    name = run(sys.executable, "-c", build, str(folder), cwd=folder / "checkout").splitlines()[-1]
    with tarfile.open(folder / name) as archive:
        archive.extractall(folder, filter="data")
    return folder / name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(source):
    """A wheel without the CUDA kernels, which would take minutes."""
    # What the build in place has compiled: objects are named by their commands and used where they are newer.
    for compiled in ROOT.glob("build/temp*"):
        shutil.copytree(compiled, source / "build" / compiled.name)
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", ".")
    run(*command, cwd=source, LORA_KERNELS_CUDA_ARCHS="none", LORA_KERNELS_BUILD="package")
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """The bin directory of a new environment with the wheel, and with torch from the one that runs the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    site = sysconfig.get_path("purelib", vars={"base": str(folder)})
    # Behind the environment's own packages. The .pth files of an editable installation there are not read.
    Path(site, "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return folder / "bin"


def test_source_distribution_has_all_that_a_build_needs(source):
    def sources(root):
        files = [path for folder in ("csrc", "lora_kernels") for path in (root / folder).rglob("*") if path.is_file()]
        return {str(path.relative_to(root)) for path in files if path.suffix not in (".pyc", ".so")}

    assert sources(source) == sources(ROOT)
    assert {Path(name).suffix for name in sources(source)} == {".cpp", ".h", ".cu", ".cuh", ".py", ".pyi", ".typed"}
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        assert (source / name).exists()


def test_wheel_has_the_package_and_nothing_else(wheel, tmp_path):
    assert check_wheel.problems(wheel, cuda=False) == []
    assert any("expected: ['_C', '_cuda']" in problem for problem in check_wheel.problems(wheel, cuda=True))
    stray = tmp_path / wheel.name
    shutil.copy(wheel, stray)
    with zipfile.ZipFile(stray, "a") as archive:
        archive.writestr("lora_kernels/_simt.so", "")
        archive.writestr("lora_kernels.libs/libgomp.so.1", "")
        archive.writestr("csrc/bindings.cpp", "")
    problems = "\n".join(check_wheel.problems(stray, cuda=False))
    for name in ("_simt.so", "libgomp.so.1", "csrc/bindings.cpp"):
        assert name in problems


def test_wheel_says_that_it_is_typed(wheel, tmp_path):
    marker = "lora_kernels/py.typed"
    untyped = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(untyped, "w") as rest:
        assert marker in whole.namelist()
        for name in set(whole.namelist()) - {marker}:
            rest.writestr(name, whole.read(name))
    assert check_wheel.problems(untyped, cuda=False) == [f"these are missing: {marker}"]


def test_installed_wheel_runs_on_the_cpu(environment, tmp_path):
    output = run(environment / "python", ROOT / "tools/check_install.py", cwd=tmp_path)
    assert f"installed in {environment.parent}" in output
    assert "cpu: usable" in output and "reference: usable" in output
    assert "cuda: the extension lora_kernels._cuda can't be imported" in output
    # torch's, and none besides.
    (runtimes,) = [line for line in output.splitlines() if line.startswith("OpenMP runtimes")]
    assert "," not in runtimes


def test_doctor_says_why_cuda_is_unusable(environment, tmp_path):
    pytest.importorskip("typer")
    output = run(environment / "lora-kernels", "doctor", cwd=tmp_path)
    (row,) = [line for line in output.splitlines() if " cuda " in line]
    assert " no " in row and "lora_kernels._cuda" in row
