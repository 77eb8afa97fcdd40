"""Explaining one detection of a detector with random weights."""

import pytest
import torch
from PIL import Image
from skimage import data
from torchvision.transforms.functional import to_tensor

import parchgrad as pg
from parchgrad.errors import InputError, ModelError, SettingError, TargetError
from parchgrad.models.detector import Detector, load_detector
from parchgrad.workflows.detection import explain_box


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return load_detector("ssdlite320_mobilenet_v3_large", pretrained=False)


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(data.chelsea()).resize((150, 100))


def test_the_map_is_that_of_the_box(detector, image, tmp_path):
    pixels = to_tensor(image)
    found = next(each for each in detector.detect(pixels) if each.box[2] - each.box[0] > 20)
    edit = pg.Edit(selector=pg.GradientEnergy(), balance=False)
    explanation = explain_box(detector, image, edit, box=found.box, label=found.index, name="cat")
    score = pg.BoxScore(box=found.box, label=found.index)
    expected = pg.Explainer.from_edit(detector.model, edit).attribute(pixels[None], score)[0]
    plain = pg.Explainer(detector.model, None).attribute(pixels[None], score)[0]
    for one, other in ((explanation.attribution, expected), (explanation.plain, plain)):
        scale = other.abs().max()
        assert scale > 0
        torch.testing.assert_close(one / scale, other / scale)
    near = [each for each in detector.detect(pixels) if each.index == found.index and each.overlap(found.box) >= 0.5]
    assert explanation.target.probability == pytest.approx(max(each.score for each in near))
    assert explanation.manifest()["settings"]["detections"] == len(near)
    left, top, right, bottom = found.box
    (patch,) = explanation.figure().axes[0].patches
    # The centre of the first pixel is at 0.
    assert patch.get_xy() == (left - 0.5, top - 0.5)
    assert (patch.get_width(), patch.get_height()) == (right - left, bottom - top)
    explanation.save(tmp_path, "cat")
    assert explanation.manifest()["settings"]["box"] == list(found.box)


def test_a_box_without_a_detection_lists_what_there_is(detector, image):
    found = detector.detect(to_tensor(image))[0]
    with pytest.raises(TargetError, match=f"No {found.category} is detected at 0,0,2,2.*{found.category}"):
        explain_box(detector, image, box=(0, 0, 2, 2), label=found.index)
    with pytest.raises(SettingError, match="needs one"):
        explain_box(detector, image, pg.Edit(selector=None), box=found.box, label=found.index)


def test_images_of_a_detector(detector, image):
    assert detector.detect(image) == detector.detect(to_tensor(image))
    pixels = to_tensor(image)
    for wrong in (pixels[None], 255 * pixels, (255 * pixels).byte()):
        with pytest.raises(InputError, match=r"values in \[0, 1\] is needed"):
            detector.detect(wrong)
    with pytest.raises(InputError, match="`image` is of type list"):
        detector.detect([pixels])


def test_names_of_detectors_and_classes(detector):
    assert isinstance(detector, Detector)
    assert detector.categories[detector.find_category("Traffic light")] == "traffic light"
    with pytest.raises(ModelError, match=r"no detector 'fasterrcnn'.*fasterrcnn_resnet50_fpn"):
        load_detector("fasterrcnn")
    with pytest.raises(ModelError, match="no detector 'resnet18'"):
        load_detector("resnet18")
