import math

import numpy as np
import pytest
from matplotlib.path import Path

from parchgrad.data.outlines import CUTTABLE, OUTLINES, bar, blob, coverage, cut


def lens(radius, other, distance):
    """Area that two discs share, by the formula of their circular segments."""
    near = (distance**2 + radius**2 - other**2) / (2 * distance)
    far = distance - near
    segments = [r**2 * math.acos(d / r) - d * math.sqrt(r**2 - d**2) for r, d in ((radius, near), (other, far))]
    return sum(segments)


def points(count=20_000, seed=0):
    return np.random.default_rng(seed).uniform(-2, 2, (count, 2))


def on_circle(degrees, radius=1.0):
    return [(radius * math.sin(math.radians(at)), -radius * math.cos(math.radians(at))) for at in degrees]


def pentagram():
    inner = math.cos(math.radians(72)) / math.cos(math.radians(36))
    corners = []
    for tip in range(0, 360, 72):
        corners += on_circle([tip]) + on_circle([tip + 36], inner)
    return corners


POLYGONS = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": on_circle([0, 120, 240]),
    "star": pentagram(),
    "arrow": [(0, -1), (0.84, 0.05), (0.27, 0.05), (0.27, 1), (-0.27, 1), (-0.27, 0.05), (-0.84, 0.05)],
    "cross": [
        (sign_x * x, sign_y * y)
        for sign_x, sign_y, corners in (
            (1, -1, [(0.32, 1), (0.32, 0.32), (1, 0.32)]),
            (1, 1, [(1, 0.32), (0.32, 0.32), (0.32, 1)]),
            (-1, 1, [(0.32, 1), (0.32, 0.32), (1, 0.32)]),
            (-1, -1, [(1, 0.32), (0.32, 0.32), (0.32, 1)]),
        )
        for x, y in corners
    ],
}


@pytest.mark.parametrize("name", POLYGONS)
def test_outlines_with_corners_are_the_polygons_they_are_named_after(name):
    at = points()
    expected = Path(POLYGONS[name]).contains_points(at)
    found = OUTLINES[name](at[:, 0], at[:, 1])
    # The corner of the star's name may point down as well as up.
    flipped = OUTLINES[name](at[:, 0], -at[:, 1])
    assert 500 < expected.sum() < 10_000
    assert min((found != expected).sum(), (flipped != expected).sum()) == 0


@pytest.mark.parametrize(
    ("name", "area"),
    [
        ("disc", math.pi),
        ("ring", math.pi * (1 - 0.55**2)),
        ("leaf", lens(1, 1, 1.2)),
        ("crescent", math.pi - lens(1, 0.75, 0.45)),
        ("heart", 4 * 0.6**2 + math.pi * 0.6**2),
    ],
)
def test_outlines_with_arcs_have_the_area_of_geometry(name, area):
    at = points(400_000)
    share = OUTLINES[name](at[:, 0], at[:, 1]).mean()
    error = math.sqrt(share * (1 - share) / len(at))
    assert abs(share - area / 16) < 4 * error


@pytest.mark.parametrize("name", OUTLINES)
def test_area_centre_and_extent_are_those_asked_for(name):
    drawn = coverage(OUTLINES[name], side=30.0, centre=(41.3, 52.8), angle=0.7, size=100)
    rows, columns = np.mgrid[drawn.rows, drawn.columns] + 0.5
    assert drawn.share.sum() == pytest.approx(900, rel=0.01)
    assert (columns * drawn.share).sum() / drawn.share.sum() == pytest.approx(41.3, abs=0.1)
    assert (rows * drawn.share).sum() / drawn.share.sum() == pytest.approx(52.8, abs=0.1)
    # Nothing is cut off by the window, and the farthest point is as near as pictures are laid out for.
    assert drawn.share[[0, -1]].max() == drawn.share[:, [0, -1]].max() == 0
    assert np.hypot(columns - 41.3, rows - 52.8)[drawn.share > 0].max() < 1.05 * 30 + 1


def test_coverage_is_the_share_of_sixteen_samples_in_each_pixel():
    side, centre, angle, size = 7.3, (9.2, 4.1), 0.4, 20
    drawn = coverage(OUTLINES["square"], side=side, centre=centre, angle=angle, size=size)
    whole = np.zeros((size, size))
    whole[drawn.rows, drawn.columns] = drawn.share
    for row in range(size):
        for column in range(size):
            inside = 0
            for down in (0.125, 0.375, 0.625, 0.875):
                for across in (0.125, 0.375, 0.625, 0.875):
                    offset = complex(column + across - centre[0], row + down - centre[1])
                    turned = offset * complex(math.cos(-angle), math.sin(-angle))
                    inside += max(abs(turned.real), abs(turned.imag)) < side / 2
            assert whole[row, column] == inside / 16


def test_what_leaves_the_picture_is_cut_off():
    whole = coverage(OUTLINES["disc"], side=10.0, centre=(20.0, 20.0), angle=0.0, size=40)
    corner = coverage(OUTLINES["disc"], side=10.0, centre=(0.0, 40.0), angle=0.0, size=40)
    assert corner.share.sum() == pytest.approx(whole.share.sum() / 4)
    assert (corner.rows.stop, corner.columns.start) == (40, 0)
    for place in (-50.0, 90.0):
        assert coverage(OUTLINES["disc"], side=10.0, centre=(place, 20.0), angle=0.0, size=40).share.sum() == 0
        assert coverage(OUTLINES["disc"], side=10.0, centre=(20.0, place), angle=0.0, size=40).share.sum() == 0


@pytest.mark.parametrize("name", CUTTABLE)
def test_the_two_halves_of_a_shape_make_it_whole(name):
    at = points()
    x, y = at[:, 0], at[:, 1]
    halves = [cut(OUTLINES[name], angle)(x, y) for angle in (0.3, 0.3 + math.pi)]
    assert not (halves[0] & halves[1]).any()
    np.testing.assert_array_equal(halves[0] | halves[1], OUTLINES[name](x, y))


def test_bars_and_blobs_have_the_area_of_geometry():
    at = points(400_000)
    amplitudes = np.array([0.3, 0.2, 0.1])
    for inside, area in (
        (bar, 1.5 * 0.5 + math.pi * 0.25**2),
        (blob(amplitudes, np.array([1.0, 2.0, 3.0])), math.pi * (1 + (amplitudes**2).sum() / 2)),
    ):
        share = inside(at[:, 0], at[:, 1]).mean()
        assert abs(share - area / 16) < 4 * math.sqrt(share * (1 - share) / len(at))
