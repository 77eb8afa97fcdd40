import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import IterableDataset, Subset, TensorDataset
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import ToTensor

from parchgrad.data.perturbed import Blur, Jigsaw, PerturbedMNIST
from parchgrad.data.preprocessing import Preprocessing
from parchgrad.data.samples import DrawnSamples, LabelledImages
from parchgrad.data.shapes import GeneratedShapes
from parchgrad.errors import ImageError, InputError, SettingError
from parchgrad.evaluation.grid_pointing import make_mosaics


def pairs(image, label=0):
    return LabelledImages([(image, label)], categories=("a", "b"))


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (pairs(torch.rand(1, 2, 2), 2), "label of item 0 is 2, but there are 2 classes"),
        (pairs(torch.rand(1, 2, 2), -1), "label of item 0 is -1"),
        (pairs(torch.rand(1, 2, 2), 0.5), r"label of item 0 is 0\.5, .* class index"),
        (pairs(torch.rand(1, 2, 2), torch.zeros(2)), "class index"),
        (LabelledImages([(torch.rand(1, 2, 2), 0, 0)], categories=("a",)), "Item 0 "),
    ],
)
def test_items_that_do_not_fit(dataset, words):
    with pytest.raises(InputError, match=words):
        dataset[0]


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.new("RGB", (2, 2)), "is of type Image"),
        (torch.zeros(2, 2), r"has shape \(2, 2\) and dtype torch\.float32"),
        (torch.zeros(1, 2, 2, dtype=torch.uint8), r"torch\.uint8"),
    ],
)
def test_images_that_do_not_fit(image, words):
    with pytest.raises(ImageError, match=words):
        pairs(image)[0]


def test_labelled_images_are_those_of_the_data_set():
    fake = FakeData(size=5, image_size=(3, 6, 8), num_classes=4, transform=ToTensor())
    samples = LabelledImages(fake, categories=("a", "b", "c", "d"))
    assert len(samples) == 5
    for index in range(5):
        image, label = fake[index]
        assert torch.equal(samples[index].image, image)
        assert (samples[index].label, samples[index].name) == (int(label), str(index))
        assert samples[index].boxes is samples[index].mask is None
    assert torch.equal(samples[-1].image, samples[4].image)
    with pytest.raises(IndexError):
        samples[5]
    part = Subset(Subset(fake, [4, 2, 0]), [1])
    assert LabelledImages(part, categories=samples.categories)[0].name == "2"


def test_labelled_images_take_names_from_folders(tmp_path):
    for index, name in enumerate(("cat/x.png", "cat/y.png", "dog/x.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 3), (80 * index, 0, 0)).save(tmp_path / name)
    folder = Subset(ImageFolder(str(tmp_path), ToTensor()), [2, 0])
    samples = LabelledImages(folder)
    assert samples.categories == ("cat", "dog")
    assert [(samples[index].name, samples[index].label) for index in range(2)] == [("dog/x.png", 1), ("cat/x.png", 0)]


def test_data_sets_that_cannot_be_used():
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(1, 2, 2), 0

    with pytest.raises(SettingError, match="Stream has no length"):
        LabelledImages(Stream(), categories=("a",))
    tensors = TensorDataset(torch.zeros(1, 1, 2, 2), torch.zeros(1).long())
    for categories in (None, "cat"):
        with pytest.raises(SettingError, match="TensorDataset has no class names"):
            LabelledImages(tensors, categories=categories)


def test_the_fingerprint_follows_images_labels_and_classes():
    images, labels = torch.rand(100, 1, 2, 2), torch.arange(100) % 2

    def fingerprint(images=images, labels=labels, categories=("a", "b")):
        return LabelledImages(TensorDataset(images, labels), categories=categories).fingerprint

    last = images.clone()
    last[99, 0, 1, 1] += 0.5
    others = [
        fingerprint(images=last),
        fingerprint(images=images[:99], labels=labels[:99]),
        fingerprint(images=images.reshape(100, 1, 1, 4)),
        fingerprint(images=images.double()),
        fingerprint(labels=1 - labels),
        fingerprint(categories=("a", "c")),
    ]
    assert len({fingerprint(), *others}) == 7
    assert fingerprint() == fingerprint(images=images.clone())


@pytest.mark.parametrize("kind", ["folder", "shapes", "jigsaw", "blur", "digits", "mosaics"])
def test_the_default_device_does_not_matter(tmp_path, kind):
    # On meta, any tensor that the package makes there would hold no numbers.
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.radial_gradient("L").save(tmp_path / name / "1.png")
        Image.linear_gradient("L").save(tmp_path / name / "2.png")

    def make():
        photographs = LabelledImages(ImageFolder(tmp_path, Preprocessing(ToTensor(), (0.5,) * 3, (0.25,) * 3)))
        shapes = GeneratedShapes(count=12, seed=2)
        found = {
            "folder": lambda: DrawnSamples(photographs, count=3, seed=1),
            "shapes": lambda: shapes,
            "jigsaw": lambda: Jigsaw(shapes, grid=4, shuffles=3),
            "blur": lambda: Blur(photographs, magnitude=2.0),
            "digits": lambda: PerturbedMNIST(photographs, canvas=300, epsilon=0.1),
            "mosaics": lambda: make_mosaics(network, shapes, count=1, confidence=0.0),
        }[kind]()
        samples = [found[index] for index in range(len(found))]
        plain = [(found.fingerprint, sample.label, sample.name, sample.group) for sample in samples]
        tensors = [(sample.image, sample.boxes, sample.mask, pictured(sample.image)) for sample in samples]
        return plain, [part for parts in tensors for part in parts if part is not None]

    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 12)).eval()
    pictured = Preprocessing(ToTensor(), (0.5,) * 3, (0.25,) * 3).picture
    expected = make()
    with torch.device("meta"):
        found = make()
    assert found[0] == expected[0]
    assert len(expected[1]) > 4
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)
