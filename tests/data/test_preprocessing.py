"""Preprocessing of other libraries, read as it is."""

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from skimage import data
from timm.data import create_transform
from torch import nn
from torchvision import transforms
from torchvision.transforms import v2
from transformers import ViTImageProcessor

import parchgrad as pg
from parchgrad.data.preprocessing import Preprocessing, as_preprocessing
from parchgrad.errors import ModelError, SettingError

MEAN, STD = (0.5, 0.25, 0.125), (0.25, 0.5, 0.75)
KINDS = {
    "torchvision": lambda: torchvision.models.ResNet18_Weights.DEFAULT.transforms(),
    "compose": lambda: transforms.Compose(
        [transforms.Resize((32, 32)), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    ),
    "nested": lambda: transforms.Compose(
        [
            transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()]),
            nn.Sequential(v2.Normalize(MEAN, STD)),
        ]
    ),
    "v2": lambda: v2.Compose(
        [v2.Resize((32, 32)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(MEAN), list(STD))]
    ),
    "timm": lambda: create_transform(input_size=(3, 32, 32), mean=MEAN, std=STD),
    "Hugging Face": lambda: ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=list(MEAN), image_std=list(STD)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_mean_and_deviation_are_read_from_other_libraries(kind):
    transform = KINDS[kind]()
    image = Image.fromarray(data.chelsea())
    found = as_preprocessing(transform)
    expected = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if kind == "torchvision" else (MEAN, STD)
    np.testing.assert_allclose((found.mean, found.std), expected, rtol=1e-6)
    inputs = found(image)
    own = (
        transform(images=image, return_tensors="pt")["pixel_values"][0] if kind == "Hugging Face" else transform(image)
    )
    torch.testing.assert_close(inputs, own)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in expected)
    picture = (own * std + mean).clamp(0, 1).movedim(0, -1)
    np.testing.assert_allclose(found.picture(inputs), picture, atol=1e-5)
    assert as_preprocessing(found) is found


def test_a_classifier_takes_them_and_checks_what_it_gets():
    model = timm.create_model("test_efficientnet", num_classes=3).eval()
    steps = KINDS["compose"]()
    classifier = pg.Classifier(model, steps, ["a", "b", "c"], "mine")
    assert isinstance(classifier.preprocess, Preprocessing)
    assert classifier.categories == ("a", "b", "c")
    image = Image.fromarray(data.chelsea())
    by_name, by_index = (pg.explain_images(classifier, [image], target=target)[0] for target in ("b", 1))
    assert torch.equal(by_name.attribution, by_index.attribution)
    assert by_name.target.category == "b"
    for wrong, words in (
        (transforms.ToTensor(), "cannot be read.*Preprocessing"),
        ("imagenet", "is of type str, but it must turn"),
    ):
        with pytest.raises(SettingError, match=words):
            pg.Classifier(model, wrong, ("a", "b", "c"), "mine")
    with pytest.raises(SettingError, match="`categories` is a string"):
        pg.Classifier(model, steps, "abc", "mine")
    with pytest.raises(ModelError, match="`model` is of type str"):
        pg.Classifier("resnet18", steps, ("a",), "mine")


def test_an_explanation_is_named_after_its_image(tmp_path):
    model = timm.create_model("test_efficientnet", num_classes=3).eval()
    classifier = pg.Classifier(model, KINDS["compose"](), tuple("abc"), "mine")
    (found,) = pg.explain_images(classifier, [Image.fromarray(data.chelsea())], names=["cats/chelsea.jpg"])
    assert {path.name for path in found.save(tmp_path)} == {"chelsea.png", "chelsea.npy", "chelsea.json"}
