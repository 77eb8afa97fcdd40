"""How fast the explorer answers, and what becomes of it when many use it at once.

    python benchmarks/explorer.py                            # from a new quantile to the map, by selector
    python benchmarks/explorer.py --users 20 --seconds 60    # good and bad requests over loopback, every map checked

The second serves the explorer in a process of its own, whose memory is read from /proc where there is one.
"""

import argparse
import base64
import contextlib
import io
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gradio_client import Client, handle_file
from PIL import Image

import parchgrad as pg
from parchgrad.demo import example_photographs
from parchgrad.exploration import EXAMPLES, Explorer, Photograph, View, tinted

NETWORK = "efficientnet_lite0"
QUANTILES = [round(0.05 + 0.05 * step, 2) for step in range(9)]


def answers(rounds: int) -> None:
    """Print the time from a new quantile to the coloured maps, for each selector, median and worst."""
    explorer = Explorer()
    photograph = Photograph("coffee")
    # The first passes of a process are slow.
    for step in range(10):
        explorer.explore(photograph, View(quantile=0.5 + step / 100))
    for layers in ("0.5", "0.75", "all"):
        for selector in explorer.selectors(NETWORK):
            if selector in ("class", "instance") and layers != "0.5":
                # The statistics that come with the package are of the upper half.
                continue
            explorer.explore(photograph, View(selector=selector, layers=layers, quantile=0.5))
            times = []
            for step in range(rounds):
                began = time.perf_counter()
                view = View(selector=selector, layers=layers, quantile=0.02 + 0.4 * step / rounds)
                tinted(explorer.explore(photograph, view).maps(), signed=False)
                times.append(time.perf_counter() - began)
            print(f"{selector:10s} layers {layers:5s} {statistics.median(times):6.3f} s, worst {max(times):6.3f} s")


@dataclass
class Tally:
    """What the users saw, together."""

    counts: Counter[str] = field(default_factory=Counter)
    times: list[float] = field(default_factory=list)


def crowd(users: int, seconds: float) -> None:
    """Print what became of good and bad requests by many users at once."""
    wanted, lock, tally = expected_maps(), threading.Lock(), Tally()
    with tempfile.TemporaryDirectory() as folder, served() as (url, process):
        files = {name: Path(folder, f"{name}.png") for name in EXAMPLES}
        for path, image in zip(files.values(), example_photographs(), strict=True):
            image.save(path)
        Path(folder, "bad.png").write_text("no picture")
        before, peak, end = memory(process.pid), 0, time.monotonic() + seconds

        def use(number: int) -> None:
            draw = random.Random(number)
            client = Client(url, verbose=False)
            while time.monotonic() < end:
                began = time.perf_counter()
                try:
                    found = request(client, draw, files, Path(folder, "bad.png"), wanted)
                except Exception as error:
                    # Whatever it is, it counts.
                    found = f"failed: {str(error)[:80]}"
                with lock:
                    tally.counts[found] += 1
                    tally.times.append(time.perf_counter() - began)

        threads = [threading.Thread(target=use, args=(number,)) for number in range(users)]
        for thread in threads:
            thread.start()
        minutes: list[int] = []
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.5)
            peak = max(peak, memory(process.pid))
            if (time.monotonic() - end + seconds) // 30 > len(minutes):
                minutes.append(memory(process.pid) >> 20)
        alive = process.poll() is None
    for name, count in tally.counts.most_common():
        print(f"{count:6d} {name}")
    ordered = sorted(tally.times)
    print(f"median {statistics.median(ordered):.2f} s, 95 % within {ordered[int(0.95 * len(ordered))]:.2f} s")
    print(f"memory of the server {before / 2**20:,.0f} MiB before, at most {peak / 2**20:,.0f} MiB; alive: {alive}")
    print(f"MiB every half minute: {minutes}")


def request(client: Any, draw: random.Random, files: dict[str, Path], bad: Path, wanted: dict[Any, Any]) -> str:
    """One user's next request, and how it was answered."""
    kind = draw.random()
    if kind < 0.1:
        client.predict(handle_file(str(bad)), api_name="/take")
        return "bad file refused" if "no image that can be read" in show(client, 0.1) else "WRONG: bad file taken"
    name, quantile = draw.choice(EXAMPLES), draw.choice(QUANTILES)
    if draw.random() < 0.5:
        client.predict(handle_file(str(files[name])), api_name="/take")
    else:
        client.predict(name, api_name="/take_example")
    if kind < 0.2:
        said = show(client, quantile, layers="nothing")
        return "bad layers refused" if "matches none" in said else "WRONG: bad layers taken"
    page = show(client, quantile)
    maps = re.findall(r'class="pg-map" src="data:image/png;base64,([^"]+)"', page)
    if len(maps) != 2:
        return "WRONG: no maps"
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(maps[1]))), dtype=float) / 255
    return "right map" if np.abs(found - wanted[name, quantile]).max() < 0.01 else "WRONG: another map"


def show(client: Any, quantile: float, layers: str = "0.5") -> str:
    """Ask for the page as it is with these settings."""
    settings = {"selector": "energy", "method": "gradient", "prune": True, "gamma": 1, "signed": False, "opacity": 1}
    result: str = client.predict(
        network=NETWORK, target=None, stamp="", layers=layers, quantile=quantile, **settings, api_name="/show"
    )[0]
    return result


def expected_maps() -> dict[Any, Any]:
    """The map of each photograph and quantile, by the library itself."""
    classifier, wanted = pg.load_model(NETWORK), {}
    for name, image in zip(EXAMPLES, example_photographs(), strict=True):
        inputs = classifier.preprocess(image).unsqueeze(0)
        plain = pg.heatmap(pg.Explainer(classifier.model, None).attribute(inputs))[0]
        for quantile in QUANTILES:
            explainer = pg.Explainer(classifier.model, pg.GradientEnergy(quantile=quantile), layers=0.5)
            heat = pg.heatmap(explainer.attribute(inputs))[0]
            wanted[name, quantile] = tinted([plain, heat], signed=False)[1][1]
    return wanted


@contextlib.contextmanager
def served() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run the command; give its address and its process."""
    command = [sys.executable, "-m", "parchgrad", "explore", "--port", "0", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        assert found is not None, "The explorer did not start."
        try:
            yield found[0], process
        finally:
            process.send_signal(signal.SIGINT)


def memory(process: int) -> int:
    """Resident memory in bytes; 0 where the system does not say."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--users", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60)
    asked = parser.parse_args()
    if asked.users:
        crowd(asked.users, asked.seconds)
    else:
        answers(asked.rounds)
