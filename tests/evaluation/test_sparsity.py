import numpy as np
import pytest
import torch

from parchgrad.errors import InputError
from parchgrad.evaluation.sparsity import gini


def test_gini_is_half_the_relative_mean_difference():
    heat = torch.rand(3, 6, 7) ** torch.tensor([0.5, 2.0, 8.0]).reshape(3, 1, 1)
    for scale in (1.0, 1e-30, 1e30):
        for found, values in zip(gini(heat * scale), heat, strict=True):
            flat = values.double().flatten().numpy()
            expected = np.abs(flat[:, None] - flat[None, :]).mean() / (2 * flat.mean())
            assert found.item() == pytest.approx(expected, rel=1e-6)


def test_gini_at_its_ends():
    one = torch.zeros(1, 10, 10)
    one[0, 3, 3] = 5
    assert gini(one).item() == pytest.approx(0.99)
    assert gini(torch.full((1, 4, 4), 0.3)).item() == pytest.approx(0)
    assert gini(torch.stack((torch.zeros(4, 4), torch.full((4, 4), float("inf"))))).isnan().all()
    with pytest.raises(InputError, match="negative"):
        gini(-one)
