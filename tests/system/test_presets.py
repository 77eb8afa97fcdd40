"""The published grid in one command, from a made-up ImageNet folder to a report."""

import csv
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from parchgrad.evaluation.rows import read_rows
from parchgrad.models.own_networks import load_network
from tests import reference
from tests.data.test_imagenet import annotation
from tests.support import cli

SYNSETS = ("n01", "n02", "n03")
SIZE, CONVOLUTIONS = 12, (0, 2, 4, 6)
NETWORK = """
    import torch
    from torch import nn
    from torchvision.transforms import Compose, Normalize, ToTensor

    import parchgrad as pg
    from parchgrad.data.preprocessing import Preprocessing

    def make():
        torch.manual_seed(3)
        layers = []
        for inputs in (3, 24, 24, 24):
            layers += [nn.Conv2d(inputs, 24, 3, padding=1), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 3)).eval()
        # Makes the probabilities depend on the images.
        model[-1].weight.data *= 300
        model[-1].bias.data.zero_()
        transform = Compose([ToTensor(), Normalize((0.2,) * 3, (0.2,) * 3)])
        transform = Preprocessing(transform, (0.2,) * 3, (0.2,) * 3)
        return pg.Classifier(model, transform, ("ray", "hen", "crane"), "small", ("n01", "n02", "n03"))
"""


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """Make folders of training and validation images, boxes, and a file with a network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network.py").write_text(textwrap.dedent(NETWORK))
    (tmp_path / "boxes").mkdir()
    noise = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 2)):
        for label, synset in enumerate(SYNSETS):
            (tmp_path / part / synset).mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(0, 90, (SIZE, SIZE, 3))
                left, top, right, bottom = 2 + label, 3, 6 + label + number % 3, 9
                # Skewed brightness, so that responses are far from normal.
                pixels[top:bottom, left:right, label] += int(160 * noise.random() ** 3)
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / part / synset / f"{part}_{label}{number}.png")
                box = (synset, left + 1, top + 1, right, bottom)
                if part == "val":
                    (tmp_path / "boxes" / f"val_{label}{number}.xml").write_text(
                        annotation(f"val_{label}{number}", (SIZE, SIZE), box)
                    )
    return tmp_path


def images_of(folder):
    """Read the images (N, 3, H, W) and labels (N,) of class folders."""
    files = sorted(folder.rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files]) / np.float32(255)
    labels = torch.tensor([SYNSETS.index(file.parent.name) for file in files])
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2) - 0.2) / 0.2, labels, [file.stem for file in files]


def outputs_of(model, images):
    """Run the network layer by layer, and return the input of every layer and the logits."""
    found = [images]
    for layer in model:
        found.append(layer(found[-1]))
    return found


def published_masks(model, train, labels, image, label, quantile, kind):
    """Channels that the paper keeps in every convolution, from the images themselves."""
    masks = {}
    everything, own = outputs_of(model, train), outputs_of(model, image)
    for place in CONVOLUTIONS:
        gaps = everything[place + 1].relu().mean(dim=(2, 3)).detach().double().numpy()
        gap = own[place + 1].relu().mean(dim=(2, 3)).detach().double().numpy()[0]
        scores, allowed = [], []
        for channel, values in enumerate(gaps.T):
            # A constant or normally distributed channel takes its rank, but is never kept.
            constant = np.ptp(values) == 0
            allowed.append(not constant and stats.shapiro(values).pvalue < 0.05)
            if constant:
                scores.append(-np.inf)
            elif kind == "class":
                rest = values[labels.numpy() != label]
                test = stats.ttest_ind(values[labels.numpy() == label], rest, equal_var=False, alternative="greater")
                scores.append(-test.pvalue)
            else:
                scores.append((gap[channel] - values.mean()) / values.std(ddof=1))
        threshold = reference.kth_largest(scores, quantile)
        masks[place] = [float(fits and score >= threshold) for score, fits in zip(scores, allowed, strict=True)]
    return masks


def edited_gradient(model, image, label, masks, conserve):
    """Walk back through the network layer by layer, and edit the gradient at the given convolutions."""
    values = [value.detach() for value in outputs_of(model, image)]
    gradient = torch.zeros_like(values[-1])
    gradient[0, label] = 1
    for place in reversed(range(len(model))):
        if place in masks and any(masks[place]):
            edited = reference.edit(gradient.double().numpy(), [masks[place]], conserve=conserve)
            gradient = torch.from_numpy(edited).float()
        leaf = values[place].requires_grad_()
        (gradient,) = torch.autograd.grad(model[place](leaf), leaf, gradient)
    return gradient


def test_the_published_grid_is_one_command_and_its_cells_are_the_papers(imagenet, capsys):
    options = ["--model", "network.py:make", "--out", "runs"]
    evaluate = ["evaluate", "--preset", "paper", "--data", "val", "--boxes", "boxes", "--count", "6", *options]
    code, _, said = cli(capsys, *evaluate)
    assert code == 2
    assert "stats collect" in said
    assert "--statistics" in said
    assert cli(capsys, "stats", "collect", "--data", "train", *options[:2], "-o", "held.safetensors")[0] == 0
    code, printed, said = cli(capsys, *evaluate, "--statistics", "held.safetensors")
    assert code == 0, said
    run = imagenet / "runs" / "small"
    assert {file.name for file in run.glob("report.*")} == {"report.html", "report.md", "report.csv"}
    assert str(run.relative_to(imagenet) / "report.html") in printed.replace("\n", "")

    rows = [row for row in read_rows(run) if row["selector"] in ("class", "instance")]
    cells = {(row["method"], row["selector"], row["quantile"], row["layers"], row["conserve"]) for row in rows}
    assert len(cells) == 4 * 2 * 2 * 4 * 2
    assert {(row["softness"], row["gates"], row["antialias"], row["balance"]) for row in rows} == {
        (0.0, 0.0, False, False)
    }

    model = load_network("network.py:make").model
    train, labels, _ = images_of(imagenet / "train")
    images, targets, names = images_of(imagenet / "val")
    table = list(csv.DictReader((run / "report.csv").read_text().splitlines()))
    # The last int(r * 4) of the four convolutions.
    for method, kind, quantile, layers, conserve, edited in (
        ("gradient", "class", 0.1, 0.5, "independent", CONVOLUTIONS[2:]),
        ("input_x_gradient", "instance", 0.05, 0.9, "none", CONVOLUTIONS[1:]),
    ):
        own = [row for row in rows if (method, kind, quantile, layers, conserve) == (
            row["method"], row["selector"], row["quantile"], row["layers"], row["conserve"]
        )]  # fmt: skip
        assert len(own) == len(images) == 6
        masses, drops = [], []
        for image, label, name in zip(images.split(1), targets.tolist(), names, strict=True):
            masks = published_masks(model, train, labels, image, label, quantile, kind)
            gradient = edited_gradient(model, image, label, {place: masks[place] for place in edited}, conserve)
            heat = (gradient * image if method == "input_x_gradient" else gradient)[0].abs().mean(0).double()
            number = int(name[-1])
            inside = heat[3:9, 2 + label : 6 + label + number % 3].sum() / heat.sum()
            masses.append(inside.item())
            drops.append(drop(model, image, heat, label))
        for score, slow in (("mass_inside", masses), ("aopc_morf", drops)):
            assert [row[score] for row in own] == pytest.approx(slow, rel=1e-3, abs=1e-6)
            (cell,) = [line for line in table if (line["setting"], line["score"]) == (own[0]["setting"], score)]
            assert float(cell["mean"]) == pytest.approx(np.mean(slow), rel=1e-3, abs=1e-6)
            assert float(cell["low"]) <= float(cell["difference"]) <= float(cell["high"])


def drop(model, image, heat, label):
    """Mean drop of the probability when the most relevant .1 to .5 of the pixels become zero."""
    order = heat.flatten().argsort(descending=True)
    before = model(image).softmax(1)[0, label].item()
    drops = []
    for ratio in (0.1, 0.2, 0.3, 0.4, 0.5):
        erased = image.clone().flatten(2)
        erased[:, :, order[: round(ratio * len(order))]] = 0
        drops.append(before - model(erased.reshape(image.shape)).softmax(1)[0, label].item())
    return np.mean(drops)
