"""The layout of the package: imports point downwards only."""

import ast
from pathlib import Path

import pytest

import parchgrad
from parchgrad import errors

# From the bottom up; modules on one line may import each other.
ORDER = [
    {"_version", "errors", "files", "checks"},
    {"tensor_files"},
    {"hooks", "partition", "layers", "stability", "statistics.moments", "statistics.tests", "statistics.compact"},
    {"statistics.checkpoint", "statistics.processes", "statistics.layer"},
    {"statistics", "statistics.store"},
    {"statistics.accumulate", "statistics.pickles", "selection"},
    {"statistics.collect", "rules"},
    {"convolution", "diagnosis", "edit"},
    {"engine"},
    {"heads"},
    {"attribution"},
    {"recording"},
    {"data.images", "data.folders", "data.samples", "data.outlines", "shapes_network"},
    {"data.shapes"},
    {
        "data",
        "data.geometry",
        "data.imagenet",
        "data.perturbed",
        "models",
        "evaluation",
        "evaluation.examples",
        "evaluation.grid_pointing",
        "evaluation.localisation",
        "evaluation.perturbation",
        "evaluation.methods",
        "evaluation.sanity",
        "evaluation.report",
        "evaluation.runs",
        "evaluation.scores",
        "evaluation.settings",
        "evaluation.sparsity",
        "evaluation.stability",
        "evaluation.summary",
        "visual",
        "visual.charts",
        "visual.maps",
        "visual.animation",
        "visual.channels",
        "visual.sweeps",
        "visual.teaching",
    },
    {"collection", "configuration", "explanation", "demo", "reporting", "models.pretrained_models"},
    {"hook_wrapper"},
    {"attribution_methods"},
    {"exploration", "web_guard"},
    {"loading"},
    {"web"},
    {"cli.shared"},
    {"cli.evaluation", "cli.explorer", "cli.photographs", "cli.statistics"},
    {"cli"},
]
SOURCE = Path(parchgrad.__file__).parent


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("parchgrad"):
            module = node.module.removeprefix("parchgrad").removeprefix(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix(".")
                yield inner if inner in set().union(*ORDER) else module
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("parchgrad.") for a in node.names if a.name.startswith("parchgrad."))


def test_imports_point_downwards_only():
    level = {module: index for index, modules in enumerate(ORDER) for module in modules}
    for path in sorted(SOURCE.rglob("*.py")):
        module = (
            ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__").removesuffix("__init__")
        )
        if module in ("", "__main__"):
            continue
        for imported in imported_modules(path):
            assert level[imported] <= level[module], f"{module} imports {imported}, which stands above it"


def test_nothing_prints_outside_the_command_line():
    for path in SOURCE.rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        printing = any(isinstance(call, ast.Name) and call.id == "print" for call in calls)
        assert "cli" in path.relative_to(SOURCE).parts or not printing, path


def test_lazy_names_are_the_public_names():
    assert set(parchgrad._HOMES) | {"__version__"} == set(parchgrad.__all__)
    assert all(getattr(parchgrad, name) is not None for name in parchgrad.__all__)
    assert set(parchgrad.__all__) <= set(dir(parchgrad))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        parchgrad.nothing  # noqa: B018 - the access is the test


def test_every_error_is_a_parchgrad_error():
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert all(issubclass(error, parchgrad.ParchGradError | UserWarning) for error in classes)
