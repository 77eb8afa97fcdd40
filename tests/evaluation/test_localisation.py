import math

import pytest
import torch
from scipy.stats import chi2_contingency

from parchgrad.errors import InputError, SettingError
from parchgrad.evaluation.localisation import (
    _widen,
    area_share,
    boxes_to_region,
    cell_shares,
    centre_gaussian,
    draw_mosaics,
    mass_inside,
    mosaic,
    pointing_game,
    weighted_mass_inside,
)


def test_mosaic_places_images_row_by_row():
    images = torch.randn(6, 3, 4, 5)
    picture = mosaic(images, rows=2, columns=3)
    assert picture.shape == (1, 3, 8, 15)
    for index in range(6):
        row, column = divmod(index, 3)
        assert torch.equal(picture[0, :, 4 * row : 4 * row + 4, 5 * column : 5 * column + 5], images[index])
    with pytest.raises(InputError, match="needs 6 images"):
        mosaic(images[:5], rows=2, columns=3)


def test_cell_shares_by_hand():
    heat = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 2.0], [0.0, 0.0, 3.0, 0.0], [0.0, 1.0, 0.0, 0.0]]])
    torch.testing.assert_close(cell_shares(heat, rows=2, columns=2), torch.tensor([[0.4, 0.2, 0.1, 0.3]]))


def test_shares_are_batched_scale_free_and_honest_about_empty_maps():
    heat = torch.rand(3, 6, 9)
    whole = cell_shares(heat, rows=2, columns=3)
    torch.testing.assert_close(whole, torch.cat([cell_shares(row.unsqueeze(0), rows=2, columns=3) for row in heat]))
    torch.testing.assert_close(cell_shares(1e-30 * heat, rows=2, columns=3), whole)
    torch.testing.assert_close(whole.sum(1), torch.ones(3))
    heat[1] = 0
    assert cell_shares(heat, rows=2, columns=3).isnan().all(1).tolist() == [False, True, False]


def test_whole_numbers_have_shares():
    shares = cell_shares(torch.tensor([[[3, 0], [0, 1]]]), rows=2, columns=2)
    assert (shares.dtype, shares.tolist()) == (torch.float64, [[0.75, 0, 0, 0.25]])


@pytest.mark.parametrize("shape", [(2, 0, 4), (2, 4, 0), (0, 0, 0)])
def test_maps_without_pixels_are_refused(shape):
    heat = torch.zeros(shape)
    for score in (mass_inside, pointing_game, lambda heat, region: cell_shares(heat, rows=2, columns=2)):
        with pytest.raises(InputError, match=r"`heat` has shape .* pixel"):
            score(heat, heat > 0)


def test_maps_that_do_not_fit():
    with pytest.raises(InputError, match="does not divide into 2 x 2"):
        cell_shares(torch.zeros(1, 5, 4), rows=2, columns=2)
    with pytest.raises(InputError, match="negative"):
        cell_shares(torch.full((1, 4, 4), -1.0), rows=2, columns=2)


def discs(height, width, centres, radius):
    """Regions within a distance of each centre, pixel by pixel."""
    return torch.tensor(
        [
            [[math.hypot(row - down, column - across) <= radius for column in range(width)] for row in range(height)]
            for down, across in centres
        ]
    )


def test_mass_inside_by_hand_and_against_a_loop():
    heat, region = torch.rand(4, 7, 9), torch.rand(4, 7, 9) > 0.6
    inside, weighted = mass_inside(heat, region), weighted_mass_inside(heat, region)
    for row in range(4):
        pixels = [(float(h), bool(r)) for h, r in zip(heat[row].flatten(), region[row].flatten(), strict=True)]
        expected = math.fsum(h for h, r in pixels if r) / math.fsum(h for h, _ in pixels)
        assert inside[row].item() == pytest.approx(expected, rel=1e-6)
        area = sum(r for _, r in pixels)
        assert weighted[row].item() == pytest.approx(expected * 63 / area, rel=1e-6)
    uniform = torch.full((4, 7, 9), 1e-30)
    torch.testing.assert_close(mass_inside(uniform, region), area_share(region))
    torch.testing.assert_close(weighted_mass_inside(uniform, region), torch.ones(4).double())


def test_regions_that_cannot_be_met_and_maps_that_point_nowhere_give_no_score():
    heat, region = torch.rand(4, 5, 5), torch.ones(4, 5, 5, dtype=torch.bool)
    heat[0], heat[1, 2, 2], region[2] = 0, math.nan, False
    for score in (mass_inside, weighted_mass_inside, pointing_game):
        assert score(heat, region).isnan().tolist() == [True, True, True, False]


def test_pointing_game_counts_what_is_near_enough():
    region = torch.zeros(1, 30, 40, dtype=torch.bool)
    region[0, 10:14, 20:24] = True
    for row, column, distance in ((12, 21, 0), (9, 20, 1), (7, 27, math.hypot(3, 4)), (29, 0, math.hypot(16, 20))):
        heat = torch.rand(1, 30, 40)
        heat[0, row, column] = 2
        for tolerance in (0, 1, 4.9, 5, 15, 25.6, 25.7):
            assert pointing_game(heat, region, tolerance=tolerance).item() == float(distance <= tolerance)


def test_the_widened_region_is_every_pixel_within_the_distance():
    region = torch.zeros(3, 20, 31, dtype=torch.bool)
    centres = [(4, 5), (19, 30), (10, 15)]
    for row, centre in enumerate(centres):
        region[(row, *centre)] = True
    for tolerance in (0, 3, 7.5, 100):
        assert torch.equal(_widen(region, tolerance), discs(20, 31, centres, tolerance))


def test_several_highest_points_count_by_their_share():
    heat, region = torch.ones(1, 4, 5), torch.zeros(1, 4, 5, dtype=torch.bool)
    region[0, :2] = True
    assert pointing_game(heat, region, tolerance=0).item() == 0.5


def test_boxes_become_the_pixels_whose_centres_they_hold():
    boxes = torch.tensor([[1.0, 0.0, 3.0, 2.0], [2.6, 1.4, 3.4, 3.0], [-5.0, -5.0, 0.4, 0.4], [4.0, 0.0, 4.0, 3.0]])
    region = boxes_to_region(boxes, height=3, width=5)
    assert region.int().tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    assert not boxes_to_region(torch.empty(0, 4), height=3, width=5).any()
    assert boxes_to_region(torch.tensor([[0.0, 0.0, 5.0, 3.0]]), height=3, width=5).all()
    with pytest.raises(InputError, match="left, top, right, bottom"):
        boxes_to_region(torch.zeros(4), height=3, width=5)


def test_the_blob_is_a_gaussian_about_the_centre():
    heat = centre_gaussian(10, 21, sigma=0.3)
    for row, column in ((0, 0), (4, 10), (9, 20), (2, 15)):
        down, across = (row + 0.5) / 10 - 0.5, (column + 0.5) / 21 - 0.5
        expected = math.exp(-(down**2 + across**2) / (2 * 0.3**2))
        assert heat[row, column].item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(SettingError, match="`sigma` is 0"):
        centre_gaussian(4, 4, sigma=0)


def test_mosaics_are_drawn_from_confident_images_of_different_classes_once_each():
    generator = torch.Generator().manual_seed(0)
    labels, probability = torch.randint(6, (200,), generator=generator), torch.rand(200, generator=generator)
    drawn = draw_mosaics(probability, labels, count=20, confidence=0.5, seed=3)
    assert drawn.shape == (20, 4)
    assert len(set(drawn.flatten().tolist())) == 80
    assert bool((probability[drawn] >= 0.5).all())
    assert all(len(set(row.tolist())) == 4 for row in labels[drawn])
    assert torch.equal(drawn, draw_mosaics(probability, labels, count=20, confidence=0.5, seed=3))
    assert not torch.equal(drawn, draw_mosaics(probability, labels, count=20, confidence=0.5, seed=4))
    # Every class comes in every cell: none is tied to a place.
    everything = draw_mosaics(torch.ones(200), labels, count=40, seed=1)
    counts = torch.stack([labels[column].bincount(minlength=6) for column in everything.T])
    assert chi2_contingency(counts.numpy()).pvalue > 1e-4


def test_too_few_confident_images_are_said():
    with pytest.raises(InputError, match=r"`count` is 3, .* 2 mosaics of 4 classes .* 8 images of 4 classes"):
        draw_mosaics(torch.ones(8), torch.arange(8) % 4, count=3)
    with pytest.raises(InputError, match=r"`count` is 1, .* 0 mosaics"):
        draw_mosaics(torch.ones(8), torch.zeros(8), count=1)


def test_regions_and_settings_that_do_not_fit():
    heat = torch.ones(1, 4, 4)
    with pytest.raises(InputError, match="`region` is torch"):
        mass_inside(heat, torch.ones(1, 4, 4))
    with pytest.raises(InputError, match="`region` is torch"):
        mass_inside(heat, torch.ones(2, 4, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="negative"):
        pointing_game(-heat, torch.ones(1, 4, 4, dtype=torch.bool))
    with pytest.raises(SettingError, match="`tolerance` is -1"):
        pointing_game(heat, torch.ones(1, 4, 4, dtype=torch.bool), tolerance=-1)
