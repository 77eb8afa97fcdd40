import math

import numpy as np
import pytest
import torch

from parchgrad.errors import SettingError
from parchgrad.visual.teaching import checkerboard, checkerboard_figure, sum_directions


def test_strong_gradients_agree_and_weak_ones_do_not():
    found = sum_directions(strong=400, weak=4000, weakness=0.3, spread=0.2, seed=5)
    np.testing.assert_allclose(np.linalg.norm(found.strong, axis=1), 1)
    np.testing.assert_allclose(np.linalg.norm(found.weak, axis=1), 0.3)
    # The mean of cos(a), a normal with deviation s, is exp(-s^2 / 2); uniform directions have none.
    np.testing.assert_allclose(found.strong.mean(axis=0), [np.exp(-0.02), 0], atol=0.03)
    np.testing.assert_allclose(found.weak.mean(axis=0), [0, 0], atol=0.02)


def test_the_sum_of_weak_gradients_grows_with_the_root_of_their_number():
    sums = [sum_directions(weak=100, weakness=0.5, seed=seed).weak.sum(axis=0) for seed in range(300)]
    assert np.sqrt(np.square(sums).sum(axis=1).mean()) == pytest.approx(5, rel=0.1)


def test_the_deviation_is_the_angle_between_the_sums():
    found = sum_directions(seed=7)
    wanted = complex(*found.strong.sum(axis=0))
    whole = wanted + complex(*found.weak.sum(axis=0))
    assert found.deviation == pytest.approx(abs(np.degrees(np.angle(whole / wanted))))
    axes = found.figure().axes[0]
    np.testing.assert_allclose(np.array(axes.lines[1].get_xydata())[-1], [whole.real, whole.imag])


def test_the_figure_of_the_documentation_is_typical():
    assert round(sum_directions().deviation) == 17
    deviations = [sum_directions(seed=seed).deviation for seed in range(4000)]
    # As the documentation says.
    assert np.percentile(deviations, [50, 90]) == pytest.approx([15, 41], abs=1)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 2), (2, 2), (3, 2), (4, 2), (3, 1), (5, 3), (2, 3)])
def test_a_checkerboard_is_the_gradient_of_a_strided_convolution(kernel, stride):
    size, windows = 4, 12
    x = torch.zeros(1, 1, kernel + stride * (windows - 1), kernel + stride * (windows - 1), dtype=torch.float64)
    x.requires_grad_()
    weight = torch.full((1, 1, kernel, kernel), 1 / kernel**2, dtype=torch.float64)
    (torch.nn.functional.conv2d(x, weight, stride=stride).sum() * 3).backward()
    inner = slice(4 * stride, (4 + size) * stride)
    expected = x.grad[0, 0, inner, inner].numpy()
    np.testing.assert_allclose(checkerboard(kernel=kernel, stride=stride, magnitude=3, size=size), expected)
    # Even where the stride divides the kernel.
    assert (expected.std() < 1e-12) == (kernel % stride == 0)


def test_boards_share_one_scale():
    figure = checkerboard_figure(geometries=[(3, 2), (3, 1)], magnitudes=[1, 2])
    images = [axes.images[0] for axes in figure.axes[:4]]
    assert [image.get_clim() for image in images] == [pytest.approx((0, 2))] * 4
    np.testing.assert_allclose(images[2].get_array(), 2 * np.asarray(images[0].get_array()))


def test_settings_out_of_range():
    for wrong in (
        *({"strong": 0}, {"weak": 0}, {"weakness": 0}, {"spread": -1}, {"strong": 1.5}),
        *({name: value} for name in ("strong", "weak", "weakness", "spread") for value in (math.nan, math.inf)),
    ):
        ((name, value),) = wrong.items()
        with pytest.raises(SettingError, match=f"`{name}` is {value}"):
            sum_directions(**wrong)
    for kernel in (0, 1.5, math.nan):
        with pytest.raises(SettingError, match="`kernel` is"):
            checkerboard(kernel=kernel, stride=1)
    for magnitude in (0, -1.0, math.nan, math.inf):
        with pytest.raises(SettingError, match="`magnitude` is"):
            checkerboard(kernel=3, stride=2, magnitude=magnitude)
        with pytest.raises(SettingError, match="`magnitude` is"):
            checkerboard_figure(magnitudes=(1.0, magnitude))
    with pytest.raises(SettingError, match="`geometries`"):
        checkerboard_figure(geometries=[])
