import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

import parchgrad as pg
from parchgrad.data.folders import PhotographFolder
from parchgrad.data.images import read_image, stored_frame, to_rgb
from parchgrad.errors import ImageError


def gradient_picture():
    return np.linspace(0, 255, 12 * 20 * 3).reshape(12, 20, 3).astype(np.uint8)


def test_rgb_is_read_as_it_is(tmp_path):
    Image.fromarray(gradient_picture()).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), gradient_picture())


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(gradient_picture()).convert(mode).save(path)
    assert read_image(path).mode == "RGB"


def test_sixteen_bits_are_scaled(tmp_path):
    values = (np.arange(240).reshape(12, 20) * 257).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    found = np.asarray(read_image(tmp_path / "a.png"))
    assert np.array_equal(found[..., 0], np.arange(240).reshape(12, 20))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.arange(64, dtype=np.int32), np.arange(64)),
        (np.linspace(0, 1, 52, dtype=np.float32), np.arange(52) * 5),
        (np.arange(0, 65536, 257, dtype=np.int32), np.arange(256)),
    ],
)
def test_wide_numbers_keep_their_meaning(tmp_path, values, expected):
    Image.fromarray(values[None]).save(tmp_path / "a.tif")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.tif"))[0, :, 1], expected)


# The brightness of a pixel must not depend on one other pixel that is a little brighter.
@pytest.mark.parametrize("brightest", [0, 1, 1.2, 100, 255, 255.4, 300])
def test_an_overshoot_does_not_darken_floating_point_numbers(brightest):
    values = np.array([[0, 0.5, 1, 128, 255, brightest]], dtype=np.float32)
    assert np.asarray(to_rgb(Image.fromarray(values)))[0, :5, 0].tolist() == [0, 0, 1, 128, 255]
    small = np.array([[-0.1, 0, 0.5, 1, min(brightest, 1.2)]], dtype=np.float32)
    assert np.asarray(to_rgb(Image.fromarray(small)))[0, :4, 0].tolist() == [0, 0, 128, 255]


@pytest.mark.parametrize("most", [255, 1023, 4095, 65535])
def test_a_portable_grey_map_says_what_white_is(tmp_path, most):
    for brightest in (200, 255, min(300, most), most):
        values = np.array([0, 100, brightest], dtype=np.uint8 if most == 255 else ">u2")
        (tmp_path / "a.pgm").write_bytes(b"P5 3 1 %d\n" % most + values.tobytes())
        found = np.asarray(read_image(tmp_path / "a.pgm"))[0, :, 0]
        assert np.array_equal(found, np.rint(values.astype(float) * 255 / most))


def test_integers_of_all_32_bits_are_scaled():
    values = np.linspace(0, 2**31 - 1, 256).astype(np.int32)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(values[None])))[0, :, 2], np.arange(256))


@pytest.mark.parametrize(("mode", "whole"), [("La", "LA"), ("RGBa", "RGBA")])
def test_premultiplied_colours_lie_on_white(mode, whole):
    half = Image.new("RGBA", (1, 1), (200, 200, 200, 51)).convert(whole)
    assert np.allclose(to_rgb(half.convert(mode)).getpixel((0, 0)), 244, atol=1)


def test_transparency_lies_on_white(tmp_path):
    Image.new("RGBA", (2, 1), (200, 0, 0, 0)).save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png")).tolist() == [[[255, 255, 255]] * 2]


def test_whatever_a_decoder_raises_is_one_sentence(tmp_path, monkeypatch):
    def fail(*arguments):
        raise NotImplementedError("Unimplemented pixel format")

    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(ImageError, match=r"Unimplemented pixel format"):
        read_image(tmp_path / "a.png")


# What CIPA DC-008 says of each orientation, as steps from the stored pixels to those that are seen.
TURNS = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).transpose(1, 0, 2),
    8: np.rot90,
}


# Which of them Pillow would map into memory, were it given a path.
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("orientation", TURNS)
def test_uncompressed_pixels_of_any_mode_were_turned(tmp_path, orientation, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey = gradient_picture()[..., 0]
    values = grey.astype(np.uint16) * 257 if mode == "I;16" else gradient_picture()
    stored = Image.fromarray(values) if mode == "I;16" else Image.fromarray(values).convert(mode)
    stored.save(tmp_path / "a.tif", exif=exif)
    upright = np.repeat(grey[..., None], 3, 2) if mode == "I;16" else np.asarray(stored.convert("RGB"))
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.tif")), TURNS[orientation](upright))


@pytest.mark.parametrize("form", ["png", "webp", "tif"])
@pytest.mark.parametrize("orientation", TURNS)
def test_the_camera_was_turned(tmp_path, orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "webp" else {}
    Image.fromarray(gradient_picture()).save(tmp_path / f"a.{form}", exif=exif, **options)
    found = np.asarray(read_image(tmp_path / f"a.{form}"))
    assert np.array_equal(found, TURNS[orientation](gradient_picture()))


def test_files_that_are_no_images(tmp_path, monkeypatch):
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    with pytest.raises(ImageError, match="is not a readable image"):
        read_image(text)
    with pytest.raises(ImageError, match="There is no file"):
        read_image(tmp_path / "missing.jpg")
    with pytest.raises(ImageError, match="is a folder"):
        read_image(tmp_path)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for suffix in ("jpg", "png"):
        path = tmp_path / f"cut.{suffix}"
        noise.save(path)
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(ImageError, match="Cannot read"):
            read_image(path)
    large = tmp_path / "large.png"
    noise.save(large)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="too many pixels"):
        read_image(large)


FORMATS = ["jpg", "png", "tif", "webp", "mpo"]
if "avif" in features.features and features.check("avif"):
    FORMATS.append("avif")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("orientation", [None, 0, 1, 5, 6, 8, 9])
def test_the_stored_frame_tells_how_the_photograph_is_turned(tmp_path, orientation, form):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    path, options = tmp_path / f"a.{form}", {"save_all": True} if form == "mpo" else {}
    Image.fromarray(gradient_picture()).save(path, exif=exif, **options)
    width, height, turn = stored_frame(path)
    assert (width, height, turn) == (20, 12, orientation if orientation in (5, 6, 8) else 1)
    assert read_image(path).size == ((height, width) if turn >= 5 else (width, height))


def test_the_stored_frame_of_no_image(tmp_path):
    with pytest.raises(ImageError, match="There is no file"):
        stored_frame(tmp_path / "missing.jpg")


@pytest.mark.parametrize("form", ["jpg", "tif"])
def test_inks_become_the_colours_that_pillow_makes_of_them(tmp_path, form):
    path = tmp_path / f"a.{form}"
    Image.fromarray(gradient_picture()).convert("CMYK").save(path)
    with Image.open(path) as opened:
        assert opened.mode == "CMYK"
        expected = np.asarray(opened.convert("RGB"))
    assert np.array_equal(np.asarray(read_image(path)), expected)
    assert abs(expected.astype(int) - gradient_picture()).max() < 20


def palette():
    colours = Image.new("P", (2, 1))
    colours.putpalette([255, 0, 0, 0, 0, 255])
    colours.putdata([0, 1])
    return colours


# How the picture is saved, and what is seen of it.
ODD = {
    "a JPEG called PNG": (lambda path: Image.new("RGB", (9, 8), (10, 200, 30)).save(path, "JPEG"), (10, 200, 30)),
    "one pixel": (lambda path: Image.new("RGB", (1, 1), (1, 2, 3)).save(path, "PNG"), (1, 2, 3)),
    "a palette with a transparent colour": (lambda path: palette().save(path, "PNG", transparency=0), (255,) * 3),
    "a palette with a half transparent colour": (
        lambda path: palette().save(path, "PNG", transparency=bytes([128, 255])),
        (255, 127, 127),
    ),
    "a palette": (lambda path: palette().save(path, "PNG"), (255, 0, 0)),
    "the first of several frames": (
        lambda path: Image.new("RGB", (4, 4), (255, 0, 0)).save(
            path, "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), (0, 255, 0))]
        ),
        (255, 0, 0),
    ),
    "grey of 16 bits": (lambda path: Image.new("I;16", (3, 2), 257 * 99).save(path, "PNG"), (99, 99, 99)),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_files_show_what_they_hold(tmp_path, kind):
    save, colour = ODD[kind]
    save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png")
    assert found.mode == "RGB"
    assert np.abs(np.asarray(found.getpixel((0, 0))) - colour).max() <= 2


def claiming(width, height):
    """A PNG that says a size in its head, and has hardly a pixel."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n"
# What is written, and what is said of it.
WRONG = {
    "nothing": (b"", "is not a readable image"),
    "a text": (b"no picture", "is not a readable image"),
    "a bomb": (claiming(60_000, 60_000), "has too many pixels"),
    "a row": (claiming(20_000, 4), "20000 x 4 pixels is too narrow"),
    "a column": (claiming(3, 30_000), "3 x 30000 pixels is too narrow"),
    "a program": (POSTSCRIPT, "an EPS file, which is a program"),
    "hardly a pixel": (claiming(50, 50), "Cannot read"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_photograph_is_said_in_one_sentence(tmp_path, kind):
    content, words = WRONG[kind]
    path = tmp_path / "a\n\x1b[31m\u202egnp.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=words) as caught:
        read_image(path)
    assert str(caught.value).isprintable()


# Filters are the whole process's: whoever changes them for a while lets warnings be shown a second time.
def test_warnings_are_left_to_pillow_and_the_user(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (40, 40), (1, 2, 3)).save(tmp_path / "a.png")

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        for _ in range(3):
            warnings.warn("said once", UserWarning, stacklevel=1)
            assert read_image(tmp_path / "a.png").getpixel((39, 39)) == (1, 2, 3)
            assert stored_frame(tmp_path / "a.png") == (40, 40, 1)
    assert sorted(found.category.__name__ for found in warned) == ["DecompressionBombWarning", "UserWarning"]
    Image.new("RGB", (50, 41)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="has too many pixels"):
        read_image(tmp_path / "a.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in its folders")
def test_what_never_ends_is_not_read(tmp_path):
    for kind in ("pipe", "loop"):
        (tmp_path / kind).mkdir()
    os.mkfifo(tmp_path / "pipe" / "a.jpg")
    (tmp_path / "loop" / "a.jpg").symlink_to(tmp_path / "loop" / "a.jpg")
    for path in (tmp_path / "pipe" / "a.jpg", Path("/dev/zero")):
        with pytest.raises(ImageError, match="it is a pipe or device, not a plain file"):
            read_image(path)
    for read in (read_image, stored_frame):
        with pytest.raises(ImageError, match="oo many levels of symbolic links"):
            read(tmp_path / "loop" / "a.jpg")
    for kind in ("pipe", "loop"):
        photographs = PhotographFolder(tmp_path / kind, lambda image: image)
        with pytest.raises(ImageError, match="Cannot read"):
            print(photographs.fingerprint)


MEASURED = r"""
import re, sys
from pathlib import Path
from parchgrad.data.images import read_image

def peak():
    # Not of getrusage, which also knows of the process that this one was forked from.
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

before = peak()
for path in sys.argv[1:]:
    assert read_image(path).size == (20_000, 3_000)
print((peak() - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Only Linux says in /proc what a process held.")
def test_a_wide_photograph_needs_no_gigabytes(tmp_path):
    paths = [tmp_path / "colours.png", tmp_path / "deep.png"]
    for path, mode, colour in zip(paths, ("RGB", "I;16"), ((7, 8, 9), 7), strict=True):
        Image.new(mode, (20_000, 3_000), colour).save(path, compress_level=1)
    done = subprocess.run([sys.executable, "-c", MEASURED, *paths], capture_output=True, text=True, check=True)
    # The picture itself has 180 MB.
    assert 0.18e9 < int(done.stdout) < 0.8e9


def test_the_middle_of_a_flat_photograph_is_seen():
    shapes = pg.load_model("shapes")
    assert shapes.preprocess(Image.new("RGB", (20_000, 3_000))).shape == (3, 64, 64)
    flat = np.zeros((20, 20_000, 3), np.uint8)
    flat[:, :9_980, 0], flat[:, 9_980:10_020, 1], flat[:, 10_020:, 2] = 255, 255, 255
    found = shapes.preprocess.picture(shapes.preprocess(Image.fromarray(flat)))
    assert found.shape == (64, 64, 3)
    assert np.allclose(found, [0, 1, 0], atol=0.01)
    with pytest.raises(ImageError, match="20000 x 4 pixels is too narrow"):
        shapes.preprocess(Image.new("RGB", (20_000, 4)))
