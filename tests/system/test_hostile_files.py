"""Every parser of files from outside: whatever the bytes, one line of error or a result that can be used.

The suite tries some examples of each, `make fuzz` thousands: as many as HYPOTHESIS_EXAMPLES says.
"""

import io
import json
import math
import os
import pickle
import signal
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import TensorDataset
from torchvision.transforms import ToTensor

import parchgrad as pg
from parchgrad.data.imagenet import BoxedFolder
from parchgrad.data.images import read_image, stored_frame
from parchgrad.errors import ImageError, InputError, ParchGradError, SettingError, StatisticsError
from parchgrad.evaluation.examples import Choice, Example, Examples
from parchgrad.evaluation.rows import read_rows
from parchgrad.evaluation.runs import evaluate
from parchgrad.evaluation.scores import ScoreSettings
from parchgrad.evaluation.settings import Setting
from parchgrad.explorer.inputs import check_image
from parchgrad.legacy.pickles import read_tensor_list
from parchgrad.statistics import ChannelStatistics
from parchgrad.workflows.evaluation import read_settings
from parchgrad.workflows.report_page import make_report
from tests.support import Noise, cli, random_statistics, small_network
from tests.system import hostile

EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "200"))


def fuzzed(test, share=1.0):
    """The test of a parser over many files."""
    chosen = settings(
        max_examples=max(5, int(share * EXAMPLES)),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        # The same files, unless others are asked for.
        derandomize="HYPOTHESIS_EXAMPLES" not in os.environ,
    )
    return chosen(given(data=st.data())(test))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@contextmanager
def survived(*expected):
    """A block that ends well, or with one of these errors in one line, and in a few seconds."""

    def hang(*_):
        raise AssertionError("it hangs")

    earlier = signal.signal(signal.SIGALRM, hang)
    signal.alarm(60)
    try:
        with warnings.catch_warnings():
            # Outside of the tests a warning is no error, which would hide what comes after it.
            warnings.simplefilter("always")
            with warnings.catch_warnings(record=True) as warned:
                yield
        # Pillow's notices of odd metadata and of many pixels are left to its users.
        ours = [entry for entry in warned if "PIL" not in Path(entry.filename).parts]
        foreign = [str(entry.message) for entry in ours if "parchgrad" not in entry.category.__module__]
        assert not foreign, f"a warning in other words: {foreign}"
    except expected as error:
        text = str(error)
        assert text.isprintable(), text
        assert text.endswith("."), text
        assert len(text) < 1500, text[:2000]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


# Statistics


def statistics_files(folder):
    whole = random_statistics({"features.10": 4, "head": 2}, classes=3)
    whole = ChannelStatistics(
        whole.layers, {"model": "tiny", "categories": '["a", "b", "c"]'}, weight_digests={"head": "0" * 64}
    )
    collected = pg.collect_statistics(small_network(), [(torch.randn(3, 8, 8).double(), i % 5) for i in range(6)])
    found = []
    for held in (whole, whole.restrict(classes=[0, 2]), whole.compact(), collected, whole.compact(share=1.0)):
        held.save(folder / "made")
        found.append((folder / "made").read_bytes())
    return found


@fuzzed
def test_statistics(folder, data):
    originals = cached(statistics_files, folder)
    content = data.draw(
        st.one_of(
            hostile.spoilt_bytes(originals), hostile.spoilt_safetensors(originals), hostile.spoilt_numbers(originals)
        )
    )
    path = folder / "a.safetensors"
    path.write_bytes(content)
    with survived(StatisticsError, SettingError):
        held = ChannelStatistics.load(path)
        assert str(held)
        for layer in held.values():
            log_p = layer.class_log_p(held.test)
            assert log_p.shape == (layer.channels, layer.classes)
            assert not log_p.isnan().any()
        selector = pg.ClassWise(held, quantile=0.5, test=held.test)
        selector.check({name: layer.channels for name, layer in held.items()})
        for name in held:
            selector.class_weights(name)
        held.restrict(classes=[held.columns([0])[0]])


_MADE = {}


def cached(make, folder):
    if make not in _MADE:
        _MADE[make] = make(folder)
    return _MADE[make]


STEERING = "red\x1b[31m\x9b2J\u202e [bold]"


def test_names_in_statistics_do_not_steer_the_terminal(capsys, tmp_path):
    held = random_statistics({"head": 4}, classes=2)
    path = tmp_path / "a.safetensors"
    ChannelStatistics(held.layers, {"categories": json.dumps([STEERING, "b"]), STEERING: STEERING}).save(path)
    for options in ((), ("--target", "0")):
        code, printed, _ = cli(capsys, "stats", "show", path, *options)
        assert code == 0
        assert "red [31m 2J  [bold]" in printed
        assert printed.replace("\n", "").isprintable()


def test_statistics_of_a_billion_classes(tmp_path):
    held = random_statistics({"head": 4}, classes=2)
    path = tmp_path / "a.safetensors"
    ChannelStatistics(held.layers, class_indices=(0, 1), model_classes=10**9).save(path)
    with pytest.raises(StatisticsError, match=r"'classes'.*a\.safetensors"):
        ChannelStatistics.load(path)


def safetensors(header, body=b""):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


# Of the last torch knows no such length, and of the others no such type.
SHAPES = [("F32", [2**63, 0]), ("F32", [2**64 - 1, 0]), ("F32", [0] * 70), ("F8_E8M0", [0]), ("F4", [0]), ("C64", [0])]


@pytest.mark.parametrize(("dtype", "shape"), SHAPES)
def test_shapes_that_no_tensor_has(tmp_path, dtype, shape):
    path = tmp_path / "a"
    path.write_bytes(safetensors({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}}))
    for read, error in (
        (ChannelStatistics.load, StatisticsError),
        (Examples.load, InputError),
        (collect, StatisticsError),
    ):
        with pytest.raises(error) as caught:
            read(path)
        assert repr(str(path)) in str(caught.value)


# Checkpoints

FEW = TensorDataset(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(4)).double(), torch.arange(8) % 5)


class StoppedError(Exception):
    pass


def collect(path, on_progress=None):
    return pg.collect_statistics(
        small_network(), FEW, layers=["0"], batch_size=4, checkpoint=path, checkpoint_every=1, on_progress=on_progress
    )


def checkpoints(folder):
    def stop(stage, done, total):
        raise StoppedError

    with pytest.raises(StoppedError):
        collect(folder / "made.checkpoint", stop)
    half = (folder / "made.checkpoint").read_bytes()
    collect(folder / "made.checkpoint")
    return [half, (folder / "made.checkpoint").read_bytes()]


@fuzzed
def test_checkpoints(folder, data):
    originals = cached(checkpoints, folder)
    content = data.draw(
        st.one_of(
            hostile.spoilt_bytes(originals), hostile.spoilt_safetensors(originals), hostile.spoilt_numbers(originals)
        )
    )
    path = folder / "a.checkpoint"
    path.write_bytes(content)
    with survived(StatisticsError):
        held = collect(path)
        assert (held.classes, held["0"].channels) == (5, 6)


@pytest.mark.parametrize("name", ["images", "batches"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30])
def test_a_checkpoint_of_endless_images(folder, name, value):
    cached(checkpoints, folder)
    path = folder / "endless.checkpoint"
    path.write_bytes(cached(checkpoints, folder)[0])
    with safe_open(path, "pt") as opened:
        header, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    save_file({**tensors, name: torch.tensor(value)}, path, header)
    with pytest.raises(StatisticsError, match=r"endless\.checkpoint"):
        collect(path)


# Pickles of the research code


def pickled(folder):
    tensors = [torch.rand(3, 2), torch.rand(5).double(), torch.rand(4, 2).T]
    return [pickle.dumps(tensors, protocol) for protocol in (3, 4, 5)]


@fuzzed
def test_pickles(folder, data):
    content = data.draw(hostile.spoilt_bytes(cached(pickled, folder)))
    path = folder / "a.pkl"
    path.write_bytes(content)
    with survived(StatisticsError):
        for tensor in read_tensor_list(path):
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            last = tensor.storage_offset() + sum((length - 1) * step for length, step in steps)
            # None shows memory that lies behind its storage.
            assert tensor.numel() == 0 or last * tensor.element_size() < tensor.untyped_storage().nbytes()


# Runs


def run_folder(folder):
    place = folder / "run"
    settings = [Setting(), Setting(selector="energy", quantile=0.34, layers="all")]
    scores = ScoreSettings(families=("perturbation", "sparsity"), ratios=(0.2, 0.6))
    evaluate(small_network(), Noise(3), settings, place, scores=scores)
    return place, (place / "run.json").read_text(), (place / "rows-0.jsonl").read_text().splitlines()


@fuzzed
def test_rows(folder, data):
    place, text, lines = cached(run_folder, folder)
    (place / "run.json").write_text(text)
    content = data.draw(st.one_of(hostile.spoilt_bytes(["\n".join(lines).encode()]), hostile.spoilt_lines(lines)))
    (place / "rows-0.jsonl").write_bytes(content)
    with survived(InputError, SettingError):
        rows = read_rows(place)
        assert all(isinstance(row["setting"], str) for row in rows)
        make_report([place], confidence=0.9)


# Matplotlib's fonts lack some of the letters.
@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_in_rows_do_not_steer_the_terminal(capsys, tmp_path):
    place, _, lines = run_folder(tmp_path)
    rows = [{**json.loads(line), "model": STEERING} for line in lines]
    for row in rows:
        # The others are compared with this one, and are methods of the caller's own, which keep their titles.
        if row["setting"] != "gradient":
            row.update(setting=STEERING, method=None, selector=None)
    (place / "rows-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # The progress of the run.
    capsys.readouterr()
    code, printed, errors = cli(capsys, "report", place, "--out", tmp_path / "out")
    assert (code, errors) == (0, "")
    # In the title and in the table.
    assert printed.count("red [31m") >= 2
    assert printed.replace("\n", "").isprintable()


@partial(fuzzed, share=0.02)
def test_pages_of_rows(folder, data):
    place, text, lines = cached(run_folder, folder)
    (place / "run.json").write_text(text)
    (place / "rows-0.jsonl").write_bytes(data.draw(hostile.spoilt_lines(lines)))
    with survived(InputError, SettingError):
        make_report([place]).save(folder / "page", force=True)


@fuzzed
def test_descriptions_of_runs(folder, data):
    place, text, lines = cached(run_folder, folder)
    (place / "rows-0.jsonl").write_text("\n".join(lines) + "\n")
    content = data.draw(
        st.one_of(hostile.spoilt_bytes([text.encode()]), hostile.spoilt_lines([" ".join(text.split())]))
    )
    (place / "run.json").write_bytes(content)
    with survived(InputError, SettingError):
        make_report([place])
    with survived(InputError, SettingError):
        evaluate(small_network(), Noise(3), [Setting()], place)


def example_files(folder):
    examples = [
        Example(index=i, image=f"{i}", label=0, target=1, predicted=0, values=(0.5, None), gain=0.5) for i in range(2)
    ]
    choice = Choice(
        score="aopc", leading="b", settings=("gradient", "b"), best=tuple(examples[:1]), worst=tuple(examples[1:])
    )
    pictures, maps = (np.zeros((4, 5, 3), np.uint8),) * 2, (np.zeros((2, 4, 5), np.uint8),) * 2
    Examples(choice=choice, categories={0: "a", 1: "b"}, pictures=pictures, maps=maps).save(folder / "made")
    return [(folder / "made").read_bytes()]


@fuzzed
def test_examples(folder, data):
    originals = cached(example_files, folder)
    (folder / "a.examples").write_bytes(
        data.draw(st.one_of(hostile.spoilt_bytes(originals), hostile.spoilt_safetensors(originals)))
    )
    with survived(InputError):
        held = Examples.load(folder / "a.examples")
        assert len(held.pictures) == len(held.maps) == len(held.choice.examples)


# Settings


def test_settings_that_are_no_settings(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("# \n" * 40_000)
    with pytest.raises(InputError, match=r"a\.toml.* 100,000 bytes"):
        read_settings(path)


SETTINGS = """
model = ["shapes", "resnet18"]
target = "predicted"
batch_size = 2
seed = 5
statistics = "held"
[data]
name = "shapes"
root = "photos"
count = 9
seed = 3
mosaics = 4
confidence = 0.5
jigsaw = 1
blur = 0.5
[grid]
methods = ["smoothgrad"]
selectors = ["none", "class"]
quantiles = [0.2, 0.3]
layers = ["all", 0.5, ["layer3.*"]]
gammas = [inf, 2]
conserves = ["exact", "none"]
softnesses = [0, 0.5]
gates = [0, 2.5]
antialiases = [true, "none"]
masks = ["own"]
[scores]
families = ["sparsity", "insertion"]
ratios = [0.1, 0.2]
steps = 4
tolerance = 3
"""


@fuzzed
def test_settings(folder, data):
    path = folder / "a.toml"
    path.write_bytes(data.draw(st.one_of(hostile.spoilt_bytes([SETTINGS.encode()]), hostile.spoilt_toml(SETTINGS))))
    with survived(InputError, SettingError):
        asked = read_settings(path)
        numbers = [asked.batch_size, asked.data.count or 1, asked.data.mosaics, asked.data.jigsaw]
        assert all(abs(number) < 2**63 for number in numbers)
        assert 0 <= asked.data.confidence <= 1
        assert 0 <= asked.data.blur < math.inf
        with survived(ParchGradError):
            asked.grid.settings()
        torch.Generator().manual_seed(asked.seed)
        torch.Generator().manual_seed(asked.data.seed)


# Annotations

ANNOTATION = (
    "<annotation><folder>val</folder><filename>photo</filename><size><width>40</width><height>30</height></size>"
    "<object><name>n01</name><bndbox><xmin>2</xmin><ymin>1</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object>"
    "<object><name>n02</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>40</xmax><ymax>30</ymax></bndbox></object>"
    "</annotation>"
)


def annotated(folder):
    (folder / "n01").mkdir()
    Image.new("RGB", (40, 30)).save(folder / "n01" / "photo.png")
    (folder / "n01" / "photo.xml").write_text(ANNOTATION)
    return BoxedFolder(folder, folder, ToTensor(), categories=["a", "b"], synsets=["n01", "n02"])


@pytest.fixture(scope="module")
def boxed(tmp_path_factory):
    return annotated(tmp_path_factory.mktemp("boxed"))


@fuzzed
def test_annotations(boxed, data):
    content = data.draw(st.one_of(hostile.spoilt_bytes([ANNOTATION.encode()]), hostile.spoilt_xml(ANNOTATION)))
    boxed._annotations[0].write_bytes(content)
    with survived(ImageError):
        boxes = boxed[0].boxes
        assert ((boxes >= 0) & (boxes <= 40)).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


# Images

FORMATS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000", "AVIF", "ICO", "TGA", "PCX", "SGI", "DDS"]
_NEEDED = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}


def image_files(folder):
    picture = Image.fromarray(np.linspace(0, 255, 16 * 16 * 3).reshape(16, 16, 3).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = []
    for form in FORMATS:
        if form not in _NEEDED or features.check(_NEEDED[form]):
            for mode in {"GIF": ["P"], "JPEG": ["RGB", "L", "CMYK"], "PNG": ["RGB", "P", "LA", "I;16", "1"]}.get(
                form, ["RGB"]
            ):
                converted = picture.convert("L").convert("I;16") if mode == "I;16" else picture.convert(mode)
                held = io.BytesIO()
                converted.save(held, form, **({"exif": exif} if form in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
                found.append(held.getvalue())
    return found


@fuzzed
def test_images(folder, data):
    path = folder / "a.png"
    path.write_bytes(data.draw(hostile.spoilt_bytes(cached(image_files, folder))))
    with survived(ImageError):
        stored_frame(path)
    with survived(ImageError):
        check_image(path, megapixels=1)
    with survived(ImageError):
        found = read_image(path)
        assert found.mode == "RGB"
        assert np.asarray(found).size > 0
