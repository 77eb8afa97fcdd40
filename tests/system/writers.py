"""Writers of every kind of result, for tests that disturb them."""

import numpy as np
import torch
from PIL import Image

import parchgrad as pg
from parchgrad.evaluation.examples import Choice, Example, Examples
from parchgrad.statistics.checkpoint import write_checkpoint
from parchgrad.visual import save_figure
from parchgrad.visual.animation import save_animation
from parchgrad.visual.sweeps import quantile_sweep
from parchgrad.workflows.photographs import explain_images
from parchgrad.workflows.report_page import make_report
from tests.support import Noise, random_statistics, run

WRITERS = ("statistics", "checkpoint", "examples", "figure", "animation", "explanation", "report")


def make_writers(place):
    """Make functions that write results into a folder, with the names of their files."""
    """Functions that write results into a folder, with the names of their files."""
    image, shapes = Image.new("RGB", (64, 64), "grey"), pg.load_model("shapes")
    edit = pg.Edit(selector=pg.GradientEnergy(quantile=0.5))
    (explanation,) = explain_images(shapes, [image], edit, target=1)
    sweeps = {"ParchGrad": quantile_sweep(shapes, image, edit, quantiles=(0.5, 0.1))}
    run(place, data=Noise(3))
    report = make_report([place])
    example = Example(index=0, image="a", label=0, target=0, predicted=0, values=(0.5,), gain=0.5)
    choice = Choice(score="aopc", leading="a", settings=("a",), best=(example,), worst=())
    arrays = np.zeros((4, 5, 3), np.uint8), np.zeros((1, 4, 5), np.uint8)
    examples = Examples(choice=choice, categories={0: "a"}, pictures=arrays[:1], maps=arrays[1:])
    statistics = random_statistics({"conv": 4})
    return {
        "statistics": (lambda folder: statistics.save(folder / "a.safetensors"), ["a.safetensors"]),
        "checkpoint": (
            lambda folder: write_checkpoint(folder / "a.checkpoint", {}, {"a": torch.ones(999)}),
            ["a.checkpoint"],
        ),
        "examples": (lambda folder: examples.save(folder / "a.safetensors"), ["a.safetensors"]),
        "figure": (lambda folder: save_figure(explanation.figure(), folder / "a.png"), ["a.png"]),
        "animation": (lambda folder: save_animation(sweeps, folder / "a.gif"), ["a.gif"]),
        "explanation": (lambda folder: explanation.save(folder, "a", force=True), ["a.png", "a.npy", "a.json"]),
        "report": (
            lambda folder: report.save(folder, force=True),
            ["report.html", "report.md", "report.csv"],
        ),
    }
