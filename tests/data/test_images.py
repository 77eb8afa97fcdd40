import numpy as np
import pytest
from PIL import Image

from parchgrad.data.images import read_image, stored_frame
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


def test_transparency_lies_on_white(tmp_path):
    Image.new("RGBA", (2, 1), (200, 0, 0, 0)).save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png")).tolist() == [[[255, 255, 255]] * 2]


def test_whatever_a_decoder_raises_is_one_sentence(tmp_path, monkeypatch):
    def fail(*arguments):
        raise NotImplementedError("Unimplemented pixel format")

    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(ImageError, match=r"Unimplemented pixel format.*damaged"):
        read_image(tmp_path / "a.png")


def test_the_camera_was_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gradient_picture()).save(tmp_path / "a.png", exif=exif)
    found = np.asarray(read_image(tmp_path / "a.png"))
    assert np.array_equal(found, np.rot90(gradient_picture(), k=-1))


def test_files_that_are_no_images(tmp_path, monkeypatch):
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    with pytest.raises(ImageError, match="is no image that can be read"):
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
        with pytest.raises(ImageError, match="may be cut off or damaged"):
            read_image(path)
    large = tmp_path / "large.png"
    noise.save(large)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="too many pixels"):
        read_image(large)


@pytest.mark.parametrize("orientation", [None, 0, 1, 5, 8, 9])
def test_the_stored_frame_tells_how_the_photograph_is_turned(tmp_path, orientation):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.fromarray(gradient_picture()).save(tmp_path / "a.png", exif=exif)
    width, height, turn = stored_frame(tmp_path / "a.png")
    assert (width, height, turn) == (20, 12, orientation if orientation in (5, 8) else 1)
    assert read_image(tmp_path / "a.png").size == ((height, width) if turn >= 5 else (width, height))


def test_the_stored_frame_of_no_image(tmp_path):
    with pytest.raises(ImageError, match="There is no file"):
        stored_frame(tmp_path / "missing.jpg")
