"""Figures on real images, skipped where they are missing."""

import pytest
import torch
from benchmarks.cifar10 import scores
from benchmarks.grid_pointing import draw_mosaics, play, probabilities, read_photographs

import parchgrad as pg
from tests.support import SHARED

FILES = sorted((SHARED / "imagenet-one-per-class").glob("*.jpg"))

needs_photographs = pytest.mark.skipif(
    len(FILES) != 1000, reason="needs ../shared/data/imagenet-one-per-class, which is not here"
)


@pytest.fixture(scope="module")
def classified():
    classifier = pg.load_model("efficientnet_lite0")
    inputs = read_photographs(classifier, FILES)
    return classifier, inputs, probabilities(classifier, inputs)


@needs_photographs
def test_offline_weights_reach_their_accuracy(classified):
    _, inputs, probability = classified
    assert (probability.argmax(1) == torch.arange(len(inputs))).double().mean() >= 0.85


@needs_photographs
def test_grid_pointing_game(classified):
    classifier, inputs, probability = classified
    drawn = draw_mosaics(probability.diagonal(), mosaics=24, seed=0)

    def score(selector):
        return float(play(pg.Explainer(classifier.model, selector, layers=0.5), inputs, drawn).mean())

    # 0.36 and 0.77 were measured with a prototype on other mosaics; a random choice of channels must not help.
    assert score(None) == pytest.approx(0.36, abs=0.05)
    assert score(pg.GradientEnergy(quantile=0.1)) >= 0.70
    assert score(pg.RandomChannels(quantile=0.1)) < 0.36


@pytest.mark.skipif(not (SHARED / "cifar10").exists(), reason="the shared CIFAR-10 images are not here")
def test_class_wise_beats_the_plain_gradient_and_random_channels_on_unseen_images():
    found = {name.split("(")[0]: shares for name, shares in scores(SHARED / "cifar10", mosaics=40).items()}
    class_wise = found["ClassWise"].mean()
    # A prototype scored 0.42 against 0.31; the standard error is below 0.01.
    assert class_wise > found["plain gradient"].mean() + 0.06
    assert class_wise > found["RandomChannels"].mean() + 0.06
