import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from parchgrad.data.samples import Sample
from parchgrad.errors import InputError
from parchgrad.evaluation.grid_pointing import Mosaics, make_mosaics
from parchgrad.evaluation.localisation import cell_shares, mass_inside


class Bright(Dataset):
    """Images of which each has one bright channel, by which a classifier may tell its class; every third is dim."""

    fingerprint = "bright"
    categories = ("a", "b", "c", "d", "e")

    def __len__(self):
        return 30

    def __getitem__(self, index):
        image = 0.1 * torch.rand(5, 4, 6, generator=torch.Generator().manual_seed(index))
        image[index % 5] += 0.2 if index % 3 == 0 else 5
        return Sample(image=image, label=index % 5, name=f"image {index}")


def classifier():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 5)).eval().requires_grad_(False)


@pytest.fixture
def model():
    found = classifier()
    found[2].weight.copy_(2 * torch.eye(5))
    found[2].bias.zero_()
    return found


def test_every_item_shows_its_class_in_its_own_cell(model):
    data = Bright()
    mosaics = make_mosaics(model, data, count=3, rows=2, columns=2, seed=1)
    assert len(mosaics) == 12
    used = set()
    for index in range(12):
        item = mosaics[index]
        assert item.image.shape == (5, 8, 12)
        assert item.mask.sum() == 24
        inside = item.image[:, item.mask].reshape(5, 4, 6)
        source = int(item.name.rsplit(" ", 1)[1])
        assert torch.equal(inside, data[source].image)
        assert item.label == source % 5
        assert source % 3 != 0, "only images that the classifier is sure of"
        used.add(source)
        assert torch.equal(item.image, mosaics[index // 4 * 4].image)
    assert len(used) == 12
    assert len({mosaics[index].name for index in range(12)}) == 12
    assert mosaics[-1].name == mosaics[11].name


def test_the_mass_in_the_mask_is_the_share_of_the_cell(model):
    mosaics = make_mosaics(model, Bright(), count=2)
    heat = torch.rand(8, 8, 12)
    inside = mass_inside(heat, torch.stack([mosaics[index].mask for index in range(8)]))
    shares = cell_shares(heat, rows=2, columns=2)[torch.arange(8), torch.arange(4).repeat(2)]
    torch.testing.assert_close(inside.float(), shares)


def test_fingerprints_tell_draws_apart(model):
    def fingerprint(**options):
        return make_mosaics(model, Bright(), count=2, **options).fingerprint

    assert fingerprint() == fingerprint()
    assert len({fingerprint(), fingerprint(seed=1), fingerprint(rows=1), fingerprint(rows=1, columns=4)}) == 4
    assert make_mosaics(model, Bright(), count=1).categories == Bright.categories


def test_mosaics_that_cannot_be_made(model):
    with pytest.raises(InputError, match=r"`count` is 20, .* 5 mosaics .* 20 images of 5 classes"):
        make_mosaics(model, Bright(), count=20)
    with pytest.raises(InputError, match="does not fill mosaics of 2 x 2"):
        Mosaics(Bright(), torch.zeros(3, 5, dtype=torch.long), rows=2, columns=2)
    with pytest.raises(IndexError):
        make_mosaics(model, Bright(), count=1)[4]
