"""Workflows, the conda recipe, the citation, badges and the changelog agree with the project."""

import re
import sys

import pytest
import yaml
from packaging.requirements import Requirement

import parchgrad
from tests.support import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSIONS = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib"}


def read_yaml(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


WORKFLOWS = {path.stem: read_yaml(path) for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))}
JOBS = {f"{name}/{job}": found for name, workflow in WORKFLOWS.items() for job, found in workflow["jobs"].items()}


def commands_of(job):
    return "\n".join(step["run"] for step in job["steps"] if "run" in step)


def test_workflows_run_commands_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    asked = {target for job in JOBS.values() for target in re.findall(r"\bmake (\S+)", commands_of(job))}
    assert {"test", "docs"} <= asked <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    variants = re.findall(r"^    (\w+)\)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(JOBS["tests/changes"]["strategy"]["matrix"]["variant"]) == sorted(variants)


def test_every_python_of_the_classifiers_is_tested_on_three_systems():
    matrix = JOBS["tests/tests"]["strategy"]["matrix"]
    assert matrix["python"] == VERSIONS
    assert {system.partition("-")[0] for system in matrix["system"]} == {"ubuntu", "macos", "windows"}
    assert PROJECT["requires-python"] == f">={VERSIONS[0]}"
    steps = [step for job in JOBS.values() for step in job["steps"] if "python-version" in step.get("with", {})]
    given = [str(step["with"]["python-version"]) for step in steps]
    assert "${{ matrix.python }}" in given
    assert set(" ".join(given).replace("${{ matrix.python }}", "").split()) <= set(VERSIONS)


def test_windows_runs_the_tests_that_make_runs():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (options,) = re.findall(r"^PYTEST := .*-m pytest (.*)$", makefile, re.MULTILINE)
    (left_out,) = re.findall(r"^test:.*\n\t\$\(PYTEST\) (.*)$", makefile, re.MULTILINE)
    assert f"-m pytest {options} {left_out}\n" in commands_of(JOBS["tests/tests"])


def test_only_what_publishes_may_write():
    written = {}
    for name, workflow in WORKFLOWS.items():
        assert workflow["permissions"] == {"contents": "read"}
        assert workflow["concurrency"]["cancel-in-progress"] == (name == "tests")
    for name, job in JOBS.items():
        written[name] = {right for right, value in job.get("permissions", {}).items() if value == "write"}
        # A job with rights of its own runs actions, and nothing from the checkout.
        assert not (written[name] and commands_of(job))
    assert {name: rights for name, rights in written.items() if rights} == {
        "pages/deploy": {"pages", "id-token"},
        "release/publish": {"id-token"},
    }
    assert JOBS["release/publish"]["environment"] == "pypi"
    assert JOBS["release/publish"]["needs"] == "build"


@pytest.mark.parametrize("name", JOBS)
def test_actions_are_pinned_to_a_major_version(name):
    for step in JOBS[name]["steps"]:
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.search(r"@(v\d+|release/v\d+)$", step["uses"])
            assert step["uses"].startswith(("actions/", "pypa/"))
        if "actions/checkout@" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False


def test_the_recipe_requires_what_the_project_requires():
    recipe = read_yaml("recipe/recipe.yaml")
    assert recipe["context"]["version"] == parchgrad.__version__
    python, *run = recipe["requirements"]["run"]
    # conda-forge fills in its own lowest Python.
    assert python == "python >=${{ python_min }}"
    found = {CONDA_NAMES.get(name, name): bound for name, _, bound in (entry.partition(" ") for entry in run)}
    assert found == {entry.name: str(entry.specifier) for entry in map(Requirement, PROJECT["dependencies"])}
    scripts = recipe["build"]["python"]["entry_points"]
    assert dict(entry.split(" = ") for entry in scripts) == PROJECT["scripts"]
    assert recipe["about"]["license"] == PROJECT["license"]
    assert (ROOT / recipe["about"]["license_file"]).exists()


def test_the_citation_is_of_this_version():
    citation = read_yaml("CITATION.cff")
    assert citation["version"] == parchgrad.__version__
    assert citation["license"] == PROJECT["license"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {citation['version']} - {citation['date-released']}\n" in changes
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    entries = {entry["url"]: entry for entry in (citation["preferred-citation"], *citation["references"])}
    cited = re.findall(
        r"  title +=.*\{(.*)\},\n  author +=.*\{(.*)\},\n(?:  .*\n)*?  year +=.*(\d{4})\},\n  url +=.*\{(.*)\}", readme
    )
    assert len(cited) == 2
    for title, authors, year, url in cited:
        entry = entries[url]
        assert title.replace("}", "") == entry["title"]
        names = [f"{author['family-names']}, {author['given-names']}" for author in entry["authors"]]
        assert (authors.split(" and "), int(year)) == (names, entry["year"])
    assert f"version = {{{parchgrad.__version__}}}" in readme


def test_badges_are_true():
    python = (ROOT / "docs" / "images" / "badge-python.svg").read_text(encoding="utf-8")
    licence = (ROOT / "docs" / "images" / "badge-licence.svg").read_text(encoding="utf-8")
    assert f">{VERSIONS[0]} to {VERSIONS[-1]}<" in python
    assert f">{PROJECT['license']}<" in licence
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for words in (f"Python: {VERSIONS[0]} to {VERSIONS[-1]}", f"Licence: {PROJECT['license']}"):
        assert f"[![{words}](docs/images/" in readme
