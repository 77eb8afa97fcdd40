import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import parchgrad as pg
from parchgrad.data.shapes import GENERATOR_VERSION, SHAPE_CATEGORIES, GeneratedShapes
from parchgrad.errors import ModelError
from parchgrad.evaluation.runs import evaluate
from parchgrad.evaluation.settings import Setting
from parchgrad.explain.scores import BoxScore, RegionScore
from parchgrad.models.dense_networks import DENSE_NETWORKS, ShapesDetector, ShapesSegmenter


@pytest.fixture(scope="module", params=[0, 1])
def fresh(request):
    """Images of seed 5, which no network was trained on, without or with a rival; and the data set."""
    shapes = GeneratedShapes(count=100, seed=5, rivals=request.param)
    return torch.stack([sample.image for sample in shapes]), shapes


def overlap(first, second):
    """Intersection over union of two boxes."""
    low, high = torch.maximum(first[:2], second[:2]), torch.minimum(first[2:], second[2:])
    common = (high - low).clamp(min=0).prod()
    return common / ((first[2:] - first[:2]).prod() + (second[2:] - second[:2]).prod() - common)


@pytest.mark.parametrize("name", DENSE_NETWORKS)
def test_the_weights_are_small_and_of_the_present_generator(name):
    path = Path(pg.__file__).parent / "weights" / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["generator_version"] == str(GENERATOR_VERSION)
    assert json.loads(metadata["categories"]) == list(SHAPE_CATEGORIES)
    assert path.stat().st_size < 1e6
    # Reports use the seeds 0 to 12 and 300 to 311.
    assert json.loads(metadata["training"])["seed"] == 21


@pytest.mark.parametrize(("name", "kind"), [("shapes_segmenter", ShapesSegmenter), ("shapes_detector", ShapesDetector)])
def test_the_networks_are_loaded_like_classifiers_but_do_not_classify(name, kind, tmp_path):
    loaded, random = pg.load_model(name), pg.load_model(name, pretrained=False)
    assert isinstance(loaded.model, kind)
    assert not any(module.training for module in loaded.model.modules())
    assert {tensor.dtype for tensor in loaded.model.parameters()} == {torch.float32}
    first, other = (next(each.model.parameters()) for each in (loaded, random))
    assert not torch.equal(first, other)
    assert loaded.preprocess.mean == pg.load_model("shapes").preprocess.mean
    with pytest.raises(ModelError, match=r"logits of shape \(B, K\) are needed"):
        loaded.predict(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ModelError, match=r"logits of shape \(B, K\) are needed"):
        evaluate(loaded.model, GeneratedShapes(count=2, seed=5), [Setting()], tmp_path / "run")


def test_the_segmenter_names_all_its_scores():
    loaded = pg.load_model("shapes_segmenter")
    with torch.no_grad():
        scores = loaded.model(torch.zeros(1, 3, 64, 64))
    assert scores.shape[1] == len(loaded.categories)
    assert loaded.categories == (*SHAPE_CATEGORIES, "background")
    assert loaded.find_category("background") == scores.argmax(dim=1).mode().values.mode().values.item()


def test_the_networks_take_larger_images():
    images = torch.zeros(2, 3, 96, 72)
    assert ShapesSegmenter(5).eval()(images).shape == (2, 6, 96, 72)
    assert ShapesSegmenter(5).eval()(torch.zeros(1, 3, 67, 70)).shape == (1, 6, 67, 70)
    found = ShapesDetector(5).eval()(images)
    assert (found.boxes.shape, found.logits.shape) == ((2, 108, 4), (2, 108, 5))


def test_boxes_start_from_their_position_in_the_grid():
    network = ShapesDetector(5).eval()
    torch.nn.init.zeros_(network.box_head[2].weight)
    network.box_head[2].bias.data = torch.tensor([0.25, -0.5, 0.0, torch.log(torch.tensor(2.0)).item()])
    boxes = network(torch.randn(1, 3, 64, 80)).boxes[0].reshape(8, 10, 4)
    # Row 3 and column 5 have their centre at (44, 28); half of the sides are 8 and 16 pixels.
    torch.testing.assert_close(boxes[3, 5], torch.tensor([46.0 - 8, 24.0 - 16, 46.0 + 8, 24.0 + 16]))


def test_the_segmenter_segments_shapes_that_it_has_not_seen(fresh):
    images, shapes = fresh
    with torch.no_grad():
        guess = pg.load_model("shapes_segmenter").model(images).argmax(dim=1)
    common, either = torch.zeros(10), torch.zeros(10)
    for index in range(len(shapes)):
        truth = dict(zip(shapes.classes(index), shapes.masks(index), strict=True))
        for label in range(10):
            own = truth.get(label, torch.zeros(64, 64, dtype=torch.bool))
            common[label] += (own & (guess[index] == label)).sum()
            either[label] += (own | (guess[index] == label)).sum()
    assert (common / either).mean() > 0.6


def test_the_detector_finds_shapes_that_it_has_not_seen(fresh):
    images, shapes = fresh
    with torch.no_grad():
        boxes, logits = pg.load_model("shapes_detector").model(images)
    found = []
    for index, sample in enumerate(shapes):
        best = logits[index, :, sample.label].argmax()
        is_right = logits[index, best].argmax() == sample.label and logits[index, best, sample.label] > 0
        found.append(bool(is_right and overlap(boxes[index, best], sample.boxes[0]) >= 0.5))
    assert sum(found) / len(found) > 0.75


def test_their_outputs_can_be_explained():
    sample = GeneratedShapes(count=1, seed=5, rivals=1)[0]
    image = sample.image[None]
    region = pg.Explainer(pg.load_model("shapes_segmenter").model).attribute(image, RegionScore(target=sample.label))
    score = BoxScore(
        box=sample.boxes[0], label=sample.label, detections=lambda found: (found.boxes, found.logits.sigmoid())
    )
    box = pg.Explainer(pg.load_model("shapes_detector").model).attribute(image, score)
    for attribution in (region, box):
        heat = pg.heatmap(attribution)[0]
        # An uninformative map has a tenth of this mass or less.
        assert heat[sample.mask].sum() / heat.sum() > 0.2
