import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps
from timm.data import create_transform
from torch import nn
from torchvision import transforms
from torchvision.transforms import v2
from torchvision.transforms._presets import ImageClassification

from parchgrad.data.geometry import Placement, find_placement, turn_boxes
from parchgrad.data.preprocessing import Preprocessing
from parchgrad.errors import SettingError

STANDARD = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
TO_INPUT = v2.Compose([v2.CenterCrop((70, 50)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
TRANSFORMS = {
    "torchvision": ImageClassification(crop_size=56, resize_size=64, **STANDARD),
    "torchvision, odd": ImageClassification(crop_size=57, resize_size=63, **STANDARD),
    "torchvision, padded": ImageClassification(crop_size=61, resize_size=40, **STANDARD),
    "timm, centre": create_transform((3, 56, 56), crop_pct=0.9, **STANDARD),
    "timm, whole": create_transform((3, 56, 56), crop_pct=1.0, interpolation="bicubic", **STANDARD),
    "timm, oblong": create_transform((3, 48, 65), crop_pct=0.875, **STANDARD),
    "timm, squash": create_transform((3, 48, 65), crop_pct=0.95, crop_mode="squash", **STANDARD),
    "timm, border": create_transform((3, 56, 57), crop_pct=0.95, crop_mode="border", **STANDARD),
    "nested": Preprocessing(transforms.Compose([nn.Sequential(v2.Resize(60, max_size=77)), TO_INPUT]), (0,), (1,)),
    "cropped, then resized twice": transforms.Compose(
        [transforms.CenterCrop((90, 130)), transforms.Resize((80, 60)), transforms.Resize(75), transforms.ToTensor()]
    ),
    "crop alone, both padded and cut": transforms.Compose([transforms.CenterCrop((201, 90)), transforms.ToTensor()]),
}
SIZES = [(300, 200), (151, 227), (160, 160), (40, 31), (33, 50), (500, 99)]


def drawn(width, height, box):
    """A black photograph with one white box."""
    photograph = Image.new("RGB", (width, height))
    left, top, right, bottom = box
    ImageDraw.Draw(photograph).rectangle((left, top, right - 1, bottom - 1), fill="white")
    return photograph


def found(picture):
    """The tight box about what is bright in a picture (3, H, W), shape (N, 4) with N 0 or 1."""
    rows, columns = (np.flatnonzero(np.asarray(picture[0] > 0.5).any(axis)) for axis in (1, 0))
    if not len(rows):
        return torch.empty(0, 4)
    return torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], dtype=torch.float32)


def carried(transform, width, height, box):
    placement = find_placement(transform, width=width, height=height)
    return placement, placement.carry(torch.tensor([box], dtype=torch.float32))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_carried_box_is_where_the_rectangle_is_seen(name, size):
    transform, (width, height) = TRANSFORMS[name], size
    for shares in ((0.4, 0.3, 0.6, 0.8), (0.0, 0.0, 0.55, 0.5), (0.45, 0.5, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)):
        box = tuple(round(share * side) for share, side in zip(shares, (width, height) * 2, strict=True))
        picture = transform(drawn(width, height, box))
        placement, boxes = carried(transform, width, height, box)
        assert (placement.width, placement.height) == (picture.shape[2], picture.shape[1])
        seen = found(picture)
        assert len(seen) == len(boxes) == 1
        torch.testing.assert_close(boxes, seen, atol=1.0, rtol=0)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(20, 200),
    st.integers(20, 200),
    st.integers(8, 120),
    st.integers(8, 120),
    st.integers(0, 1000),
)
def test_a_crop_or_a_padding_moves_the_box_by_whole_pixels(width, height, across, down, place):
    transform = transforms.Compose([transforms.CenterCrop((down, across)), transforms.ToTensor()])
    left, top = place % (width - 3), place % (height - 3)
    box = (left, top, left + 1 + place % 3, top + 3)
    assert torch.equal(carried(transform, width, height, box)[1], found(transform(drawn(width, height, box))))


def test_what_is_wholly_cropped_away_leaves_no_box():
    transform = TRANSFORMS["torchvision"]
    box = (0, 0, 40, 200)
    assert len(found(transform(drawn(300, 200, box)))) == 0
    assert carried(transform, 300, 200, box)[1].shape == (0, 4)
    assert Placement(width=5, height=5).carry(torch.empty(0, 4)).shape == (0, 4)


def test_boxes_are_clipped_and_stay_in_order():
    placement = Placement(scale=(2.0, 1.0), shift=(-4.0, 3.0), width=20, height=10)
    boxes = torch.tensor([[3.0, 1.0, 5.0, 2.0], [0.0, 0.0, 2.0, 5.0], [0.0, -9.0, 90.0, 90.0]])
    assert placement.carry(boxes).tolist() == [[2.0, 4.0, 6.0, 5.0], [0.0, 0.0, 20.0, 10.0]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_as_pillow_turns_the_photograph(orientation):
    photograph = drawn(30, 20, (3, 5, 10, 7))
    photograph.getexif()[0x0112] = orientation
    turned = ImageOps.exif_transpose(photograph)
    expected = found(transforms.functional.to_tensor(turned))
    box = torch.tensor([[3.0, 5.0, 10.0, 7.0]])
    assert torch.equal(turn_boxes(box, orientation=orientation, width=30, height=20), expected)


class OtherCrop(transforms.CenterCrop):
    """A subclass may do anything."""


class Normalize(nn.Module):
    """Has the name of a known step, but is none."""


@pytest.mark.parametrize(
    "step",
    [transforms.RandomCrop(5), OtherCrop(5), Normalize(), transforms.FiveCrop(5), abs, v2.RandomHorizontalFlip()],
)
def test_other_steps_are_refused(step):
    with pytest.raises(SettingError, match="preprocessing step"):
        find_placement(transforms.Compose([transforms.Resize(9), step]), width=20, height=10)


def test_a_random_resize_of_timm_is_refused():
    training = create_transform((3, 24, 24), is_training=True)
    with pytest.raises(SettingError, match="RandomResizedCrop"):
        find_placement(training, width=30, height=40)


def test_a_padding_after_a_crop_is_refused():
    crops = transforms.Compose([transforms.CenterCrop((30, 20)), transforms.CenterCrop((28, 25))])
    with pytest.raises(SettingError, match="crops the image and then pads it"):
        find_placement(crops, width=40, height=40)
    # Nothing was cut off the side that is padded.
    assert find_placement(crops, width=20, height=40) == Placement(shift=(2.0, -6.0), width=25, height=28)
