"""What `pip install parchgrad` brings is enough to explain one's own network; the rest names its extra."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import parchgrad as pg

OF_EXTRAS = "torchvision timm huggingface_hub skimage defusedxml jinja2 tomli typer rich gradio"


def without(packages, code):
    """Run code in a process in which packages seem not to be installed."""
    script = f"""
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages.split()}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
{textwrap.dedent(code)}"""
    environment = {"PYTHONPATH": str(Path(pg.__file__).parents[1]), "PYTHONWARNINGS": "error"}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def test_a_core_installation_explains_a_network_of_ones_own():
    ended = without(
        OF_EXTRAS,
        """
        import torch
        from PIL import Image
        from torch import nn
        import parchgrad as pg
        from parchgrad import visual
        from parchgrad.data.preprocessing import Preprocessing

        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 2)).eval()
        x = torch.rand(2, 3, 8, 8)
        heat = pg.heatmap(pg.Explainer(model).attribute(x, 0))
        visual.overlay(torch.rand(8, 8, 3).numpy(), heat[0])
        images = [(image, index % 2) for index, image in enumerate(torch.rand(8, 3, 8, 8))]
        statistics = pg.collect_statistics(model, images)
        pg.Explainer(model, pg.ClassWise(statistics, quantile=0.5)).attribute(x, 1)

        def transform(image):
            return torch.full((3, 8, 8), 0.5) + torch.arange(8) / 16

        own = pg.Classifier(model, Preprocessing(transform, (0.5,) * 3, (0.5,) * 3), ("cat", "dog"), "own")
        (found,) = pg.explain_images(own, [Image.new("RGB", (8, 8), "red")])
        print(found.target.category, sorted(found.manifest()["versions"]))
        """,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(("cat", "dog"))


@pytest.mark.parametrize(
    ("package", "module", "extra"),
    [
        ("timm", "parchgrad.models.loading", "models"),
        ("skimage", "parchgrad.evaluation.runs", "evaluation"),
        ("gradio", "parchgrad.explorer.page", "web"),
    ],
)
def test_a_missing_extra_is_named(package, module, extra):
    code = f"""
        from parchgrad.errors import MissingExtraError
        try:
            import {module}
        except MissingExtraError as error:
            print(error)
    """
    ended = without(package, code)
    assert ended.returncode == 0, ended.stderr
    assert package in ended.stdout
    assert f"parchgrad[{extra}]" in ended.stdout


def test_the_command_line_without_its_extra_is_one_line():
    ended = without("typer", "from parchgrad.__main__ import main\nmain()")
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "parchgrad[cli]" in ended.stderr
