"""Print the lowest version that pyproject.toml admits of each requirement, as constraints for pip.

    python tools/lowest_versions.py EXTRA... > constraints.txt

Without an extra, only what the package itself requires. What the requirements themselves require is left to pip.
"""

import argparse
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def requirements(project: dict, extras: Iterable[str]) -> Iterator[Requirement]:
    """The requirements of a project and of its extras, with those of extras that name further extras of its own."""
    waiting, seen = [*map(Requirement, project["dependencies"])], set()
    waiting.append(Requirement(f"{project['name']}[{','.join(extras)}]"))
    while waiting:
        found = waiting.pop(0)
        if found.name != project["name"]:
            yield found
            continue
        for extra in sorted(found.extras - seen):
            seen.add(extra)
            waiting.extend(map(Requirement, project["optional-dependencies"][extra]))


def lowest(requirement: Requirement) -> str:
    """The constraint that holds a requirement at its lower bound.

    Raises:
        ValueError: if it has none, so that nothing shows how old a version it works with.

    Example:
        >>> lowest(Requirement("tomli>=2.0,<3; python_version < '3.11'"))
        "tomli==2.0; python_version < '3.11'"
    """
    bounds = [bound.version for bound in requirement.specifier if bound.operator == ">="]
    if len(bounds) != 1:
        raise ValueError(f"{requirement} has no one lower bound; declare it as NAME>=VERSION.")
    marker = f"; {requirement.marker}".replace('"', "'") if requirement.marker else ""
    return f"{requirement.name}=={bounds[0]}{marker}"


def main() -> None:
    """Print one constraint a line."""
    parser = argparse.ArgumentParser(description=re.split(r"\n\s*\n", __doc__)[0])
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help="of pyproject.toml, such as dev")
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    # Several extras may require the same.
    for line in dict.fromkeys(map(lowest, requirements(project, parser.parse_args().extras))):
        print(line)


if __name__ == "__main__":
    main()
