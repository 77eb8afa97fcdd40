"""How long a fresh process takes to import the package, compared with its dependencies.

    python benchmarks/imports.py

For each statement, prints the median wall-clock and processor time and the fastest time over fresh processes. The
statements take turns, so that other load affects all of them alike. Python's own start is not counted.
"""

import statistics
import subprocess
import sys

STATEMENTS = (
    "import torch",
    "import parchgrad",
    "from parchgrad import ParchGrad",
    "from parchgrad import ParchGrad, Explainer",
    "import captum.attr",
    "import parchgrad.models",
    "import timm, torchvision",
    "import parchgrad.cli",
)
ROUNDS = 7
_TIMED = """
import time
clock, processor = time.perf_counter(), time.process_time()
{statement}
print(time.perf_counter() - clock, time.process_time() - processor)
"""


def seconds_of(statement: str) -> tuple[float, float]:
    """Measure the wall-clock and processor time of a statement in a fresh process, in seconds."""
    command = [sys.executable, "-c", _TIMED.format(statement=statement)]
    clock, processor = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(clock), float(processor)


def main() -> None:
    """Measure and print the results."""
    for statement in STATEMENTS:
        # Warm up the file cache.
        seconds_of(statement)
    measured = {statement: [] for statement in STATEMENTS}
    for _ in range(ROUNDS):
        for statement in STATEMENTS:
            measured[statement].append(seconds_of(statement))
    print(f"{'statement':44s} clock  processor  fastest")
    for statement, found in measured.items():
        clock, processor = (statistics.median(part) for part in zip(*found, strict=True))
        print(f"{statement:44s} {clock:5.2f} {processor:10.2f} {min(found)[0]:8.2f}")


if __name__ == "__main__":
    main()
