"""How fast the explorer responds, and how it behaves under many users.

    python benchmarks/explorer.py                            # from a new quantile to the map, by selector
    python benchmarks/explorer.py --users 20 --seconds 60    # valid and invalid requests, every map checked

The second command serves the explorer on loopback in a separate process; its memory is read from /proc if available.
"""

import argparse
import base64
import contextlib
import html
import io
import os
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from gradio_client import Client, handle_file
from PIL import Image

import parchgrad as pg
from parchgrad.core.layers import parse_layers
from parchgrad.explorer.inputs import EXAMPLES, ImageSource, View
from parchgrad.explorer.views import Explorer, tinted
from parchgrad.workflows.demonstration import example_photographs

NETWORK = "efficientnet_lite0"
MEGABYTES = 2
# Time limit in seconds for a crowd that has not made every kind of request.
LONGEST = 180
OUTSIDE = ("file=/etc/passwd", "file=../../etc/passwd", "file=%2e%2e/%2e%2e/etc/passwd", "file=http://127.0.0.1/x.png")
MALFORMED = (
    b"",
    b"{",
    b"null",
    b"[1]",
    b"[" * 100_000,
    b'{"data": 1}',
    b'{"data": [], "fn_index": 10000}',
    b"\xff\xfe",
    b'{"data": [{"path": "http://127.0.0.1/x.png"}], "fn_index": 0, "session_hash": "a"}',
)
# All acceptable outcomes of a request.
RIGHT = (
    "right map",
    "bad file refused",
    "bad layers refused",
    "bad network refused",
    "path refused",
    "oversize refused",
    "malformed body refused",
)
QUANTILES = [round(0.05 + 0.05 * step, 2) for step in range(9)]


def answers(rounds: int) -> None:
    """Print the median and worst time from a new quantile to the coloured maps, for each selector."""
    explorer = Explorer()
    image = ImageSource("coffee")
    # The first passes of a process are slow.
    for step in range(10):
        explorer.explore(image, View(quantile=0.5 + step / 100))
    for layers in ("0.5", "0.75", "all"):
        for selector in explorer.selectors(NETWORK):
            if selector in ("class", "instance") and layers != "0.5":
                # The bundled statistics cover only the upper half.
                continue
            explorer.explore(image, View(selector=selector, layers=layers, quantile=0.5))
            times = []
            for step in range(rounds):
                began = time.perf_counter()
                view = View(selector=selector, layers=layers, quantile=0.02 + 0.4 * step / rounds)
                tinted(explorer.explore(image, view).maps(), signed=False)
                times.append(time.perf_counter() - began)
            print(f"{selector:10s} layers {layers:5s} {statistics.median(times):6.3f} s, worst {max(times):6.3f} s")


@dataclass(frozen=True, kw_only=True)
class Crowd:
    """Many concurrent users.

    Attributes:
        users: number of users.
        seconds: duration; extended on a busy machine until every kind of request was made.
        network: name of the network to explain.
        layers: layer choice, as text.
    """

    users: int
    seconds: float
    network: str = NETWORK
    layers: str = "0.5"


@dataclass(kw_only=True)
class Tally:
    """Outcomes of the requests of a crowd.

    Attributes:
        counts: number of requests by outcome; outcomes that must not happen start with `WRONG`.
        times: durations of all requests, in seconds.
        places: longest queue reported to a user.
        before: memory of the server after the warm-up, in bytes.
        peak: maximum memory afterwards, in bytes.
        after: memory at the end, in bytes.
        course: memory after each quarter of the duration, in bytes.
        alive: whether the server was still running at the end.
        said: output of the server on its error stream.
    """

    counts: Counter[str] = field(default_factory=Counter)
    times: list[float] = field(default_factory=list)
    places: int = 0
    before: int = 0
    peak: int = 0
    after: int = 0
    course: list[int] = field(default_factory=list)
    alive: bool = False
    said: str = ""

    @property
    def wrong(self) -> dict[str, int]:
        """Outcomes that must not happen, with their counts."""
        return {name: count for name, count in self.counts.items() if name.startswith("WRONG")}


class User:
    """One session of the page, which makes valid and invalid requests."""

    def __init__(self, url: str, crowd: Crowd, number: int, folder: Path, wanted: Mapping[Any, Any]) -> None:
        """Start a session; `wanted` holds the expected maps, and `number` is the random seed of the user."""
        # Skip loading certificates, which takes longer than most responses.
        self._client = Client(url, verbose=False, ssl_verify=False, httpx_kwargs={"timeout": 60})
        self._url, self._crowd, self._folder, self._wanted = url.rstrip("/"), crowd, folder, wanted
        self._draw = random.Random(number)
        # Longest queue reported to this user.
        self.place = 0

    def act(self) -> str:
        """Make a random request, and return its outcome."""
        bad = (self._bad_file, self._bad_layers, self._bad_network, self._traversal, self._oversize, self._malformed)
        # A third of the requests are invalid.
        if self._draw.random() < 1 / 3:
            return self._draw.choice(bad)()
        name, quantile = self._draw.choice(EXAMPLES), self._draw.choice(QUANTILES)
        self._take(name)
        page = self._show(quantile)
        maps = re.findall(r'class="pg-map" src="data:image/png;base64,([^"]+)"', page)
        if len(maps) != 3:
            return f"WRONG: no maps but {page[:200]}"
        found = np.asarray(Image.open(io.BytesIO(base64.b64decode(maps[1]))), dtype=float) / 255
        return "right map" if np.abs(found - self._wanted[name, quantile]).max() < 0.01 else "WRONG: another map"

    def close(self) -> None:
        """End the session."""
        self._client.close()

    def _take(self, name: str) -> None:
        if self._draw.random() < 0.5:
            self._client.predict(handle_file(str(self._folder / f"{name}.png")), api_name="/take")
        else:
            self._client.predict(name, api_name="/take_example")

    def _show(self, quantile: float, **changed: str) -> str:
        """Request the page with these settings, and watch the queue meanwhile."""
        best = View().resolved()
        settings: dict[str, Any] = {"selector": best.selector, "softness": best.softness, "gates": best.gates}
        settings |= {"antialias": best.antialias, "balance": best.balance, "method": best.method}
        settings |= {"prune": True, "gamma": 1, "signed": False}
        settings |= {"network": self._crowd.network, "layers": self._crowd.layers, "opacity": 1} | changed
        result = ""
        # Wait for a network that is still loading.
        while not result or "Results appear when it is ready" in result:
            job = self._client.submit(target=None, stamp="", quantile=quantile, **settings, api_name="/show")
            while not job.done():
                self.place = max(self.place, job.status().rank or 0)
                time.sleep(0.02)
            result = html.unescape(job.result()[0])
        return result

    def _bad_file(self) -> str:
        self._client.predict(handle_file(str(self._folder / "bad.png")), api_name="/take")
        said = self._show(0.1)
        return "bad file refused" if "'bad.png' is not a readable image" in said else "WRONG: bad file taken"

    def _bad_layers(self) -> str:
        self._take(EXAMPLES[0])
        return (
            "bad layers refused" if "matches none" in self._show(0.1, layers="nothing") else "WRONG: bad layers taken"
        )

    def _bad_network(self) -> str:
        said = self._show(0.1, network="no_such_network")
        known = "Neither torchvision nor timm has a model 'no_such_network'"
        return "bad network refused" if known in said else f"WRONG: bad network: {said[:200]}"

    def _traversal(self) -> str:
        path = self._draw.choice(OUTSIDE)
        answer = httpx.get(f"{self._url}/gradio_api/{path}", timeout=60)
        refused = answer.status_code in (403, 404) and "root:" not in answer.text
        return "path refused" if refused else f"WRONG: path answered by {answer.status_code}"

    def _oversize(self) -> str:
        files = {"files": ("large.png", bytes(int((MEGABYTES + 0.2) * 2**20)), "image/png")}
        try:
            status = httpx.post(f"{self._url}/gradio_api/upload", files=files, timeout=60).status_code
        except (httpx.NetworkError, httpx.RemoteProtocolError):
            # The server may respond and close the connection before it has received everything.
            status = 413
        return "oversize refused" if status == 413 else f"WRONG: oversize answered by {status}"

    def _malformed(self) -> str:
        body = self._draw.choice(MALFORMED)
        address = f"{self._url}/gradio_api/queue/join"
        status = httpx.post(address, content=body, headers={"content-type": "application/json"}, timeout=60).status_code
        return "malformed body refused" if 400 <= status < 500 else f"WRONG: {body[:40]!r} answered by {status}"


def observe(crowd: Crowd) -> Tally:
    """Serve the explorer to a crowd, and tally the outcomes of its requests."""
    wanted, lock, tally = expected_maps(crowd), threading.Lock(), Tally()
    with tempfile.TemporaryDirectory() as place, served(crowd.network) as (url, process, errors):
        folder = Path(place)
        for name, image in zip(EXAMPLES, example_photographs(), strict=True):
            image.save(folder / f"{name}.png")
        (folder / "bad.png").write_text("no picture")
        users = [User(url, crowd, number, folder, wanted) for number in range(crowd.users)]
        # Warm up, so that only growth is measured.
        for _ in range(12):
            tally.counts[users[0].act()] += 1
        tally.before, began = memory(process.pid), time.monotonic()

        def use(user: User) -> None:
            while True:
                asked = time.perf_counter()
                try:
                    found = user.act()
                except Exception as error:
                    # Count any exception as an outcome.
                    found = f"WRONG: {type(error).__name__}: {str(error)[:200]}"
                with lock:
                    tally.counts[found] += 1
                    tally.times.append(time.perf_counter() - asked)
                    everything = all(tally.counts[kind] for kind in RIGHT) and any(one.place for one in users)
                if time.monotonic() > began + (crowd.seconds if everything else max(crowd.seconds, LONGEST)):
                    return

        threads = [threading.Thread(target=use, args=(user,)) for user in users]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.2)
            tally.peak = max(tally.peak, memory(process.pid))
            if time.monotonic() - began > crowd.seconds / 4 * (len(tally.course) + 1):
                tally.course.append(memory(process.pid))
        for user in users:
            user.close()
        tally.places = max(user.place for user in users)
        tally.after, tally.alive = memory(process.pid), process.poll() is None
        tally.said = errors.read_text()
    return tally


def report(tally: Tally) -> None:
    """Print the outcomes of a crowd's requests."""
    for name, count in tally.counts.most_common():
        print(f"{count:6d} {name}")
    ordered = sorted(tally.times)
    print(f"median {statistics.median(ordered):.2f} s, 95 % within {ordered[int(0.95 * len(ordered))]:.2f} s")
    print(f"longest reported queue: {tally.places}")
    print(f"MiB of the server: {tally.before >> 20} before, {tally.peak >> 20} at most, {tally.after >> 20} at the end")
    print(f"MiB after each quarter: {[size >> 20 for size in tally.course]}; alive: {tally.alive}")
    if tally.said:
        print(f"error output: {tally.said}")


def expected_maps(crowd: Crowd) -> dict[Any, Any]:
    """Compute the expected map of each image and quantile with the library."""
    classifier, wanted = pg.load_model(crowd.network), {}
    for name, image in zip(EXAMPLES, example_photographs(), strict=True):
        inputs = classifier.preprocess(image).unsqueeze(0)
        layers = parse_layers(crowd.layers)
        for quantile in QUANTILES:
            explainer = pg.Explainer(classifier.model, pg.Evidence(quantile=quantile), layers=layers)
            heat = pg.heatmap(explainer.attribute(inputs))[0]
            wanted[name, quantile] = tinted([heat], signed=False)[0]
    return wanted


@contextlib.contextmanager
def served(
    network: str, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[str], Path]]:
    """Run the command; yield its URL, its process, and the file of its error output."""
    command = [sys.executable, "-m", "parchgrad", "explore", "--port", "0", "--no-browser", "--model", network]
    command += ["--max-megabytes", str(MEGABYTES)]
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder, "errors.txt")
        with (
            errors.open("w") as stream,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stream, text=True, env=os.environ | dict(environment or {})
            ) as process,
        ):
            try:
                assert process.stdout is not None
                found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
                assert found is not None, f"The explorer did not start: {errors.read_text()}"
                yield found[0], process, errors
            finally:
                process.send_signal(signal.SIGINT)


def memory(process: int) -> int:
    """Return the resident memory in bytes; 0 if the system does not report it."""
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
        report(observe(Crowd(users=asked.users, seconds=asked.seconds)))
    else:
        answers(asked.rounds)
