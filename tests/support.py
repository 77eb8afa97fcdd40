"""What the tests share: networks, statistics, data sets, runs, a command line, and comparisons."""

import base64
import hashlib
import http.server
import io
import json
import math
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import parchgrad as pg
from parchgrad.cli import main
from parchgrad.core import passes, rules, session
from parchgrad.data.samples import Sample
from parchgrad.evaluation.rows import read_rows
from parchgrad.evaluation.runs import evaluate
from parchgrad.evaluation.scores import ScoreSettings
from parchgrad.evaluation.settings import Setting
from parchgrad.explorer.views import tinted
from parchgrad.statistics import ChannelStatistics, LayerStatistics, RankedLayerStatistics

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_links = pytest.mark.skipif(os.name == "nt", reason="Windows lets only administrators make symbolic links.")

# Networks and statistics


def small_network(channels=6, classes=5, dtype=torch.float64):
    """Make a classifier of 8 x 8 images with fixed weights and in-place operations behind its convolutions."""
    torch.manual_seed(1)
    return (
        nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * channels, classes),
        )
        .to(dtype)
        .eval()
    )


def random_statistics(channels_of, classes=5, seed=0, images=40):
    """Make statistics of the given layers from random samples, with every channel far from normal."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, channels in channels_of.items():
        labels = torch.arange(images) % classes
        samples = torch.rand(images, channels, generator=generator, dtype=torch.float64)
        groups = [samples[labels == label] for label in range(classes)]
        layers[name] = LayerStatistics(
            count=torch.tensor(images),
            mean=samples.mean(0),
            std=samples.std(0),
            class_count=torch.tensor([len(group) for group in groups]),
            class_mean=torch.stack([group.mean(0) for group in groups], dim=1),
            class_variance=torch.stack([group.var(0) if len(group) > 1 else group[0] * 0 for group in groups], dim=1),
            shapiro_p=torch.full((channels,), 0.01),
        )
    return ChannelStatistics(layers)


def all_selectors():
    """Make one selector of each kind for `small_network`."""
    statistics = random_statistics({"0": 6, "2": 6})
    return [
        pg.GradientEnergy(quantile=0.3),
        pg.GradientTimesActivation(quantile=0.3),
        pg.Evidence(quantile=0.3),
        pg.RandomChannels(quantile=0.3),
        pg.FixedChannels({name: torch.arange(6) % 2 == 0 for name in ("0", "2")}),
        pg.ClassWise(statistics, quantile=0.3),
        pg.InstanceWise(statistics, quantile=0.3),
    ]


def input_gradient(model, x, target=0):
    """Compute the gradient of a class's logits, summed over the rows, at the input."""
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(model(x)[:, target].sum(), x)[0]


def strided_network(dtype=torch.float64):
    """Strided convolutions and pooling, groups, and rectifiers of three kinds in place; for pictures of 17 x 15."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, stride=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU6(inplace=True),
        nn.Conv2d(8, 8, (3, 2), stride=(1, 2), groups=2),
        nn.LeakyReLU(0.1, inplace=True),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    # So that some of ReLU6 is beyond its upper kink.
    nn.init.uniform_(model[4].weight, 4, 8)
    return model.to(dtype).eval().requires_grad_(False)


class Raises(nn.Module):
    """Fails in the forward pass."""

    def forward(self, x):
        raise ZeroDivisionError


def hooks(model):
    """Count the hooks on all modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    kinds += ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def nothing_is_left(model):
    """Whether a model has no hooks, and neither rules nor blocks nor passes are active."""
    return (
        hooks(model) == 0
        and torch.overrides._get_current_function_mode_stack() == []
        and not rules.has_active_rules()
        and session.SESSIONS.get() == passes.FORWARDS.get() == ()
    )


# Collections

IMAGES = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
DATA = TensorDataset(IMAGES, torch.arange(60) % 5)
NUMBERS = ("count", "mean", "std", "class_count", "class_square", "class_mean", "class_variance", "shapiro_p")


def collect(path=None, model=None, data=DATA, **options):
    """Collect statistics with a checkpoint after every second batch."""
    return pg.collect_statistics(
        model or small_network(), data, **{"batch_size": 7, "checkpoint_every": 2, "checkpoint": path, **options}
    )


def assert_same(first, second, rtol=1e-12):
    """Compare all numbers of two statistics."""
    assert list(first) == list(second)
    for layer in first:
        for name in NUMBERS:
            torch.testing.assert_close(
                getattr(first[layer], name), getattr(second[layer], name), rtol=rtol, atol=0, equal_nan=True
            )


def header(path):
    """Read the metadata of a safetensors file."""
    size = int.from_bytes(path.read_bytes()[:8], "little")
    return json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]


# Evaluations


class Noise(Dataset):
    """Noise images with a box, a mask, or neither, in turn."""

    categories, fingerprint = tuple("abcde"), "noise"

    def __init__(self, count=7, pause=0.0):
        self.count, self.pause = count, pause

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        time.sleep(self.pause)
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, 8, 8, generator=generator)
        boxes = torch.tensor([[1.0, 2.0, 5.0, 6.0]]) if index % 3 == 0 else None
        mask = torch.rand(8, 8, generator=generator) > 0.5 if index % 3 == 1 else None
        return Sample(image=image, label=index % 5, name=f"noise {index}", boxes=boxes, mask=mask)


SETTINGS = (Setting(), Setting(method="centre_blob"), Setting(selector="energy", quantile=0.34, layers="all"))
SCORES = ScoreSettings(ratios=(0.2, 0.6), tolerance=1)


def run(folder, data=None, settings=SETTINGS, **options):
    """Evaluate `small_network` into a folder, and return the rows there."""
    evaluate(small_network(), data or Noise(), settings, folder, scores=SCORES, batch_size=3, **options)
    return comparable(read_rows(folder))


def comparable(rows):
    """Drop the times, and replace NaN by something that equals itself."""
    return [
        {key: "NaN" if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        for row in ({key: value for key, value in row.items() if key != "seconds"} for row in rows)
    ]


def close(first, second):
    """Compare rows of the same images and settings, up to the rounding that another batch size brings."""
    assert [row.keys() for row in first] == [row.keys() for row in second]
    for one, other in zip(first, second, strict=True):
        for key, value in one.items():
            assert value == (pytest.approx(other[key], rel=1e-9, abs=1e-12) if isinstance(value, float) else other[key])


def order(row):
    """Sort rows by this where several processes wrote them."""
    return row["setting"], row["index"]


# The research code

FOR_CLASSES = ("cls_p_values", "shapiro_p_values")


def write_pickles(folder, model, classes, names=(*FOR_CLASSES, "gap_mean", "gap_std")):
    """Write pickles as the research code does: a list with a tensor per convolution in each file."""
    generator = torch.Generator().manual_seed(5)
    channels = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    lists = {
        "cls_p_values": [torch.rand(count, classes, generator=generator) for count in channels],
        "shapiro_p_values": [torch.rand(count, generator=generator) * 0.08 for count in channels],
        "gap_mean": [torch.rand(count, generator=generator) * 0.1 for count in channels],
        "gap_std": [torch.rand(count, generator=generator) * 0.1 + 0.05 for count in channels],
    }
    folder.mkdir(parents=True)
    for name in names:
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(lists[name], pickle.HIGHEST_PROTOCOL))
    return lists


def write_statistics(path, model, classes):
    """Write random statistics of all convolutions of a model."""
    statistics = random_statistics(
        {name: module.out_channels for name, module in pg.find_convolutions(model).items()}, classes
    )
    statistics.save(path)
    return statistics


def published_choice(name, model):
    """List the convolutions that the research code edits by default."""
    if name == "resnet50":
        blocks = [block for layer in (model.layer3, model.layer4) for block in layer]
        return [convolution for block in blocks for convolution in (block.conv1, block.conv2, block.conv3)]
    if name == "vgg16":
        upper = list(model.features)[len(model.features) // 2 :]
        return [module for module in upper if isinstance(module, nn.Conv2d)]
    first, second = (model.features[stage][0].block[1][0] for stage in (6, 7))
    return [first, second, model.features[8][0]]


# The explorer


def maps_on(page):
    """Read the maps on a page, each (H, W, 4) in [0, 1]."""
    found = re.findall(r'class="pg-map" src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) / 255 for one in found]


def shown_maps(classifier, image, explainer, target=None):
    """Make the maps that the page should show: the plain gradient, and that of the explainer."""
    inputs = classifier.preprocess(image).unsqueeze(0)
    explainers = pg.Explainer(classifier.model, None), explainer
    return tinted([pg.heatmap(each.attribute(inputs, target))[0] for each in explainers], signed=False)


# Commands and processes


def cli(capsys, *arguments):
    """Run a command of the package, and return its exit code, standard output and standard error."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


SURROUNDINGS = {
    "cwd": ROOT,
    "env": {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(pg.__file__).parents[1])]),
    },
}
"""Working directory and environment in which a script can import the package and the tests."""


def python(*arguments, **environment):
    """Run Python in a process of its own, and return what it printed."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=SURROUNDINGS["cwd"],
        env={**SURROUNDINGS["env"], **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def wait_for(condition, seconds=60):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def contents(folder):
    """Read all files below a folder, by their relative paths."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves weights and files as the Hugging Face Hub does; one model is out of order, and others are missing."""

    weights: ClassVar[dict[str, bytes]] = {}
    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.asked.append(f"{self.command} {self.path}")
        name, _, rest = self.path.removeprefix("/timm/").partition(".r160_in1k/resolve/main/")
        content = self.weights.get(name) if rest == "model.safetensors" else self.files.get(self.path)
        known = content is not None
        in_place = any(path.startswith(self.path.partition("/resolve/")[0] + "/") for path in self.files)
        self.send_response(503 if "test_vit." in self.path else 200 if known else 404)
        self.send_header("Content-Length", str(len(content) if known else 0))
        self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
        missing = "EntryNotFound" if in_place else "RepoNotFound"
        self.send_header("X-Repo-Commit" if known else "X-Error-Code", "0" * 40 if known else missing)
        self.end_headers()
        if known and self.command == "GET":
            self.wfile.write(content)

    def do_GET(self):
        self.do_HEAD()

    def log_message(self, *arguments):
        pass


def ranked(log_p, share):
    """Statistics of one layer that rank a share of the channels, from log p of each channel and class."""
    channels = len(log_p)
    layer = RankedLayerStatistics(
        mean=torch.zeros(channels),
        std=torch.ones(channels),
        shapiro_p=torch.zeros(channels),
        log_p=torch.tensor(log_p),
        test="welch",
        share=share,
    )
    return ChannelStatistics({"conv": layer})


# Parameters that are added to what a network computes.
_ADDED = re.compile(
    r"bias$|(cls|dist|reg|class|mask)_token$|pos_embed(ding)?$|wpe\.weight$"
    r"|(class|position|token_type)_embeddings?(\.weight)?$"
)


def contributions(model, inputs, score):
    """Sum of input times gradient, plus that of everything added times its gradient."""
    added = [
        weight
        for name, weight in model.named_parameters()
        if _ADDED.search(name) and not re.search("relative|rel_pos", name)
    ]
    gradients = torch.autograd.grad(score, [inputs, *added], retain_graph=True, allow_unused=True)
    pairs = zip([inputs, *added], gradients, strict=True)
    return sum(float((values * gradient).sum().detach()) for values, gradient in pairs if gradient is not None)


def enlivened(model, seed=0):
    """Add noise to all parameters that start as a constant, so that every branch plays a part."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.min() == parameter.max():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model
