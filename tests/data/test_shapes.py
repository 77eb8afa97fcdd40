import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.ndimage import label as connected_parts
from torch.utils.data import DataLoader

from parchgrad.data import shapes
from parchgrad.data.outlines import OUTLINES
from parchgrad.data.shapes import MEAN, SHAPE_CATEGORIES, STD, GeneratedShapes
from parchgrad.errors import SettingError
from parchgrad.evaluation.localisation import mosaic


def make(**changes):
    return GeneratedShapes(**{"count": 1000, "seed": 3, **changes})


@pytest.fixture(scope="module")
def many():
    dataset = make(count=1200)
    return [dataset[index] for index in range(len(dataset))]


def picture_of(sample):
    return sample.image.double().permute(1, 2, 0).numpy() * STD[0] + MEAN[0]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.integers(0, 2**20))
def test_a_picture_depends_on_seed_and_index_alone(seed, index, other):
    first = GeneratedShapes(count=index + 1, seed=seed)[index]
    dataset = GeneratedShapes(count=2**41, seed=seed)
    _ = dataset[other]
    again = dataset[index]
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.mask, again.mask)
    assert (first.label, first.name) == (again.label, again.name) == (index % 10, again.name)


def test_neither_seeds_nor_indices_share_pictures():
    pictures = [make(seed=seed)[index].image for seed in (0, 1, 2**32) for index in (0, 10, 20)]
    differences = [(one - two).abs().mean().item() for place, one in enumerate(pictures) for two in pictures[:place]]
    assert min(differences) > 0.1


def test_what_is_drawn_stays_as_it_is():
    """Where one of these changes, so must the version of the generator, and the network is trained again."""
    assert shapes.GENERATOR_VERSION == 1
    samples = [make(seed=0, rivals=index % 2)[index] for index in range(6)]
    assert [int(sample.mask.sum()) for sample in samples] == AREAS
    # Another platform may round a level the other way.
    np.testing.assert_allclose([picture_of(sample).mean() for sample in samples], MEANS, atol=1e-4)


AREAS = [169, 252, 496, 168, 317, 196]
MEANS = [0.685211, 0.235317, 0.314658, 0.69964, 0.376458, 0.317577]


def test_the_mask_is_the_drawn_shape_and_the_box_is_tight(many):
    for sample in many[:200]:
        rows, columns = sample.mask.nonzero(as_tuple=True)
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert sample.boxes.tolist() == [[float(value) for value in expected]]
        # One piece with one hole at most: nothing covers it.
        _, pieces = connected_parts(sample.mask.numpy(), structure=np.ones((3, 3)))
        _, outside = connected_parts(~sample.mask.numpy())
        assert pieces == 1
        assert outside == (2 if SHAPE_CATEGORIES[sample.label] == "ring" else 1)


def test_the_mask_holds_exactly_the_pixels_that_the_shape_changes(monkeypatch):
    dataset = make(distractors=2)
    paint, painted = shapes._paint, []

    def record(picture, drawn, fill):
        before = picture.copy()
        paint(picture, drawn, np.full_like(fill, 2))
        painted.append((picture - before) / (2 - before))
        picture[:] = before
        paint(picture, drawn, fill)

    monkeypatch.setattr(shapes, "_paint", record)
    for index in range(10):
        painted.clear()
        mask = dataset[index].mask.numpy()
        assert len(painted) == 3
        np.testing.assert_array_equal((painted[-1] > 0.5 - 1e-4).all(axis=2), mask)


def test_images_are_normalised_whole_levels(many):
    levels = np.stack([picture_of(sample) for sample in many[:50]]) * 255
    assert many[0].image.dtype == torch.float32
    np.testing.assert_allclose(levels, levels.round(), atol=1e-4)
    assert levels.min() >= -1e-4
    assert levels.max() <= 255 + 1e-4
    together = torch.stack([sample.image for sample in many])
    # What the constants promise, within a tenth of a standard deviation and a quarter of the scale.
    assert together.mean((0, 2, 3)).abs().max() < 0.15
    assert (together.std((0, 2, 3)) - 1).abs().max() < 0.25


def test_classes_take_turns(many):
    assert [sample.label for sample in many[:12]] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert make().categories == tuple(OUTLINES) == SHAPE_CATEGORIES
    four = torch.stack([sample.image for sample in many[6:10]])
    assert mosaic(four, rows=2, columns=2).shape == (1, 3, 128, 128)


def test_area_place_and_colour_are_distributed_alike_in_all_classes(many):
    labels = np.array([sample.label for sample in many])
    area = np.array([int(sample.mask.sum()) for sample in many])
    centres = np.array([sample.mask.nonzero().double().mean(0).tolist() for sample in many])
    colours = np.array([picture_of(sample)[sample.mask.numpy()].mean(0) for sample in many])
    for values in (area, *centres.T, *colours.T):
        assert stats.kruskal(*(values[labels == label] for label in range(10))).pvalue > 0.01
        thirds = np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values)
        table = np.array([[((labels == label) & (thirds == third)).sum() for third in range(3)] for label in range(10)])
        assert stats.chi2_contingency(table).pvalue > 0.01


def test_a_linear_classifier_of_all_but_the_outline_is_at_chance(many):
    labels = torch.tensor([sample.label for sample in many])
    features = []
    for sample in many:
        inside, outside = sample.image[:, sample.mask], sample.image[:, ~sample.mask]
        centre = sample.mask.nonzero().float().mean(0)
        features.append(
            torch.cat(
                [torch.stack([sample.mask.float().mean()]), centre, inside.mean(1), outside.mean(1), outside.std(1)]
            )
        )
    table = torch.stack(features).double()
    table = (table - table.mean(0)) / table.std(0)
    table = torch.cat([table, table**2, torch.ones(len(table), 1)], dim=1)
    half = len(table) // 2
    wanted = torch.nn.functional.one_hot(labels, 10).double()
    weights = torch.linalg.lstsq(table[:half], wanted[:half]).solution
    right = ((table[half:] @ weights).argmax(1) == labels[half:]).double().mean().item()
    assert abs(right - 0.1) < 3.3 * math.sqrt(0.1 * 0.9 / (len(table) - half))


def test_the_picture_of_every_class_is_the_same_but_for_the_outline():
    """The same draws with another label: only the shape's own surroundings differ."""
    scene = shapes._Scene(64, 3, 0)
    drawn = [shapes._draw(np.random.Generator(np.random.Philox(key=5)), scene, label) for label in range(len(OUTLINES))]
    pictures = np.stack([picture for picture, _ in drawn])
    rows, columns = np.nonzero((pictures != pictures[0]).any(axis=(0, 3)))
    centre = np.array([np.argwhere(mask).mean(axis=0) for _, (mask,) in drawn])
    areas = np.array([mask.sum() for _, (mask,) in drawn])
    assert np.ptp(centre, axis=0).max() < 0.5
    assert areas.std() / areas.mean() < 0.03
    away = np.hypot(rows - centre[0, 0], columns - centre[0, 1]).max()
    assert away < 1.05 * math.sqrt(areas.mean()) + 1.5


def test_rivals_are_other_classes_and_as_large():
    alone, rivalled = make(size=96, distractors=0), make(size=96, distractors=0, rivals=2)
    assert np.mean([alone[index].mask.sum() for index in range(100)]) == pytest.approx(
        3 * np.mean([rivalled[index].mask.sum() for index in range(100)]), rel=0.15
    )


def test_the_masks_are_of_the_shape_and_its_rivals():
    alone, rivalled = make(count=40, distractors=0), make(count=40, rivals=2)
    for index in range(40):
        assert torch.equal(alone.masks(index)[0], alone[index].mask)
        masks = rivalled.masks(index)
        assert (masks.dtype, masks.shape) == (torch.bool, (3, *rivalled[index].mask.shape))
        assert torch.equal(masks[0], rivalled[index].mask)
        assert masks.sum(dim=0).max() == 1
    sizes = torch.stack([rivalled.masks(index).sum(dim=(1, 2)) for index in range(40)]).double()
    # Shapes are placed apart wherever possible, so few pixels are hidden.
    assert (sizes[:, 1:].mean() / sizes[:, 0].mean() - 1).abs() < 0.1


def test_rivals_are_drawn_from_all_other_classes(monkeypatch):
    asked = []
    draw = shapes.coverage
    names = {inside: name for name, inside in OUTLINES.items()}

    def record(inside, **arguments):
        asked.append((names[inside], arguments["side"]))
        return draw(inside, **arguments)

    monkeypatch.setattr(shapes, "coverage", record)
    dataset = make(distractors=0, rivals=3)
    seen = set()
    for index in range(0, 300, 10):
        asked.clear()
        assert dataset[index].label == 0
        drawn, sides = zip(*asked, strict=True)
        assert drawn[0] == "arrow"
        assert drawn == tuple(SHAPE_CATEGORIES[label] for label in dataset.classes(index))
        assert len(set(drawn)) == 4
        assert len(set(sides)) == 1
        seen |= set(drawn[1:])
    assert seen == set(SHAPE_CATEGORIES[1:])


def test_colours_are_those_of_oklch():
    # Red, green and white of sRGB, as the CSS Color 4 specification gives them.
    for colour, expected in (
        ((0.627955, 0.257683, 29.2339), (1, 0, 0)),
        ((0.866440, 0.294827, 142.4953), (0, 1, 0)),
        ((0.452014, 0.313214, 264.0520), (0, 0, 1)),
        ((1, 0, 0), (1, 1, 1)),
        ((0.599871, 0, 0), (0.5019608, 0.5019608, 0.5019608)),
    ):
        np.testing.assert_allclose(shapes._colour(colour[0], colour[1], colour[2] / 360), expected, atol=2e-3)


def test_the_fingerprint_tells_settings_apart():
    assert make().fingerprint == make().fingerprint
    others = [make(), make(count=10), make(seed=4), make(size=65), make(distractors=2), make(rivals=1)]
    assert len({dataset.fingerprint for dataset in others}) == len(others)
    assert make().fingerprint.startswith("1000 generated shapes, ")


# On the module: a worker that is spawned unpickles it.
def images_of(samples):
    return [sample.image for sample in samples]


def test_iteration_ends_and_workers_draw_the_same():
    dataset = make(count=12)
    one_by_one = torch.stack([sample.image for sample in dataset])
    assert len(one_by_one) == len(dataset) == 12
    loader = DataLoader(dataset, batch_size=5, num_workers=2, collate_fn=images_of)
    assert torch.equal(torch.stack([image for batch in loader for image in batch]), one_by_one)
    for index in (-1, 12):
        with pytest.raises(IndexError, match=f"index` is {index}"):
            dataset[index]
        with pytest.raises(IndexError, match=f"index` is {index}"):
            dataset.classes(index)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"count": 0}, "count` is 0"),
        ({"seed": -1}, "seed` is -1"),
        ({"seed": 1.5}, r"seed` is 1\.5"),
        ({"size": 31}, "size` is 31, .* from 32"),
        ({"distractors": -1}, "distractors` is -1"),
        ({"rivals": 10}, "rivals` is 10, .* from 0 to 9"),
    ],
)
def test_settings_out_of_range(changes, words):
    with pytest.raises(SettingError, match=words):
        make(**changes)
