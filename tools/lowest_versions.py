"""Print the lowest version of each requirement that pyproject.toml allows, as constraints for pip.

    python tools/lowest_versions.py EXTRA... > constraints.txt

Without an extra, print only the requirements of the package itself. Indirect requirements are left to pip.
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
    """Yield the requirements of a project and its extras, including extras that those extras name."""
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
    """Return the constraint that pins a requirement to its lower bound.

    Raises:
        ValueError: if it does not have exactly one lower bound.

    Example:
        >>> lowest(Requirement("tomli>=2.0,<3; python_version < '3.11'"))
        "tomli==2.0; python_version < '3.11'"
    """
    bounds = [bound.version for bound in requirement.specifier if bound.operator == ">="]
    if len(bounds) != 1:
        raise ValueError(f"{requirement} needs exactly one lower bound. Declare it as NAME>=VERSION.")
    marker = f"; {requirement.marker}".replace('"', "'") if requirement.marker else ""
    return f"{requirement.name}=={bounds[0]}{marker}"


def main() -> None:
    """Print one constraint per line."""
    parser = argparse.ArgumentParser(description=re.split(r"\n\s*\n", __doc__)[0])
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help="extra in pyproject.toml, such as dev")
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    # Several extras may have the same requirement.
    for line in dict.fromkeys(map(lowest, requirements(project, parser.parse_args().extras))):
        print(line)


if __name__ == "__main__":
    main()
