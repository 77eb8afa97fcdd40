import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.transforms import CenterCrop, Compose, RandomCrop, ToTensor
from torchvision.transforms._presets import ImageClassification

from parchgrad.data.imagenet import BoxedFolder
from parchgrad.errors import ImageError, SettingError

CLASSES = {"categories": ("ray", "hen", "crane"), "synsets": ("n01", "n02", "n03")}
OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def annotation(name, size, *objects):
    """An annotation as ILSVRC's: objects are (synset, xmin, ymin, xmax, ymax), counted from 1 with both ends."""
    return (
        f"<annotation><folder>val</folder><filename>{name}</filename>"
        f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
        f"{''.join(OBJECT.format(*item) for item in objects)}</annotation>"
    )


def place(root, file, size=(40, 30), box=(11, 6, 20, 25), orientation=1):
    """A black photograph with a white box, given as ILSVRC does."""
    photograph, exif = Image.new("RGB", size), Image.Exif()
    ImageDraw.Draw(photograph).rectangle([side - 1 for side in box], fill="white")
    exif[0x0112] = orientation
    path = root / "photographs" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    photograph.save(path, exif=exif)
    return path


def write(root, file, text):
    path = root / "boxes" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def load(root, transform=None, **options):
    return BoxedFolder(root / "photographs", root / "boxes", transform or ToTensor(), **{**CLASSES, **options})


def found(picture):
    """The tight box about what is bright in a picture (3, H, W)."""
    rows, columns = (np.flatnonzero(np.asarray(picture[0] > 0.5).any(axis)) for axis in (1, 0))
    return torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], dtype=torch.float32)


def test_every_box_is_on_its_own_photograph_whatever_the_order_of_the_files(tmp_path):
    numbers = list(range(12))
    random.Random(3).shuffle(numbers)
    for position, number in enumerate(numbers):
        name, synset = f"val_{number:04}", CLASSES["synsets"][position % 3]
        size = (90 + 7 * number, 120 - 5 * number)
        box = (30 + 2 * number, 31 + number, 55 + number, 60 - number)
        place(tmp_path, f"{synset}/{name}.png", size, box)
        write(tmp_path, f"{number % 2}/{number % 3}/{name}.XML", annotation(name, size, (synset, *box)))
    photographs = load(tmp_path, ImageClassification(crop_size=56, resize_size=64, mean=(0, 0, 0), std=(1, 1, 1)))
    assert len(photographs) == 12
    for sample in (photographs[index] for index in range(12)):
        assert CLASSES["synsets"][sample.label] == sample.name.split("/")[0]
        torch.testing.assert_close(sample.boxes, found(sample.image), atol=1.0, rtol=0)
    assert len({sample.name for sample in (photographs[index] for index in range(12))}) == 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_with_their_photograph(tmp_path, orientation):
    place(tmp_path, "n02/a.png", (40, 30), (3, 6, 10, 25), orientation)
    write(tmp_path, "a.xml", annotation("a", (40, 30), ("n02", 3, 6, 10, 25)))
    sample = load(tmp_path)[0]
    assert sample.image.shape == ((3, 30, 40) if orientation < 5 else (3, 40, 30))
    assert torch.equal(sample.boxes, found(sample.image))


def test_an_annotation_of_the_turned_photograph_is_taken_as_it_is(tmp_path):
    place(tmp_path, "n02/a.png", (40, 30), orientation=6)
    write(tmp_path, "a.xml", annotation("a", (30, 40), ("n02", 1, 2, 3, 4)))
    assert load(tmp_path)[0].boxes.tolist() == [[0.0, 1.0, 3.0, 4.0]]


def test_coordinates_count_from_one_with_both_ends(tmp_path):
    place(tmp_path, "n01/a.png")
    boxes = [("n01", 1, 1, 40, 30), ("n01", 5, 5, 5, 5), ("n01", 0, 0, 2, 3)]
    write(tmp_path, "a.xml", annotation("a", (40, 30), *boxes))
    assert load(tmp_path)[0].boxes.tolist() == [[0, 0, 40, 30], [4, 4, 5, 5], [0, 0, 2, 3]]


def test_objects_of_other_classes_are_left_out_but_checked(tmp_path):
    place(tmp_path, "n01/a.png")
    objects = [("n03", 1, 1, 9, 9), ("n01", 2, 2, 8, 8), ("n99", 3, 3, 7, 7)]
    write(tmp_path, "a.xml", annotation("a", (40, 30), *objects))
    assert load(tmp_path)[0].boxes.tolist() == [[1, 1, 8, 8]]
    write(tmp_path, "a.xml", annotation("a", (40, 30), *objects, ("n03", 1, 1, 99, 9)))
    with pytest.raises(ImageError, match="outside of its image"):
        load(tmp_path)[0]


def test_boxes_are_clipped_to_what_the_network_sees(tmp_path):
    place(tmp_path, "n01/a.png")
    crop = Compose([CenterCrop(10), ToTensor()])
    # The crop begins 15 pixels from the left and 10 from the top.
    write(tmp_path, "a.xml", annotation("a", (40, 30), ("n01", 1, 1, 15, 30), ("n01", 19, 14, 40, 15)))
    assert load(tmp_path, crop)[0].boxes.tolist() == [[3, 3, 10, 5]]
    write(tmp_path, "a.xml", annotation("a", (40, 30), ("n01", 1, 1, 15, 30)))
    assert load(tmp_path, crop)[0].boxes.shape == (0, 4)


BOX = ("n02", 11, 6, 20, 25)
LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
WRONG = {
    "another name": (annotation("b", (40, 30), BOX), "belongs to 'b'"),
    "another suffix": (annotation("a.png", (40, 30), BOX), r"belongs to 'a\.png'"),
    "no name": ("<annotation><size/></annotation>", "has 0 <filename>"),
    "another size": (annotation("a", (41, 30), BOX), r"of 41 x 30 pixels, but '.*a\.png' has 40 x 30"),
    "sides swapped": (annotation("a", (30, 40), BOX), r"of 30 x 40 pixels, but '.*a\.png' has 40 x 30"),
    "outside": (annotation("a", (40, 30), ("n02", 11, 6, 41, 25)), r"outside of its image \(11, 6, 41, 25\)"),
    "below": (annotation("a", (40, 30), ("n02", 11, 6, 20, 31)), "outside of its image"),
    "empty": (annotation("a", (40, 30), ("n02", 11, 6, 10, 25)), r"an empty box \(11, 6, 10, 25\)"),
    "empty at 0": (annotation("a", (40, 30), ("n02", 3, 0, 10, 0)), "an empty box"),
    "negative": (annotation("a", (40, 30), ("n02", -1, 6, 10, 25)), "has '-1' as <xmin>"),
    "not a number": (annotation("a", (40, 30), ("n02", "nan", 6, 10, 25)), "has 'nan' as <xmin>"),
    "fraction": (annotation("a", (40, 30), ("n02", 1, 6.5, 10, 25)), r"has '6\.5' as <ymin>"),
    "nothing": (annotation("a", (40, 30), ("n02", 1, "", 10, 25)), "has '' as <ymin>"),
    "endless": (annotation("a", (40, 30), ("n02", 1, 1, "9" * 5000, 25)), "has '9{40}' as <xmax>"),
    "size in words": (annotation("a", ("forty", 30), BOX), "has 'forty' as <width>"),
    "two sizes": (annotation("a", (40, 30), BOX).replace("<size>", "<size/><size>"), "has 2 <size>"),
    "no box": (annotation("a", (40, 30)).replace("</annotation>", "<object/></annotation>"), "0 <bndbox>"),
    "another class alone": (annotation("a", (40, 30), ("n01", 11, 6, 20, 25)), "no object of class n02"),
    "no object": (annotation("a", (40, 30)), "no object of class n02"),
    "cut off": (annotation("a", (40, 30), BOX)[:-20], "is not plain XML"),
    "no content": ("", "is not plain XML"),
    "unknown encoding": ('<?xml version="1.0" encoding="klingon"?><annotation/>', "is not plain XML"),
    "billion laughs": (f'<!DOCTYPE a [<!ENTITY l0 "ha">{LAUGHS}]><annotation>&l9;</annotation>', "is not plain XML"),
    "external entity": (
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]>' + annotation("&x;", (40, 30), BOX),
        "is not plain XML",
    ),
    "DTD from elsewhere": (
        '<!DOCTYPE annotation SYSTEM "http://example.invalid/a.dtd">' + annotation("a", (40, 30), BOX),
        "is not plain XML",
    ),
    "too large": (annotation("a", (40, 30), BOX) + " " * 2**20, "is larger than 1 MiB"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_annotation_that_does_not_fit_is_named_in_one_sentence(tmp_path, case):
    text, words = WRONG[case]
    place(tmp_path, "n02/a.png")
    write(tmp_path, "a.xml", annotation("a", (40, 30), BOX))
    assert torch.equal(load(tmp_path)[0].boxes, found(load(tmp_path)[0].image))
    write(tmp_path, "a.xml", text)
    with pytest.raises(ImageError, match=rf"^The annotation '.*a\.xml' .*{words}") as raised:
        load(tmp_path)[0]
    assert "\n" not in str(raised.value)


def test_boxes_of_another_photograph_are_never_taken(tmp_path):
    # The same class and room for either box: name and size alone tell them apart.
    sizes = {"a": (40, 30), "b": (41, 30), "c": (40, 31)}
    texts = {name: annotation(name, size, BOX) for name, size in sizes.items()}
    for name, size in sizes.items():
        place(tmp_path, f"n02/{name}.png", size)
    for own, other in itertools.permutations(sizes, 2):
        for name in sizes:
            write(tmp_path, f"{name}.xml", texts[name])
        photographs = load(tmp_path)
        write(tmp_path, f"{own}.xml", texts[other])
        with pytest.raises(ImageError, match=rf"'.*{own}\.xml' belongs to '{other}', not to '{own}'"):
            photographs["abc".index(own)]
        write(tmp_path, f"{own}.xml", texts[other].replace(f">{other}<", f">{own}<"))
        wrong, right = (" x ".join(map(str, sizes[name])) for name in (other, own))
        with pytest.raises(ImageError, match=rf"'.*{own}\.xml' .* {wrong} pixels, but '.*{own}\.png' has {right}\."):
            photographs["abc".index(own)]


def test_photographs_without_annotation(tmp_path):
    for name in ("n02/a.png", "n02/b.png", "n03/c.png"):
        place(tmp_path, name)
    write(tmp_path, "b.xml", annotation("b", (40, 30), BOX))
    write(tmp_path, "of_a_photograph_left_out.xml", "<unread")
    with pytest.raises(ImageError, match=r"2 images have no XML file, .* '.*a\.png'"):
        load(tmp_path)
    photographs = load(tmp_path, allow_unannotated=True)
    assert (photographs.unannotated, photographs.unused) == (2, 1)
    assert [photographs[index].boxes is None for index in range(3)] == [True, False, True]


def test_folders_that_do_not_belong_together(tmp_path):
    place(tmp_path, "n02/a.png")
    with pytest.raises(ImageError, match=r"There is no folder '.*boxes'"):
        load(tmp_path)
    (tmp_path / "boxes").mkdir()
    with pytest.raises(ImageError, match="contains no XML files"):
        load(tmp_path)
    write(tmp_path, "b.xml", annotation("b", (40, 30), BOX))
    with pytest.raises(ImageError, match="None of the 1 XML files"):
        load(tmp_path, allow_unannotated=True)
    write(tmp_path, "a.xml", annotation("a", (40, 30), BOX))
    write(tmp_path, "again/a.xml", annotation("a", (40, 30), BOX))
    with pytest.raises(ImageError, match=r"a\.xml' and '.*a\.xml' have the same name"):
        load(tmp_path)
    (tmp_path / "boxes" / "again" / "a.xml").unlink()
    place(tmp_path, "n03/a.jpg")
    with pytest.raises(ImageError, match=r"a\.png' and '.*a\.jpg' have the same name"):
        load(tmp_path)


def test_settings_that_cannot_work_are_refused_at_once(tmp_path):
    place(tmp_path, "n02/a.png")
    write(tmp_path, "a.xml", annotation("a", (40, 30), BOX))
    with pytest.raises(SettingError, match="There are 0 WordNet ids for 3 classes"):
        load(tmp_path, synsets=())
    with pytest.raises(SettingError, match="RandomCrop"):
        load(tmp_path, Compose([RandomCrop(5), ToTensor()]))


def test_the_fingerprint_follows_annotations_classes_and_preprocessing(tmp_path):
    place(tmp_path, "n02/a.png")
    path = write(tmp_path, "a.xml", annotation("a", (40, 30), BOX))
    first = load(tmp_path).fingerprint
    assert load(tmp_path).fingerprint == first
    others = {load(tmp_path, Compose([CenterCrop(20), ToTensor()])).fingerprint}
    others.add(load(tmp_path, categories=("ray", "hen", "stork")).fingerprint)
    path.write_text(annotation("a", (40, 30), ("n02", 11, 6, 20, 24)))
    others.add(load(tmp_path).fingerprint)
    assert len(others | {first}) == 4


def test_the_default_device_does_not_matter(tmp_path):
    place(tmp_path, "n02/a.png")
    write(tmp_path, "a.xml", annotation("a", (40, 30), ("n02", 11, 6, 20, 25)))
    with torch.device("meta"):
        (sample,) = load(tmp_path)
    assert torch.equal(sample.boxes, found(sample.image))
