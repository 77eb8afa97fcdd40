"""The layout of the package: imports point downwards only."""

import ast
import re
from pathlib import Path

import pytest

import parchgrad
from parchgrad import errors
from parchgrad.data.images import read_image
from tests.support import ROOT

# The rooms from the bottom up. A module may import from its own room and from those below.
ROOMS = (
    ("_version", "errors"),
    ("_io",),
    ("core",),
    ("explain",),
    ("statistics",),
    ("data",),
    ("models",),
    ("visual",),
    ("evaluation",),
    ("workflows",),
    ("explorer", "legacy", "attribution_methods", "models.pretrained_models"),
    ("cli",),
)
SOURCE = Path(parchgrad.__file__).parent


def level_of(module):
    """The place of a module's room, counted from the bottom."""
    rooms = {room: level for level, tier in enumerate(ROOMS) for room in tier}
    return rooms[module] if module in rooms else rooms[module.split(".")[0]]


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("parchgrad."):
            yield node.module.removeprefix("parchgrad.")
        elif isinstance(node, ast.ImportFrom) and node.module == "parchgrad":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("parchgrad.") for alias in node.names if "parchgrad." in alias.name)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_downwards_only(path):
    module = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    if module not in ("__init__", "__main__"):
        above = [other for other in imported_modules(path) if level_of(other) > level_of(module)]
        assert not above, f"{module} imports {above}"


def test_the_top_level_holds_rooms_and_little_else():
    rooms = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file()}
    assert rooms == {room for tier in ROOMS for room in tier if (SOURCE / room).is_dir()}
    modules = {path.stem for path in SOURCE.glob("*.py")}
    assert modules == {"__init__", "__main__", "_version", "attribution_methods", "errors"}


def test_nothing_prints_outside_the_command_line():
    for path in SOURCE.rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        printing = any(isinstance(call, ast.Name) and call.id == "print" for call in calls)
        assert "cli" in path.relative_to(SOURCE).parts or not printing, path


def test_private_names_of_torch_are_in_one_module():
    of_tensors_and_modules = {"_version", "_parameters", "_modules", "_buffers", "_conv_forward", "_forward_hooks"}
    for path in sorted(SOURCE.rglob("*.py")):
        found = {
            ast.unparse(node)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute)
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
            and (ast.unparse(node).startswith("torch.") or node.attr in of_tensors_and_modules)
            and not ast.unparse(node).startswith("self.")
        }
        assert not found or path.name == "_torch.py", f"{path} uses {found}"


def test_lazy_names_are_the_public_names():
    assert set(parchgrad._HOMES) | {"__version__"} == set(parchgrad.__all__)
    assert all(getattr(parchgrad, name) is not None for name in parchgrad.__all__)
    assert set(parchgrad.__all__) <= set(dir(parchgrad))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        parchgrad.nothing  # noqa: B018 - the access is the test


def test_every_error_is_a_parchgrad_error_and_of_a_built_in_kind():
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert len(classes) == len(errors.__all__) - 3  # the functions
    for error in classes:
        assert issubclass(error, parchgrad.ParchGradError) or error.__bases__ == (UserWarning,)
        assert error.__doc__.rstrip().endswith(".")
    kinds = (ValueError, ArithmeticError, RuntimeError, OSError, ImportError, UserWarning)
    for error in set(classes) - {parchgrad.ParchGradError}:
        assert issubclass(error, kinds), error


def test_errors_are_caught_by_their_built_in_kind(tmp_path):
    with pytest.raises(ValueError, match="quantile"):
        parchgrad.GradientEnergy(quantile=2)
    with pytest.raises(OSError, match="missing"):
        read_image(tmp_path / "missing.png")


def test_the_reference_has_every_public_name():
    text = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    directives = set(re.findall(r"^\.\. auto(?:class|function):: parchgrad\.(\w+)$", text, flags=re.MULTILINE))
    assert directives == set(parchgrad.__all__) - {"__version__"}
