from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.stats import chisquare, kstest
from torch.utils.data import TensorDataset

from parchgrad.data.perturbed import Blur, Jigsaw, PerturbedMNIST
from parchgrad.data.samples import LabelledImages, Sample
from parchgrad.errors import InputError, SettingError
from parchgrad.evaluation.localisation import boxes_to_region


class Listed:
    """Samples from a list."""

    categories = ("cat", "dog")
    fingerprint = "listed"

    def __init__(self, *samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def digits(count=3, size=7, seed=0):
    """Strokes of several shades on a background of 0."""
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.zeros(count, 1, size, size)
    tiles[:, :, 1:-2, 2:-1] = torch.rand(count, 1, size - 3, size - 3, generator=generator).sub(0.4).clamp(min=0)
    tiles[:, :, 2, 3] = 1
    return LabelledImages(TensorDataset(tiles, torch.arange(count) % 2), categories=("0", "1"))


def same(one, two):
    pairs = ((one.image, two.image), (one.boxes, two.boxes), (one.mask, two.mask))
    return (one.label, one.name) == (two.label, two.name) and all(torch.equal(*pair) for pair in pairs)


# Jigsaw


def test_one_swap_on_a_grid_of_two_exchanges_two_quarters_by_hand():
    image = torch.arange(16.0).reshape(1, 4, 4)
    box = torch.tensor([[0.0, 0.0, 2.0, 1.0]])
    sample = Sample(image=image, label=1, name="a", boxes=box, mask=image[0] < 2)
    by_hand = {
        # Upper quarters change places.
        (2, 0, 8, 10): ([[2, 3, 0, 1], [6, 7, 4, 5], [8, 9, 10, 11], [12, 13, 14, 15]], [2, 0, 4, 1]),
        # Left quarters.
        (8, 2, 0, 10): ([[8, 9, 2, 3], [12, 13, 6, 7], [0, 1, 10, 11], [4, 5, 14, 15]], [0, 2, 2, 3]),
        # Upper left and lower right.
        (10, 2, 8, 0): ([[10, 11, 2, 3], [14, 15, 6, 7], [8, 9, 0, 1], [12, 13, 4, 5]], [2, 2, 4, 3]),
        # Lower left and upper right.
        (0, 8, 2, 10): ([[0, 1, 8, 9], [4, 5, 12, 13], [2, 3, 10, 11], [6, 7, 14, 15]], [0, 0, 2, 1]),
        # Lower quarters.
        (0, 2, 10, 8): ([[0, 1, 2, 3], [4, 5, 6, 7], [10, 11, 8, 9], [14, 15, 12, 13]], [0, 0, 2, 1]),
        # Right quarters.
        (0, 10, 8, 2): ([[0, 1, 10, 11], [4, 5, 14, 15], [8, 9, 2, 3], [12, 13, 6, 7]], [0, 0, 2, 1]),
    }
    seen = set()
    for seed in range(60):
        shuffled = Jigsaw(Listed(sample), grid=2, shuffles=1, seed=seed)[0]
        corners = tuple(shuffled.image[0, ::2, ::2].flatten().int().tolist())
        picture, moved = by_hand[corners]
        assert shuffled.image.tolist() == [picture]
        assert shuffled.boxes.tolist() == [moved]
        assert torch.equal(shuffled.mask, shuffled.image[0] < 2)
        assert (shuffled.label, shuffled.name) == (1, "a")
        seen.add(corners)
    assert seen == set(by_hand)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 4), st.integers(1, 20), st.integers(0, 100), st.integers(1, 3), st.integers(1, 3))
def test_boxes_and_masks_go_with_the_cells(grid, shuffles, seed, rows, columns):
    height, width = grid * rows, grid * columns
    generator = torch.Generator().manual_seed(seed)
    ends = torch.rand(3, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([width, height])
    boxes = ends.flatten(1)
    region = boxes_to_region(boxes, height=height, width=width)
    number = torch.arange(height * width).reshape(1, height, width)
    sample = Sample(image=number.double(), label=0, name="a", boxes=boxes, mask=region)
    shuffled = Jigsaw(Listed(sample), grid=grid, shuffles=shuffles, seed=seed)[0]
    source = shuffled.image[0].long()
    assert sorted(source.flatten().tolist()) == number.flatten().tolist()
    # Pixels of one cell stay together, as they were.
    for row in range(0, height, rows):
        for column in range(0, width, columns):
            first = int(source[row, column])
            assert (first // width % rows, first % width % columns) == (0, 0)
            kept = [first + down * width + across for down in range(rows) for across in range(columns)]
            assert source[row : row + rows, column : column + columns].flatten().tolist() == kept
    expected = region.flatten()[source]
    assert torch.equal(shuffled.mask, expected)
    assert torch.equal(boxes_to_region(shuffled.boxes, height=height, width=width), expected)


def test_without_a_shuffle_or_after_one_and_back_the_sample_is_as_it_was():
    sample = Sample(image=torch.rand(3, 4, 4), label=0, name="a", boxes=torch.tensor([[0.0, 0.0, 4.0, 3.0]]))
    assert Jigsaw(Listed(sample), grid=2, shuffles=0)[0] is sample
    assert Jigsaw(Listed(sample), grid=1, shuffles=0)[0] is sample
    changed = [Jigsaw(Listed(sample), grid=2, shuffles=2, seed=seed)[0] for seed in range(60)]
    back = [item for item in changed if torch.equal(item.image, sample.image)]
    assert 0 < len(back) < 60
    assert all(item is sample for item in back)
    assert Jigsaw(Listed(replace(sample, boxes=None)), grid=2, shuffles=1)[0].boxes is None


def test_a_box_of_nothing_stays_a_box_of_nothing():
    sample = Sample(image=torch.rand(1, 4, 4), label=0, name="a", boxes=torch.empty(0, 4))
    assert Jigsaw(Listed(sample), grid=2, shuffles=1)[0].boxes.shape == (0, 4)


# Blur


@pytest.mark.parametrize(
    ("magnitude", "dtype"), [(0.3, "float64"), (1.0, "float64"), (2.6, "float64"), (1.5, "float32")]
)
def test_the_blur_is_scipys(magnitude, dtype):
    image = torch.rand(3, 23, 31, dtype=getattr(torch, dtype))
    sample = Sample(image=image, label=0, name="a", boxes=torch.ones(1, 4), mask=torch.ones(23, 31, dtype=torch.bool))
    blurred = Blur(Listed(sample), magnitude=magnitude)[0]
    # What torch calls reflect, scipy calls mirror.
    expected = gaussian_filter(image.numpy(), magnitude, mode="mirror", truncate=4.0, axes=(1, 2))
    torch.testing.assert_close(blurred.image, torch.from_numpy(expected))
    assert blurred.boxes is sample.boxes
    assert blurred.mask is sample.mask


def test_a_blur_of_nothing_leaves_the_sample():
    sample = Sample(image=torch.rand(3, 9, 9), label=0, name="a")
    assert Blur(Listed(sample), magnitude=0)[0] is sample


# PerturbedMNIST


def test_without_noise_the_canvas_holds_the_digit_alone_with_a_tight_box_and_an_exact_mask():
    tiles = digits(count=5)
    for index in range(5):
        tile, sample = tiles[index].image, PerturbedMNIST(tiles, epsilon=0.0, canvas=15, seed=4)[index]
        assert sample.image.shape == (1, 15, 15)
        touched = [(row, column) for row in range(15) for column in range(15) if sample.image[0, row, column] > 0]
        rows, columns = zip(*touched, strict=True)
        assert sample.boxes.tolist() == [[min(columns), min(rows), max(columns) + 1, max(rows) + 1]]
        assert torch.equal(sample.mask, sample.image[0] > 0)
        left, top, right, bottom = sample.boxes[0].int().tolist()
        where = (tile[0] > 0).nonzero()
        (first_row, first_column), (last_row, last_column) = where.amin(0).tolist(), where.amax(0).tolist()
        strokes = tile[:, first_row : last_row + 1, first_column : last_column + 1]
        assert torch.equal(sample.image[:, top:bottom, left:right], strokes)
        assert (sample.label, sample.name) == (index % 2, str(index))


def test_noise_shows_through_where_the_digit_is_dark():
    tiles = digits(count=4)
    dot = torch.zeros(4, 1, 7, 7)
    dot[..., 0, 0] = 1
    dots = LabelledImages(TensorDataset(dot, torch.zeros(4).long()), categories=("dot",))
    for index in range(4):
        clear = PerturbedMNIST(tiles, epsilon=0.0, canvas=20, seed=1)[index]
        noisy = PerturbedMNIST(tiles, epsilon=0.6, canvas=20, seed=1)[index]
        # The same place and noise behind another digit, which hides one pixel of it alone.
        noise = PerturbedMNIST(dots, epsilon=0.6, canvas=20, seed=1)[index]
        seen = ~noise.mask
        expected = clear.image + (1 - clear.image) * noise.image
        torch.testing.assert_close(noisy.image[:, seen], expected[:, seen])
        assert torch.equal(noisy.mask, clear.mask)
        assert torch.equal(noisy.boxes, clear.boxes)
        half = PerturbedMNIST(tiles, epsilon=0.3, canvas=20, seed=1)[index]
        torch.testing.assert_close(half.image[:, ~clear.mask], noisy.image[:, ~clear.mask] / 2)


def test_noise_and_places_are_uniform():
    tile = torch.zeros(1, 1, 2, 2)
    tile[..., 0, 0] = 1
    dot = LabelledImages(TensorDataset(tile.expand(600, -1, -1, -1), torch.zeros(600).long()), categories=("dot",))
    samples = [PerturbedMNIST(dot, epsilon=0.5, canvas=6, seed=2)[index] for index in range(600)]
    background = torch.cat([sample.image[:, ~sample.mask].flatten() for sample in samples])
    assert kstest(background.numpy(), "uniform", (0, 0.5)).pvalue > 1e-3
    places = torch.stack([sample.boxes[0, 1] * 5 + sample.boxes[0, 0] for sample in samples]).long()
    assert chisquare(np.bincount(places, minlength=25)).pvalue > 1e-3


@pytest.mark.parametrize(
    "make",
    [
        lambda seed=3: PerturbedMNIST(digits(count=6), epsilon=0.5, canvas=12, seed=seed),
        lambda seed=3: Jigsaw(PerturbedMNIST(digits(count=6), epsilon=0.5, canvas=12), grid=3, shuffles=5, seed=seed),
    ],
)
def test_an_item_depends_on_seed_and_index_alone(make):
    state = torch.get_rng_state()
    forwards = [make()[index] for index in range(6)]
    dataset = make()
    for index in (4, 0, 5, 5, 2, 1, 3):
        assert same(dataset[index], forwards[index])
        assert same(dataset[index - 6], forwards[index])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(make(seed=4)[0].image, forwards[0].image)
    # Places and patterns are drawn anew for every index.
    flat = torch.stack([item.image.flatten() for item in forwards])
    assert len(flat.unique(dim=0)) == 6


def test_another_seed_is_no_shift_of_the_draws():
    dot = torch.zeros(4, 1, 2, 2)
    dot[..., 0, 0] = 1
    dots = LabelledImages(TensorDataset(dot, torch.zeros(4).long()), categories=("dot",))
    images = [
        PerturbedMNIST(dots, epsilon=1.0, canvas=8, seed=seed)[index].image for seed in range(4) for index in range(4)
    ]
    assert len(torch.stack(images).flatten(1).unique(dim=0)) == 16


# Settings, items and digests


def test_every_setting_and_the_data_change_the_fingerprint():
    tiles, others = digits(), digits(seed=1)
    datasets = [
        *(Jigsaw(tiles, grid=grid, shuffles=n, seed=s) for grid, n, s in ((2, 1, 0), (3, 1, 0), (2, 2, 0), (2, 1, 1))),
        Jigsaw(others, grid=2, shuffles=1),
        *(Blur(tiles, magnitude=magnitude) for magnitude in (0.5, 0.6)),
        Blur(others, magnitude=0.5),
        *(
            PerturbedMNIST(tiles, epsilon=epsilon, canvas=canvas, seed=seed)
            for epsilon, canvas, seed in ((0.1, 9, 0), (0.2, 9, 0), (0.1, 10, 0), (0.1, 9, 1))
        ),
        Blur(PerturbedMNIST(tiles, epsilon=0.1, canvas=9), magnitude=0.5),
        tiles,
        others,
    ]
    assert len({dataset.fingerprint for dataset in datasets}) == len(datasets)
    assert Jigsaw(digits(), grid=2, shuffles=1).fingerprint == datasets[0].fingerprint
    assert all(dataset.categories == ("0", "1") and len(dataset) == 3 for dataset in datasets)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Jigsaw(digits(), grid=0, shuffles=1), "grid` is 0"),
        (lambda: Jigsaw(digits(), grid=2.0, shuffles=1), "grid` is 2.0"),
        (lambda: Jigsaw(digits(), grid=True, shuffles=0), "grid` is True"),
        (lambda: Jigsaw(digits(), grid=2, shuffles=-1), "shuffles` is -1"),
        (lambda: Jigsaw(digits(), grid=2, shuffles=1, seed=-1), "seed` is -1"),
        (lambda: Jigsaw(digits(), grid=1, shuffles=3), "shuffles` is 3"),
        (lambda: Blur(digits(), magnitude=-0.1), "magnitude` is -0.1"),
        (lambda: Blur(digits(), magnitude=float("nan")), "magnitude` is nan"),
        (lambda: PerturbedMNIST(digits(), epsilon=1.1, canvas=9), "epsilon` is 1.1"),
        (lambda: PerturbedMNIST(digits(), epsilon=float("nan"), canvas=9), "epsilon` is nan"),
        (lambda: PerturbedMNIST(digits(), epsilon=0.1, canvas=0), "canvas` is 0"),
    ],
)
def test_settings_out_of_range(make, words):
    with pytest.raises(SettingError, match=words):
        make()


def pairs(image, label=0):
    return LabelledImages([(image, label)], categories=("a", "b"))


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (Jigsaw(digits(), grid=2, shuffles=1), "grid` is 2, .* 7 x 7 pixels of '0'"),
        (Blur(digits(), magnitude=1.75), "magnitude` is 1.75, .* '0'"),
        (PerturbedMNIST(digits(), epsilon=0.1, canvas=6), "canvas` is 6, .* 7 x 7 pixels"),
        (PerturbedMNIST(pairs(torch.zeros(1, 3, 3)), epsilon=0.1, canvas=6), "'0' is not a digit"),
        (PerturbedMNIST(pairs(torch.ones(1, 3, 3)), epsilon=0.1, canvas=6), "'0' is not a digit"),
        (PerturbedMNIST(pairs(torch.eye(3).unsqueeze(0) * 2), epsilon=0.1, canvas=6), "'0' is not a digit"),
        (PerturbedMNIST(pairs(torch.eye(3).unsqueeze(0) - 0.1), epsilon=0.1, canvas=6), "'0' is not a digit"),
    ],
)
def test_items_that_do_not_fit(dataset, words):
    with pytest.raises(InputError, match=words):
        dataset[0]
