"""The leaderboard in miniature: what it writes says what its rows say."""

import csv
import json
import math

import pytest
import torch
from benchmarks import leaderboard, leaderboard_page
from benchmarks.neighbours import feature_layers, neighbours
from torch import nn

import parchgrad as pg
from parchgrad.errors import ModelError
from parchgrad.evaluation.leaderboard import DEFAULT, leaderboard_methods
from parchgrad.evaluation.rows import read_rows
from parchgrad.evaluation.summary import compare, valid_mean
from tests.support import SHARED

FEW = ("gradient", "random map", "SmoothGrad-25", DEFAULT, f"{DEFAULT} in SmoothGrad-8")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run of few methods on few shapes, and its page."""
    runs, out = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            leaderboard,
            "leaderboard_methods",
            lambda model, **options: {title: leaderboard_methods(model, **options)[title] for title in FEW},
        )
        patch.setattr(leaderboard, "neighbours", lambda image: {"absent": neighbours(image)["LRP, epsilon-plus"]})
        patch.setattr(leaderboard, "ROUNDS", 1)
        networks, missing = leaderboard.make_networks(runs / "nowhere", ["shapes_convnext", "cifar10"], 0.02)
        leaderboard.work(networks, runs, ())
        (network,) = networks
        cost = {}
        for task, measure in leaderboard.MEASUREMENTS.items():
            found = measure(network, runs, ())
            (runs / network.name / f"{task}.json").write_text(json.dumps(found))
            cost |= found
        leaderboard_page.write_page(networks, missing, runs, out)
    return runs / network.name, out, cost


def test_the_table_says_what_the_rows_say(written):
    runs, out, cost = written
    with (out / "leaderboard.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["method"] for line in lines} == set(FEW)
    for part, column, name in (
        ("images", "SRG blur", "srg_blur"),
        ("rivals", "mass beside a rival", "weighted_mass_inside"),
        ("grid-3", "grid 3 x 3", "mass_inside"),
        ("steady", "max-sensitivity", "max_sensitivity"),
    ):
        rows = read_rows(runs / part)
        scores, default = ([row[name] for row in rows if row["setting"] == title] for title in ("gradient", DEFAULT))
        (line,) = [line for line in lines if (line["column"], line["method"]) == (column, "gradient")]
        assert float(line["mean"]) == pytest.approx(valid_mean(scores).value)
        assert float(line["low"]) == pytest.approx(compare(scores, default).low)
        # Too few images for any verdict.
        assert (line["p_holm"], line["verdict"]) == ("", "open")
        assert float(line["time"]) == pytest.approx(cost["time"]["gradient"]) == 1
    # Each mosaic is explained once, for the cells in turn.
    assert [row["image"].split(", ")[:2] for row in read_rows(runs / "grid-3")[:2]] == [
        ["mosaic 1", "cell 1"],
        ["mosaic 2", "cell 2"],
    ]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the sample photographs in ../shared")
def test_a_mosaic_is_explained_for_the_class_of_its_cell():
    networks, missing = leaderboard.make_networks(SHARED, ["cifar10", "efficientnet_lite0"], 0.02)
    assert not missing
    mosaics = [part for network in networks for part in network.parts if part.name.startswith("grid")]
    assert [part.target for part in mosaics] == ["label"] * 4


def test_the_page_names_every_method_and_what_is_left_out(written):
    _, out, _ = written
    text = (out / "index.md").read_text()
    for title in FEW:
        assert f"| {title} |" in text.replace("**", "")
    assert "Left out: absent (" in text
    assert "`cifar10` is left out" in text
    assert "nan" not in text
    assert {path.name for path in out.iterdir()} == {"index.md", "leaderboard.csv", "quality-and-cost.png"}


def test_the_feature_layers_end_the_stages():
    image = torch.zeros(1, 3, 64, 64)
    assert feature_layers(pg.load_model("shapes").model, image) == ["features.3", "features.5", "features"]
    assert feature_layers(pg.load_model("efficientnet_lite0").model, torch.zeros(1, 3, 224, 224)) == [
        *("blocks.0", "blocks.1", "blocks.2", "blocks.4"),
        "bn2",
    ]
    with pytest.raises(ModelError, match="feature maps"):
        feature_layers(pg.load_model("shapes_vit").model, image)


def test_a_method_of_a_file_takes_part_under_the_name_of_its_function(tmp_path):
    (tmp_path / "mine.py").write_text("def dark(model):\n    return lambda images, target: 1 - images.mean(1)\n")
    make = leaderboard.own_method(f"{tmp_path / 'mine.py'}:dark")
    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(make(None)(images, None), 1 - images.mean(1))


@pytest.fixture
def small():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).eval()


def test_hirescam_is_that_of_its_definition(small):
    pytest.importorskip("pytorch_grad_cam")
    images, target = torch.rand(2, 3, 8, 8), torch.tensor([2, 0])
    features = small[0](images).detach().requires_grad_()
    small[1:](features).gather(1, target.unsqueeze(1)).sum().backward()
    coarse = (features.grad * features).sum(1, keepdim=True).relu()
    fine = nn.functional.interpolate(coarse, (8, 8), mode="bilinear").squeeze(1).detach()
    found = neighbours(images[:1])["HiResCAM"](small)(images, target)
    # grad-cam subtracts the minimum, and resizes with OpenCV.
    correlation = torch.corrcoef(torch.stack((found.flatten(), _scaled(fine).flatten())))[0, 1]
    assert correlation > 0.999


def _scaled(maps):
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / maps.amax((1, 2), keepdim=True)


def test_lrp_is_that_of_its_rules(small):
    pytest.importorskip("zennit")
    image, target = torch.rand(1, 3, 8, 8), torch.tensor([1])
    convolution, linear = small[0][0], small[3]
    with torch.no_grad():
        features = small[0](image)
        pooled = features.mean((2, 3))
        # The linear layer by the epsilon rule, pooling in proportion, the convolution by its positive part.
        relevance = pooled * linear.weight[1] / (linear(pooled)[0, 1] + 1e-6 * linear(pooled)[0, 1].sign())
        spread = features / (features.sum((2, 3), keepdim=True) + 1e-6) * relevance[:, :, None, None]
        positive = convolution.weight.clamp(min=0)
        total = nn.functional.conv2d(image, positive) + convolution.bias.clamp(min=0).reshape(1, -1, 1, 1)
        expected = image * nn.functional.conv_transpose2d(spread / (total + 1e-6), positive)
    found = neighbours(image)["LRP, epsilon-plus"](small)(image, target)
    torch.testing.assert_close(found, expected.sum(1).relu(), rtol=1e-3, atol=1e-6)


class NormAct(nn.BatchNorm2d):
    """A batch normalisation with its rectifier inside, as in timm."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, inputs):
        return self.act(super().forward(inputs))


def test_lrp_moves_batch_normalisation_into_the_convolution():
    pytest.importorskip("zennit")
    norm = NormAct(4)
    for values in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        values.uniform_(0.5, 1.5)
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm, *end).eval()
    folded = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *end).eval()
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    folded[0].weight.data = model[0].weight.data * scale[:, None, None, None]
    folded[0].bias.data = norm.bias.data - norm.running_mean * scale
    images, target = torch.rand(2, 3, 8, 8), torch.tensor([2, 0])
    torch.testing.assert_close(model(images), folded(images))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, expected = (neighbours(images[:1])["LRP, epsilon-plus"](each)(images, target) for each in (model, folded))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(dict(model.state_dict()), before)


def test_no_rule_is_made_up_for_layers_without_one():
    pytest.importorskip("zennit")
    with pytest.raises(ModelError, match="LayerNorm"):
        neighbours(torch.zeros(1, 3, 64, 64))["LRP, epsilon-plus"](pg.load_model("shapes_vit").model)


def test_a_map_without_time_has_none():
    assert math.isnan(leaderboard_page._geometric([]))
    assert leaderboard_page._geometric([1.0, 4.0]) == pytest.approx(2)
