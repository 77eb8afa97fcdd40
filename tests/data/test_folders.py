import os
from pathlib import Path

import pytest
from PIL import Image

from parchgrad.data.folders import PhotographFolder, match_classes
from parchgrad.data.images import find_files
from parchgrad.errors import ImageError
from tests.support import needs_links


def to_colour(image):
    return image.getpixel((0, 0))


def make(root, *names):
    for index, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (index, 0, 0)).save(path)
    return root


def test_a_folder_for_each_class(tmp_path):
    make(tmp_path, "dog/b.png", "cat/x/z.png", "cat/a.PNG", ".cache/hidden.png", "cat/.hidden.png")
    (tmp_path / "cat" / "notes.txt").write_text("no photograph")
    photographs = PhotographFolder(tmp_path, to_colour)
    assert [file.relative_to(tmp_path).as_posix() for file in photographs.files] == [
        "cat/a.PNG",
        "cat/x/z.png",
        "dog/b.png",
    ]
    assert photographs.folders == ("cat", "dog")
    assert photographs[2] == (0, 0, 0)
    labelled = photographs.with_classes({"cat": 5, "dog": 2})
    assert [labelled[index] for index in range(3)] == [((2, 0, 0), 5), ((1, 0, 0), 5), ((0, 0, 0), 2)]
    assert photographs.labels is None


def test_photographs_outside_of_class_folders(tmp_path):
    assert PhotographFolder(make(tmp_path, "a.png", "cat/b.png"), to_colour).folders == ()


@needs_links
def test_links_are_followed_but_not_in_circles(tmp_path):
    make(tmp_path / "elsewhere", "one/b.png")
    make(tmp_path / "root", "cat/a.png")
    os.symlink(tmp_path / "elsewhere" / "one", tmp_path / "root" / "dog")
    os.symlink(tmp_path / "root", tmp_path / "root" / "cat" / "back")
    assert PhotographFolder(tmp_path / "root", to_colour).folders == ("cat", "dog")
    assert len(PhotographFolder(tmp_path / "root", to_colour)) == 2


# Folders are listed in any order, by when they were made among others.
@needs_links
def test_two_classes_of_one_folder_are_said(tmp_path):
    make(tmp_path, "elsewhere/a.png")
    (tmp_path / "root").mkdir()
    for name in ("cat", "dog"):
        os.symlink(tmp_path / "elsewhere", tmp_path / "root" / name)
    photographs = PhotographFolder(tmp_path / "root", to_colour)
    with pytest.raises(ImageError, match=r"class folders 'cat' and 'dog' in .* are the same"):
        photographs.with_classes({"cat": 0})


@needs_links
@pytest.mark.parametrize("backwards", [False, True])
def test_links_lead_to_the_same_files_in_whatever_order_folders_are_listed(tmp_path, monkeypatch, backwards):
    make(tmp_path / "root", "a/1.png", "b/2.png", "c/3.png")
    make(tmp_path / "elsewhere", "4.png", "5/6.png")
    for link, place in (
        ("b/link", "root/a"),
        ("a/link", "root/b"),
        ("c/out", "elsewhere"),
        ("a/out", "elsewhere"),
        ("b/in", "elsewhere/5"),
    ):
        os.symlink(tmp_path / place, tmp_path / "root" / link)
    walk = os.walk

    def listed(*arguments, **options):
        for folder, inner, names in walk(*arguments, **options):
            inner.sort(reverse=backwards)
            yield folder, inner, names

    monkeypatch.setattr(os, "walk", listed)
    found = [file.relative_to(tmp_path / "root").as_posix() for file in find_files(tmp_path / "root", (".png",))]
    assert found == ["a/1.png", "a/out/4.png", "a/out/5/6.png", "b/2.png", "c/3.png"]


def test_the_fingerprint_follows_the_content(tmp_path):
    make(tmp_path, "cat/a.png", "dog/b.png")
    plain = PhotographFolder(tmp_path, to_colour)
    first = plain.with_classes({"cat": 0, "dog": 1})
    fingerprints = {plain.fingerprint, first.fingerprint, first.with_classes({"cat": 1, "dog": 0}).fingerprint}
    fingerprints.add(PhotographFolder(tmp_path, str).fingerprint)
    Image.new("RGB", (400, 300)).save(tmp_path / "dog" / "b.png")
    fingerprints.add(plain.fingerprint)
    assert len(fingerprints) == 5
    assert plain.fingerprint == PhotographFolder(tmp_path, to_colour).fingerprint


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(ImageError, match="There is no folder"):
        PhotographFolder(tmp_path / "none", to_colour)
    with pytest.raises(ImageError, match="contains no images"):
        PhotographFolder(tmp_path, to_colour)


CATEGORIES = ("great white shark", "Tabby", "crane", "crane", "half-track")
SYNSETS = ("n1", "n2", "n3", "n4", "n5")


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["n2", "n5"], ({"n2": 1, "n5": 4}, "WordNet id")),
        (["Great_White_Shark", "half track"], ({"Great_White_Shark": 0, "half track": 4}, "category")),
        (["0", "4"], ({"0": 0, "4": 4}, "index")),
        (["000", "004"], ({"000": 0, "004": 4}, "index")),
        (["a", "b", "c", "d", "e"], ({"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}, "order")),
    ],
)
def test_how_folders_are_matched(folders, expected):
    assert match_classes(folders, CATEGORIES, SYNSETS) == expected


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (["crane", "tabby"], "'crane'"),
        (["n1", "Tabby"], "mix naming"),
        (["Tabby", "tabby"], "same class"),
        (["x", "y"], "'x'"),
        # As many as the classes, but one name, or numbers from one, say that the order is another.
        (["Tabby", "b", "c", "d", "e"], "'b'"),
        (["1", "2", "3", "4", "5"], "'5'"),
        # Sorted as text, not as numbers.
        (["c1", "c10", "c2", "c3", "c4"], "'c1'"),
    ],
)
def test_folders_that_do_not_tell_their_class(folders, words):
    with pytest.raises(ImageError, match=f"class folders do not match the model's 5 classes .*{words}"):
        match_classes(folders, CATEGORIES, SYNSETS)


def test_content_of_the_same_size_is_told_apart(tmp_path):
    fingerprints = set()
    for colour in ("red", "blue"):
        Image.new("RGB", (4, 3), colour).save(tmp_path / "a.bmp")
        fingerprints.add(PhotographFolder(tmp_path, to_colour).fingerprint)
    assert len(fingerprints) == 2


def test_a_function_as_transform_has_the_same_fingerprint_everywhere(tmp_path):
    make(tmp_path, "a.png")
    one, two = (PhotographFolder(tmp_path, eval("lambda image: image")) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    white, black = (PhotographFolder(tmp_path, eval(f"lambda image: {value}")).fingerprint for value in (1, 0))
    assert white != black


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    make(tmp_path, "a.png")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ImageError, match=r"a\.png' \(Permission denied\)"):
        _ = PhotographFolder(tmp_path, to_colour).fingerprint
