"""The files that GitHub and other tools read agree with the package and its linters."""

import re

import pytest
import yaml
from places import ROOT

import lora_kernels


@pytest.fixture(scope="module")
def pyproject():
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def commands(job):
    return [step["run"] for step in job["steps"] if "run" in step]


def test_citation_is_of_this_version():
    citation = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == lora_kernels.__version__
    assert citation["authors"] == [{"name": "lora-kernels authors"}]


def test_citation_agrees_with_the_package(pyproject):
    citation, project = read("CITATION.cff"), pyproject["project"]
    assert citation["title"] == project["name"]
    assert citation["abstract"] == project["description"]
    assert citation["license"] == project["license"]
    assert citation["keywords"] == project["keywords"]
    assert citation["repository-code"] == project["urls"]["Repository"]


def test_version_has_one_home(pyproject):
    assert "version" in pyproject["project"]["dynamic"]
    assert pyproject["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lora_kernels.__version__"}


def test_urls_are_the_repository_s(pyproject):
    urls = pyproject["project"]["urls"]
    assert all(url.startswith(urls["Repository"]) for url in urls.values())
    changelog = urls["Changelog"].rpartition("/")[2]
    assert (ROOT / changelog).is_file()


def test_ci_runs_the_gate_and_builds_a_wheel():
    jobs = read(".github/workflows/ci.yml")["jobs"]
    assert ".ci/run" in commands(jobs["gate"])
    assert "make wheel" in commands(jobs["wheel"])
    assert all(job["runs-on"].startswith("ubuntu") for job in jobs.values())


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_have_fields_that_github_accepts(name):
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert all(field["type"] in ("input", "textarea", "dropdown", "checkboxes") for field in fields)
    assert all(field["attributes"]["label"] for field in fields)
    names = [field["id"] for field in fields]
    assert len(set(names)) == len(names)


def test_a_bug_asks_for_the_doctor_s_output():
    fields = read(".github/ISSUE_TEMPLATE/bug.yml")["body"]
    (doctor,) = [field for field in fields if "lora-kernels doctor" in field["attributes"]["label"]]
    assert doctor["validations"]["required"]


def test_pre_commit_runs_the_versions_that_lint_runs(pyproject):
    hooks = {hook["id"]: hook for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]}
    assert {"ruff-check", "ruff-format", "mypy", "lint-imports", "clang-format"} <= hooks.keys()
    # They are the environment's own, whose versions the extra `dev` pins.
    assert all(hook["language"] == "system" for hook in hooks.values())
    pinned = {re.split("[=<>]", requirement)[0] for requirement in pyproject["project"]["optional-dependencies"]["dev"]}
    assert {"clang-format", "import-linter", "mypy", "ruff"} <= pinned
    lint = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nlint:")[2].partition("\n\n")[0]
    for hook in hooks.values():
        assert f"$(BIN)/{hook['entry'].removeprefix('.venv/bin/').split()[0]}" in lint
