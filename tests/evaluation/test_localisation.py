import pytest
import torch

from parchgrad.errors import InputError
from parchgrad.evaluation.localisation import cell_shares, mosaic


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


def test_maps_that_do_not_fit():
    with pytest.raises(InputError, match="do not divide into 2 x 2"):
        cell_shares(torch.zeros(1, 5, 4), rows=2, columns=2)
    with pytest.raises(InputError, match="negative"):
        cell_shares(torch.full((1, 4, 4), -1.0), rows=2, columns=2)
