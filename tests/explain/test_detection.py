"""Scores of boxes: of torchvision's detectors with random weights, and of dense outputs."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import box_area, box_convert, box_iou

import parchgrad as pg
from parchgrad.errors import ModelError, ModelWarning, SettingError, TargetError
from tests import reference
from tests.support import nothing_is_left

SMALL = {"min_size": 64, "max_size": 96}
DETECTORS = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": {**SMALL, "box_score_thresh": 0.0},
    "retinanet_resnet50_fpn": {**SMALL, "score_thresh": 0.0},
    "fcos_resnet50_fpn": {**SMALL, "score_thresh": 0.0},
    "ssdlite320_mobilenet_v3_large": {"score_thresh": 0.0},
}
# One convolution of the backbone.
LAYERS = dict.fromkeys(DETECTORS, "backbone.body.layer3.0.conv2") | {
    "fasterrcnn_mobilenet_v3_large_320_fpn": "backbone.body.9.block.0.0",
    "ssdlite320_mobilenet_v3_large": "backbone.features.0.9.block.0.0",
}
TRUE = {"gates": 0, "antialias": False, "balance": False}


@pytest.fixture(scope="module", params=DETECTORS)
def detector(request):
    torch.manual_seed(0)
    settings = DETECTORS[request.param]
    model = torchvision.models.get_model(
        request.param, weights=None, weights_backbone=None, num_classes=4, **settings
    ).eval()
    return model, LAYERS[request.param]


def pictures():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator) for size in ((64, 80), (90, 72))]


def asked(model, image):
    """The box and label of the detection with the highest score, among those with an area."""
    with torch.no_grad():
        (found,) = model([image])
    best = int((found["scores"] * (box_area(found["boxes"]) > 4)).argmax())
    return found["boxes"][best].tolist(), int(found["labels"][best])


def by_hand(model, image, box, label, iou):
    """The score as torchvision's own functions give it."""
    (found,) = model([image])
    chosen = (box_iou(found["boxes"], torch.tensor([box]))[:, 0] >= iou) & (found["labels"] == label)
    return found["scores"][chosen].sum()


def test_a_box_of_a_detector_is_explained(detector):
    model, layer = detector
    image = pictures()[0].requires_grad_()
    box, label = asked(model, image)
    score = by_hand(model, image, box, label, 0.4)
    (plain,) = torch.autograd.grad(score, image)
    assert plain.any()
    chosen = pg.BoxScore(box=box, label=label, iou=0.4)
    torch.testing.assert_close(chosen(model([image])), score[None])
    found = pg.Explainer(model, None).attribute(image.detach()[None], chosen)
    scale = float(plain.abs().max())
    torch.testing.assert_close(found[0] / scale, plain / scale)

    def edit(gradient):
        values = gradient.double().numpy()
        rows = [np.sqrt((row.reshape(len(row), -1) ** 2).sum(axis=1)).tolist() for row in values]
        weights = [reference.soft_weights(row, reference.kth_largest(row, 0.3), 0.5) for row in rows]
        return torch.from_numpy(reference.edit(values, weights)).to(gradient)

    handle = model.get_submodule(layer).register_forward_hook(lambda _, __, output: output.register_hook(edit) and None)
    (expected,) = torch.autograd.grad(by_hand(model, image, box, label, 0.4), image)
    handle.remove()
    edited = pg.Explainer(model, pg.GradientEnergy(quantile=0.3), layers=[layer], **TRUE)
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(
        edited.attribute(image.detach()[None], chosen)[0] / scale, expected / scale, rtol=1e-3, atol=1e-4
    )
    assert nothing_is_left(model)


def test_images_of_unequal_size_each_have_their_box(detector):
    model, layer = detector
    images = pictures()
    scores = [pg.BoxScore(box=box, label=label) for box, label in (asked(model, image) for image in images)]
    explainer = pg.Explainer(model, pg.GradientEnergy(), layers=[layer], **TRUE)
    found = explainer.attribute(images, scores)
    for image, score, attribution in zip(images, scores, found, strict=True):
        assert attribution.shape == image.shape
        torch.testing.assert_close(attribution, explainer.attribute(image[None], score)[0])
    with pytest.raises(TargetError, match="`target` has 1 entries for 2 images"):
        explainer.attribute(images, scores[:1])


def test_a_box_without_a_detection_says_what_there_is(detector):
    model, _ = detector
    image = pictures()[0]
    _, label = asked(model, image)
    with torch.no_grad():
        best = float(model([image])[0]["scores"].max())
    far = pg.BoxScore(box=(500, 500, 600, 600), label=label)
    with pytest.warns(ModelWarning, match=rf"row 0 is zero everywhere: .*label {label} .* a score of {best:.2f}"):
        assert not pg.Explainer(model, None).attribute(image[None], far).any()


BOXES = torch.tensor([[[0.0, 0.0, 4.0, 4.0], [1.0, 0.0, 5.0, 4.0], [8.0, 8.0, 9.0, 9.0]]]).repeat(2, 1, 1)
SCORES = torch.tensor([[[0.1, 0.6], [0.2, 0.5], [0.3, 0.9]], [[0.4, 0.2], [0.7, 0.1], [0.0, 0.0]]])


@pytest.mark.parametrize(
    ("box", "label", "iou", "expected"),
    [
        # Intersections over unions with the first two boxes are 1 and 12 / 20.
        ((0, 0, 4, 4), 1, 0.5, [1.1, 0.3]),
        ((0, 0, 4, 4), 1, 0.7, [0.6, 0.2]),
        ((0, 0, 4, 4), 0, 0.5, [0.3, 1.1]),
        ((8, 8, 9, 9), 1, 1.0, [0.9, 0.0]),
        ((20, 20, 30, 30), 1, 0.5, [0.0, 0.0]),
    ],
)
def test_values_by_hand(box, label, iou, expected):
    score = pg.BoxScore(box=box, label=label, iou=iou, detections=lambda output: output)
    torch.testing.assert_close(score((BOXES, SCORES)), torch.tensor(expected))
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    rows = [
        {"boxes": boxes.repeat(2, 1), "labels": labels, "scores": scores.T.flatten()}
        for boxes, scores in zip(BOXES, SCORES, strict=True)
    ]
    torch.testing.assert_close(pg.BoxScore(box=box, label=label, iou=iou)(rows), torch.tensor(expected))


class Yolo(nn.Module):
    """Per place, a box as centre and size, and scores of three classes: (B, 7, N)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Conv2d(8, 7, 1))

    def forward(self, x):
        found = self.body(x).flatten(2)
        return torch.cat([16 + found[:, :2], 8 + found[:, 2:4].sigmoid(), found[:, 4:].sigmoid()], dim=1)


def test_a_function_names_the_boxes_of_a_dense_output():
    torch.manual_seed(0)
    model, x = Yolo().eval(), torch.rand(2, 3, 32, 32, requires_grad=True)

    def detections(output):
        return box_convert(output[:, :4].mT, "cxcywh", "xyxy"), output[:, 4:].mT

    score = pg.BoxScore(box=(12, 12, 20, 20), label=2, iou=0.3, detections=detections)
    found = pg.Explainer(model, None).attribute(x.detach(), score)
    output = model(x)
    near = torch.stack([box_iou(row, torch.tensor([[12.0, 12, 20, 20]]))[:, 0] for row in detections(output)[0]]) >= 0.3
    assert near.any()
    (expected,) = torch.autograd.grad(output[:, 6][near].sum(), x)
    torch.testing.assert_close(found, expected)


def test_the_boxes_themselves_carry_no_gradient():
    boxes, scores = BOXES.clone().requires_grad_(), SCORES.clone().requires_grad_()
    found = pg.BoxScore(box=(0, 0, 4, 4), label=1, detections=lambda _: (boxes, scores))(None)
    of_boxes, of_scores = torch.autograd.grad(found.sum(), [boxes, scores], allow_unused=True)
    assert of_boxes is None
    assert torch.equal(of_scores, torch.tensor([[[0.0, 1], [0, 1], [0, 0]]]).repeat(2, 1, 1))


@pytest.mark.parametrize(
    ("error", "options", "output", "words"),
    [
        (SettingError, {"box": (0, 0, 4)}, None, "`box` is .*four numbers"),
        (SettingError, {"box": (4, 0, 0, 4)}, None, "must have an area"),
        (SettingError, {"label": -1}, None, "`label` is -1"),
        (SettingError, {"iou": 0}, None, "`iou` is 0"),
        (ModelError, {}, torch.ones(2, 3), r"returns shape \(2, 3\), but a box needs a list of dictionaries"),
        (ModelError, {"detections": lambda output: output}, BOXES, "`detections` returns shape"),
        (TargetError, {"label": 2, "detections": lambda output: output}, (BOXES, SCORES), "`target` holds 2"),
        (ModelError, {"detections": lambda output: output}, (BOXES, SCORES[:1]), "must agree in their first two"),
        (ModelError, {"detections": lambda output: output}, (BOXES, SCORES.mT), "must agree in their first two"),
        (ModelError, {"detections": lambda output: output}, (BOXES.flip(2), SCORES), "box_convert"),
        (SettingError, {"detections": 3}, None, "`detections` is 3"),
    ],
)
def test_bad_boxes(error, options, output, words):
    with pytest.raises(error, match=words):
        pg.BoxScore(**{"box": (0, 0, 4, 4), "label": 1, **options})(output)
