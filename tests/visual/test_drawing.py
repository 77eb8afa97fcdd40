import numpy as np
import pytest

from parchgrad.visual import draw_box, panel


def test_a_box_surrounds_its_pixels():
    figure = panel([np.zeros((8, 12, 3))], {"a": [np.ones((8, 12))]})
    # The pixels in columns 3 to 6 and rows 2 to 4; their centres are whole numbers.
    draw_box(figure.axes[1], (3, 2, 7, 5))
    (frame,) = figure.axes[1].patches
    inside = [[frame.get_bbox().contains(column, row) for column in range(12)] for row in range(8)]
    expected = np.zeros((8, 12), dtype=bool)
    expected[2:5, 3:7] = True
    np.testing.assert_array_equal(inside, expected)
    assert frame.get_bbox().width == pytest.approx(4)
