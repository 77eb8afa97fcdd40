"""What is done thousands of times leaves memory as it was, and no tensor, graph, hook or figure alive.

Each part runs in a process of its own, this file as a script, whose memory is its own business alone.
"""

import contextlib
import ctypes
import functools
import gc
import html
import io
import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.support import ROOT

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="Only Linux says in /proc what a process holds."
)
# As in pytest's own settings: old versions of other packages announce what they will do without.
WARNINGS = ["-W", "error", "-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning"]
# Share by which resident memory may grow.
MOST_GROWTH = 0.02


def memory() -> tuple[int, int]:
    """Resident bytes of this process, once what was freed is handed back: its own, and with what files are mapped."""
    gc.collect()
    # Another C library has no such call.
    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    resident, shared = (int(pages) for pages in Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE"), resident * os.sysconf("SC_PAGE_SIZE")


def alive() -> dict[str, int]:
    """How many objects, tensors and tensors with a graph Python knows of."""
    # Old releases of Matplotlib remember the last 4,096 texts that were measured, for figures that are gone.
    measure = getattr(sys.modules.get("matplotlib.text"), "_get_text_metrics_with_cache_impl", None)
    if measure is not None:
        measure.cache_clear()
    gc.collect()
    found = gc.get_objects()
    # By type: isinstance would wake objects that stand for modules which were never imported.
    tensors = [item for item in found if issubclass(type(item), torch.Tensor)]
    graphs = [item for item in tensors if item.grad_fn is not None]
    return {"objects": len(found), "tensors": len(tensors), "graphs": len(graphs)}


def measured(act: Callable[[int], object], times: int, warm: int) -> dict[str, object]:
    """Act so many times, the first of them as a warm-up, and look at what has become more."""
    for turn in range(warm):
        act(turn)
    (before, resident), then = memory(), alive()
    for turn in range(warm, times):
        act(turn)
    now, (after, _) = alive(), memory()
    return {"times": times, "grown": after - before, "resident": resident, "then": then, "now": now}


def explanations() -> dict[str, object]:
    """2,000 explanations by every selector and method, with one failing in nine."""
    import captum.attr

    import parchgrad as pg
    from parchgrad.errors import InputError, TargetError
    from tests.support import Raises, hooks, random_statistics, small_network

    model = small_network(dtype=torch.float32)
    broken = small_network(dtype=torch.float32).append(Raises().eval())
    statistics = random_statistics({"0": 6, "2": 6})
    images = torch.randn(4, 3, 8, 8)
    selectors = [
        None,
        pg.ClassWise(statistics, quantile=0.4),
        pg.InstanceWise(statistics, quantile=0.4),
        pg.GradientEnergy(quantile=0.2),
        pg.GradientTimesActivation(quantile=0.3),
        pg.Evidence(quantile=0.4),
        pg.RandomChannels(quantile=0.5),
        pg.GradientEnergy(quantile=0.2, softness=0),
    ]
    methods = {
        "gradient": {},
        "input_x_gradient": {},
        "integrated_gradients": {"n_steps": 3},
        "smoothgrad": {"samples": 3},
    }
    kept: list[weakref.ref[torch.Tensor]] = []

    def act(turn: int) -> None:
        # Gone without the garbage collector.
        assert not any(reference() is not None for reference in kept)
        kept.clear()
        selector = selectors[turn % len(selectors)]
        method = list(methods)[turn % len(methods)]
        # Made anew, as people do in a loop.
        explainer = pg.Explainer(model, selector, layers="all", method=method, **methods[method])
        fail = turn % 9
        if fail == 6:
            for error, inputs, target in ((TargetError, images, 99), (InputError, images[:, :2], 1)):
                try:
                    explainer.attribute(inputs, target)
                except error:
                    continue
                raise AssertionError(f"no {error}")
        elif fail == 7:
            try:
                pg.Explainer(broken, selector, layers="all").attribute(images, 1)
            except ZeroDivisionError:
                return
            raise AssertionError("no error of the model")
        elif fail == 8 and selector is not None:
            # By hand, with what passes nobody goes back through.
            with pg.ParchGrad(model, selector, layers="all"):
                leaf = images.clone().requires_grad_()
                kept.append(weakref.ref(model(leaf)))
                found = captum.attr.Saliency(model).attribute(leaf, target=turn % 5)
                kept.append(weakref.ref(found))
        else:
            kept.append(weakref.ref(explainer.attribute(images, turn % 5)))

    result = measured(act, 2000, 500)
    assert hooks(model) == hooks(broken) == 0
    return result


def collections() -> dict[str, object]:
    """160 passes over a data set, with given and predicted labels, a file and a failure."""
    import parchgrad as pg
    from parchgrad.errors import ParchGradError
    from tests.support import Noise, small_network

    model, noise = small_network(dtype=torch.float32), Noise(12)
    data = [(noise[index].image, noise[index].label) for index in range(12)]

    def act(turn: int) -> None:
        labels = ("given", "predicted")[turn % 2]
        statistics = pg.collect_statistics(model, data, labels=labels, batch_size=5, seed=turn)
        with tempfile.TemporaryDirectory() as folder:
            statistics.save(Path(folder, "found.safetensors"))
            pg.ChannelStatistics.load(Path(folder, "found.safetensors"), model)["2"].class_log_p()
        try:
            pg.collect_statistics(model, [(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))])
        except (ParchGradError, RuntimeError):
            return
        raise AssertionError("no error")

    return measured(act, 160, 40)


def evaluations() -> dict[str, object]:
    """24 runs of several settings and all scores, each in a folder of its own and read again."""
    from parchgrad.evaluation.rows import read_rows
    from parchgrad.evaluation.runs import evaluate
    from parchgrad.evaluation.scores import FAMILIES, ScoreSettings
    from parchgrad.evaluation.settings import Setting
    from tests.support import Noise, small_network

    model, data = small_network(dtype=torch.float32), Noise(12)
    scores = ScoreSettings(families=FAMILIES, ratios=(0.2, 0.5), steps=3, samples=2, randomised=(0.5,))
    settings = [Setting(), Setting(selector="energy", layers="all"), Setting(method="smoothgrad", selector="evidence")]

    def act(turn: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            chosen = [settings[turn % 3], settings[(turn + 1) % 3]]
            evaluate(model, data, chosen, folder, scores=scores, seed=turn)
            assert len(read_rows(folder)) == 24

    return measured(act, 24, 9)


def explorations() -> dict[str, object]:
    """160 looks at images, with maps, figures, mosaics and errors; what is held is bounded."""
    import matplotlib.pyplot as plt

    from parchgrad.errors import ParchGradError
    from parchgrad.explorer.inputs import EXAMPLES, ImageSource, View
    from parchgrad.explorer.views import Explorer, tinted
    from parchgrad.visual import save_figure

    explorer = Explorer(megabytes=2)
    images = [ImageSource(name) for name in EXAMPLES]

    def act(turn: int) -> None:
        selector = ("energy", "activation", "evidence", "random")[turn % 4]
        # Not one that was looked at before.
        view = View(
            network="shapes",
            selector=selector,
            layers="all",
            quantile=0.05 + turn / 200,
            softness=(0, 0.5)[turn % 2],
            gates=turn % 3,
            signed=turn % 2 > 0,
        )
        found = explorer.explore(images[turn % 4], view)
        if turn % 8 == 0:
            explorer.stability(images[turn % 4], view)
        tinted(found.maps(), signed=view.signed)
        if turn % 16 == 0:
            found = explorer.play(images, view)
        if turn % 30 == 0:
            with tempfile.TemporaryDirectory() as folder:
                save_figure(found.figure(), Path(folder, "figure.png"))
        try:
            explorer.explore(images[0], View(network="shapes", layers="nothing"))
        except ParchGradError:
            return
        raise AssertionError("no error")

    result = measured(act, 160, 60)
    assert plt.get_fignums() == []
    assert explorer._tensors._total <= 2e6
    return result


def pages() -> dict[str, object]:
    """18 times every event of the served page, by two users, with good and bad files, settings and networks."""
    import gradio
    import httpx
    from PIL import Image

    from parchgrad.explorer.inputs import EXAMPLES
    from parchgrad.explorer.server import serve
    from parchgrad.explorer.settings import WebSettings
    from parchgrad.explorer.views import Explorer

    # What is held of maps is bounded in bytes; here so that the bound is reached, for which the page has no setting.
    small = mock.patch("parchgrad.explorer.page.Explorer", functools.partial(Explorer, megabytes=1))
    said = ""
    with small, serve(WebSettings(port=0, network="shapes")) as url, httpx.Client(base_url=url, timeout=120) as web:
        config = web.get("config").json()
        parts = {part["id"]: part for part in config["components"]}
        events = [event for event in config["dependencies"] if event["backend_fn"]]
        picture = io.BytesIO()
        Image.new("RGB", (90, 60), "olive").save(picture, "PNG")
        forms = [("good.png", picture.getvalue()), ("bad.png", b"no picture")]
        paths = [web.post("gradio_api/upload", files={"files": form}).json()[0] for form in forms]
        good, bad = ({"path": path, "meta": {"_type": "gradio.FileData"}} for path in paths)

        def value(part: dict[str, Any], turn: int) -> object:
            chosen = {
                "image": bad if turn % 3 == 0 else good,
                "files": [good] * 4,
                "examples": EXAMPLES[turn % 4],
                "network": "no_such_network" if turn % 5 == 4 else "shapes",
                "selector": "class" if turn % 3 == 1 else "energy",
                "layers": "nothing" if turn % 4 == 3 else "all",
                "quantile": 0.05 + turn / 40,
                "softness": turn / 20,
                "gates": turn % 3,
                "antialias": turn % 2 > 0,
                "balance": turn % 4 > 1,
                "opacity": turn / 20,
                "prune": turn % 2 > 0,
            }
            held = None if part["type"] == "state" else part["props"].get("value")
            return chosen.get(part["props"].get("elem_id"), held)

        def act(turn: int) -> None:
            nonlocal said
            user = {"session_hash": f"user {turn % 2}"}
            for event in events:
                data = [value(parts[number], turn) for number in event["inputs"]]
                asked = {"data": data, "fn_index": event["id"], **user}
                web.post("gradio_api/queue/join", json=asked).raise_for_status()
                with web.stream("GET", "gradio_api/queue/data", params=user) as messages:
                    # To the end: who leaves early is noticed late by older versions of Gradio.
                    (answer,) = [line for line in messages.iter_lines() if "process_completed" in line]
                assert json.loads(answer.removeprefix("data:"))["success"], (event["api_name"], answer)
                said += html.unescape(answer) if turn < 5 else ""

        def components() -> int:
            gc.collect()
            return sum(issubclass(type(item), gradio.components.Component) for item in gc.get_objects())

        then = components()
        result = measured(act, 18, 11)
        # Neither a user nor an event brings one along.
        assert components() == then
    for outcome in (
        "pg-map",
        "matches none",
        "'bad.png' is not a readable image",
        "Neither torchvision nor timm",
        "Saved as",
        "stability",
    ):
        assert outcome in said, outcome
    return result


PARTS = SimpleNamespace(
    explanations=explanations,
    collections=collections,
    evaluations=evaluations,
    explorations=explorations,
    pages=pages,
)


@pytest.mark.parametrize("part", vars(PARTS))
def test_memory_stays_flat_and_nothing_is_left_alive(part):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *WARNINGS, "-m", "tests.system.test_leaks", part]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["now"]["graphs"] == 0
    # One for every turn would be dozens; what the explorer holds is bounded in bytes, not in number.
    assert found["now"]["tensors"] - found["then"]["tensors"] < 10, found
    # Gradio takes notes of the latest events, and has tasks that end later; of a page its components are counted.
    assert part == "pages" or found["now"]["objects"] - found["then"]["objects"] < 10, found
    # Pages of files come and go as the machine needs them.
    assert found["grown"] < MOST_GROWTH * found["resident"], found


def test_what_is_left_alive_would_be_noticed():
    kept = []

    def act(turn):
        leaf = torch.zeros(250_000, requires_grad=True)
        kept.append(leaf.exp())

    found = measured(act, 40, 10)
    assert found["now"]["graphs"] - found["then"]["graphs"] == 30
    assert found["grown"] > 30 * 1_000_000


if __name__ == "__main__":
    print(json.dumps(getattr(PARTS, sys.argv[1])()))
