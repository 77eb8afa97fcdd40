import importlib.util
import json
import urllib.error
from importlib import resources
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.data import ImageNetInfo

import parchgrad as pg
from parchgrad.data.shapes import GENERATOR_VERSION, GeneratedShapes
from parchgrad.errors import ModelError, SettingError, TargetError, WeightsError
from parchgrad.evaluation.localisation import boxes_to_region, mosaic
from parchgrad.legacy.pretrained_models import get_pretrained_model
from parchgrad.models import loading as models
from parchgrad.models.dense_networks import DENSE_NETWORKS
from parchgrad.models.shapes_networks import SHAPES_NETWORKS


@pytest.fixture(scope="module")
def lite0():
    return pg.load_model("efficientnet_lite0")


def photograph(width=320, height=260):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_offline_weights_are_real(lite0):
    from skimage import data

    espresso = lite0.preprocess(Image.fromarray(data.coffee())).unsqueeze(0)
    (top,) = lite0.predict(espresso, count=3)
    assert top[0].category == "espresso"
    assert top[0].probability > 0.9
    assert [p.probability for p in top] == sorted((p.probability for p in top), reverse=True)
    assert not any(module.training for module in lite0.model.modules())
    assert lite0.name == "efficientnet_lite0"


def test_preprocessing_of_timm_is_resize_crop_normalise(lite0):
    image = photograph()
    resized = image.resize((315, 256), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized, dtype=np.float64)[16:240, 46:270] / 255
    expected = torch.from_numpy((pixels - 0.5) / 0.5).permute(2, 0, 1).float()
    # Crop offsets may round the other way.
    found = lite0.preprocess(image)
    assert found.shape == (3, 224, 224)
    shifted = torch.from_numpy((np.asarray(resized, dtype=np.float64)[16:240, 45:269] / 255 - 0.5) / 0.5)
    candidates = (expected, shifted.permute(2, 0, 1).float())
    assert min((found - candidate).abs().max() for candidate in candidates) < 1e-6


def test_preprocessing_of_torchvision_is_its_own():
    classifier = pg.load_model("resnet18", pretrained=False)
    image = photograph()
    expected = torchvision.models.ResNet18_Weights.DEFAULT.transforms()(image)
    torch.testing.assert_close(classifier.preprocess(image), expected)
    assert classifier.preprocess.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_preprocessing_takes_any_mode(lite0, mode):
    assert lite0.preprocess(photograph().convert(mode)).shape == (3, 224, 224)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18"])
def test_picture_undoes_the_normalisation(name):
    classifier = pg.load_model(name, pretrained=False)
    image = Image.new("RGB", (300, 300), (10, 120, 250))
    picture = classifier.preprocess.picture(classifier.preprocess(image))
    np.testing.assert_allclose(picture, np.broadcast_to(np.array([10, 120, 250]) / 255, (224, 224, 3)), atol=1e-6)


def test_a_name_of_both_libraries_may_be_that_of_timm():
    for name in ("convnext_tiny", "timm/convnext_tiny"):
        found = pg.load_model(name, pretrained=False)
        library = timm.models.ConvNeXt if name.startswith("timm/") else torchvision.models.ConvNeXt
        assert isinstance(found.model, library)
        assert (found.name, found.categories[967]) == (name, "espresso")
    with pytest.raises(ModelError, match="timm/convnext_tinny"):
        pg.load_model("timm/convnext_tinny", pretrained=False)


def test_timm_models_by_name():
    classifier = pg.load_model("mobilenetv3_small_050", pretrained=False)
    assert isinstance(classifier.model, timm.models.MobileNetV3)
    assert classifier.categories[967] == "espresso"
    assert (len(classifier.synsets), classifier.synsets[967]) == (1000, "n07920052")
    larger, synsets = models._timm_classes(timm.create_model("resnet18", num_classes=11821))
    assert len(larger) == len(synsets) == 11821
    other, synsets = models._timm_classes(timm.create_model("resnet18", num_classes=7))
    assert (other[:2], synsets) == (("class 0", "class 1"), ())


def test_categories_are_found_by_name_and_index(lite0):
    assert lite0.find_category("Espresso ") == lite0.find_category("967") == 967
    for query, words in [
        ("espreso", "espresso"),
        ("tabby cat", "Close matches"),
        ("cat", "tiger cat"),
        ("zzzzzz", "tench"),
        ("", "tench"),
        ("1000", "1000 classes of .*, from 0 to 999"),
    ]:
        with pytest.raises(TargetError, match=words):
            lite0.find_category(query)
    twice = models.Classifier(lite0.model, lite0.preprocess, ("crane", "crane"), "two cranes")
    with pytest.raises(TargetError, match=r"one of the indices \[0, 1\]"):
        twice.find_category("crane")


def test_listing():
    entries = models.list_models()
    assert [entry for entry in entries if entry.offline] == entries[:5]
    assert entries[:5] == [
        models.ModelEntry("efficientnet_lite0", "timm", offline=True),
        models.ModelEntry("shapes", "parchgrad", offline=True),
        models.ModelEntry("shapes_vit", "parchgrad", offline=True),
        models.ModelEntry("shapes_convnext", "parchgrad", offline=True),
        models.ModelEntry("shapes_mobilenet", "parchgrad", offline=True),
    ]
    names = [entry.name for entry in entries]
    assert len(names) == len(set(names)) > 500
    assert [entry.name for entry in models.list_models("vgg16*")][:2] == ["vgg16", "vgg16_bn"]
    assert models.list_models("no such model") == []


@pytest.fixture(scope="module")
def shapes_classifier():
    return pg.load_model("shapes")


def stacked(count, **settings):
    samples = list(GeneratedShapes(count=count, **settings))
    masks = torch.stack([sample.mask for sample in samples])
    return torch.stack([sample.image for sample in samples]), torch.tensor([sample.label for sample in samples]), masks


def test_the_shapes_network_knows_shapes_that_it_has_not_seen(shapes_classifier):
    images, labels, _ = stacked(400, seed=987)
    with torch.no_grad():
        found = shapes_classifier.model(images).argmax(1)
    assert (found == labels).double().mean() > 0.95
    assert shapes_classifier.categories == GeneratedShapes.categories
    assert not any(module.training for module in shapes_classifier.model.modules())
    assert not torch.equal(
        pg.load_model("shapes", pretrained=False).model.classifier.weight, shapes_classifier.model.classifier.weight
    )


def test_the_shapes_network_takes_its_own_pictures_back(shapes_classifier):
    sample = GeneratedShapes(count=1, seed=4)[0]
    picture = shapes_classifier.preprocess.picture(sample.image)
    file = Image.fromarray((picture * 255).round().astype(np.uint8))
    torch.testing.assert_close(shapes_classifier.preprocess(file), sample.image)
    assert shapes_classifier.preprocess(photograph()).shape == (3, 64, 64)


@pytest.mark.parametrize("name", SHAPES_NETWORKS)
def test_the_weights_are_of_the_present_generator(name):
    path = Path(pg.__file__).parent / "weights" / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["generator_version"] == str(GENERATOR_VERSION)
    several, least, most = ("mosaic_recall", 0.95, 0.9e6) if name == "shapes" else ("rival_recall", 0.9, 2e6)
    assert float(metadata["accuracy"]) > least
    assert float(metadata[several]) > 0.9
    assert json.loads(metadata["categories"]) == list(GeneratedShapes.categories)
    assert path.stat().st_size <= most


@pytest.fixture(scope="module")
def fresh():
    """Images of seed 5, which no network was trained on, without and with a rival, and the classes in each."""
    sets = [GeneratedShapes(count=400, seed=5, rivals=rivals) for rivals in (0, 1)]
    return [
        (torch.stack([sample.image for sample in shapes]), [set(shapes.classes(index)) for index in range(len(shapes))])
        for shapes in sets
    ]


@pytest.mark.parametrize("name", ["shapes_vit", "shapes_convnext", "shapes_mobilenet"])
def test_the_other_shapes_networks_know_fresh_shapes_also_next_to_a_rival(name, fresh):
    classifier = pg.load_model(name)
    assert (classifier.name, classifier.categories) == (name, GeneratedShapes.categories)
    assert not any(module.training for module in classifier.model.modules())
    assert {tensor.dtype for tensor in classifier.model.parameters()} == {torch.float32}
    for images, classes in fresh:
        with torch.no_grad():
            order = classifier.model(images).argsort(dim=1, descending=True).tolist()
        found = [len(held & set(ranks[: len(held)])) / len(held) for ranks, held in zip(order, classes, strict=True)]
        assert sum(found) / len(found) > 0.88


def test_the_shapes_network_finds_all_four_shapes_of_a_mosaic(shapes_classifier):
    images, labels, _ = stacked(160, seed=985)
    tiled = torch.cat([mosaic(four, rows=2, columns=2) for four in torch.split(images, 4)])
    with torch.no_grad():
        ranks = shapes_classifier.model(tiled).argsort(dim=1, descending=True).tolist()
    found = [
        label in order[:4] for order, four in zip(ranks, labels.reshape(-1, 4).tolist(), strict=True) for label in four
    ]
    assert sum(found) / len(found) > 0.9


def test_the_shapes_network_looks_at_the_shape(shapes_classifier):
    """A grey box over the shape takes its class away; as large a box elsewhere hardly matters."""
    samples = list(GeneratedShapes(count=60, seed=986))
    images, labels = torch.stack([item.image for item in samples]), torch.tensor([item.label for item in samples])
    boxes = torch.stack([boxes_to_region(item.boxes, height=64, width=64) for item in samples])
    elsewhere = boxes.roll((32, 32), dims=(1, 2)) & ~boxes
    with torch.no_grad():
        seen, without_shape, without_rest = (
            shapes_classifier.model(images.masked_fill(hidden.unsqueeze(1), 0)).gather(1, labels.unsqueeze(1))
            for hidden in (torch.zeros_like(boxes), boxes, elsewhere)
        )
    assert (seen - without_shape).mean() > 5 * (seen - without_rest).abs().mean()


@pytest.mark.parametrize("name", [*SHAPES_NETWORKS, *DENSE_NETWORKS])
@pytest.mark.parametrize("content", [None, b"", b"no weights at all", "other"])
def test_damaged_weights_of_the_shapes_networks(monkeypatch, tmp_path, content, name):
    path = tmp_path / "weights" / f"{name}.safetensors"
    path.parent.mkdir()
    if content == "other":
        save_file({"a": torch.zeros(3)}, path)
    elif content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    with pytest.raises(WeightsError, match=f"weights of {name} are missing or damaged"):
        pg.load_model(name)


def test_unknown_names():
    with pytest.raises(ModelError, match="resnet50"):
        pg.load_model("resnet-50")
    with pytest.raises(ModelError, match="`parchgrad models`"):
        pg.load_model("@@@@@@")
    with pytest.raises(ModelError, match="shapes_vit"):
        pg.load_model("shapes_vi")
    with pytest.raises(ModelError, match="shapes_segmenter"):
        pg.load_model("shapes_segmentation")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Make repositories in an empty cache of the Hugging Face Hub, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    # Old releases keep a session from before.
    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()

    def make(name, config, tensors=None, commit="0" * 40, revision="main"):
        place = tmp_path / f"models--{name.replace('/', '--')}"
        folder = place / "snapshots" / commit
        folder.mkdir(parents=True)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / revision).write_text(commit)
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        if tensors is not None:
            save_file(tensors, folder / "model.safetensors")
        return folder

    return make


# As `timm.models.save_for_hf` writes it.
TINY = {
    "architecture": "test_byobnet",
    "num_classes": 3,
    "label_names": ["n1", "n2", "n3"],
    "label_descriptions": {"n1": "ant", "n2": "bee", "n3": "crane"},
    "pretrained_cfg": {
        "input_size": [3, 64, 64],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.25, 0.2],
        "num_classes": 3,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
    },
}


def tiny_network(seed, classes=3):
    torch.manual_seed(seed)
    return timm.create_model("test_byobnet", num_classes=classes).eval()


def test_models_of_the_hub_come_with_their_weights_preprocessing_and_classes(hub):
    first, second = tiny_network(0), tiny_network(1)
    hub("someone/tiny", TINY, first.state_dict())
    hub("someone/tiny", TINY, second.state_dict(), commit="1" * 40, revision="v2")
    inputs = torch.randn(2, 3, 64, 64)
    for name, network in (("hf-hub:someone/tiny", first), ("hf-hub:someone/tiny@v2", second)):
        classifier = pg.load_model(name)
        assert classifier.name == name
        assert not any(module.training for module in classifier.model.modules())
        with torch.no_grad():
            assert torch.equal(classifier.model(inputs), network(inputs))
    assert classifier.categories == ("ant", "bee", "crane")
    assert classifier.synsets == ()
    pixels = np.asarray(photograph(64, 64), dtype=np.float64) / 255
    expected = (pixels - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.25, 0.2])
    torch.testing.assert_close(
        classifier.preprocess(photograph(64, 64)), torch.from_numpy(expected).permute(2, 0, 1).float()
    )
    untrained = pg.load_model("hf-hub:someone/tiny", pretrained=False).model
    assert not torch.equal(untrained.head.fc.weight, first.head.fc.weight)


def test_class_names_of_the_hub(hub):
    synsets = list(ImageNetInfo("imagenet-1k").label_names())
    without = {key: value for key, value in TINY.items() if not key.startswith("label")}
    thousand = {**without, "num_classes": 1000, "pretrained_cfg": {**TINY["pretrained_cfg"], "num_classes": 1000}}
    hub("someone/unnamed", without)
    hub("someone/gaps", {**without, "label_names": {"0": "ant", "2": "crane"}})
    hub("someone/too-few", {**without, "label_names": ["ant"]})
    hub("someone/imagenet", thousand)
    hub("someone/labelled", {**thousand, "label_names": synsets})
    hub("someone/birds", {**thousand, "label_names": [f"bird {index}" for index in range(1000)]})

    def classes(name):
        return pg.load_model(f"hf-hub:someone/{name}", pretrained=False)

    assert classes("unnamed").categories == classes("too-few").categories == ("class 0", "class 1", "class 2")
    assert classes("gaps").categories == ("ant", "class 1", "crane")
    for name in ("imagenet", "labelled"):
        assert classes(name).categories[967] == "espresso"
        assert classes(name).synsets == tuple(synsets)
    assert classes("birds").categories[967] == "bird 967"
    assert classes("birds").synsets == ()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "names no architecture"),
        ("[1]", "names no architecture"),
        ({"architecture": 5}, "names the architecture 5"),
        ({"architecture": "VitForImageClassification"}, "names the architecture 'VitForImageClassification'"),
    ],
)
def test_repositories_of_other_libraries(hub, config, words):
    hub("someone/other", config, {"a": torch.zeros(1)})
    with pytest.raises(ModelError, match=rf"hf-hub:someone/other is not a model of the installed timm: .*{words}"):
        pg.load_model("hf-hub:someone/other")


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        (TINY, {"a": torch.zeros(1)}),
        ({**TINY, "model_args": {"colour": "blue"}}, {"a": torch.zeros(1)}),
        ({**TINY, "pretrained_cfg": {**TINY["pretrained_cfg"], "mean": 5}}, tiny_network(0).state_dict()),
        ({**TINY, "pretrained_cfg": 5}, {"a": torch.zeros(1)}),
    ],
)
def test_repositories_that_are_damaged(hub, config, tensors):
    hub("someone/tiny", config, tensors)
    with pytest.raises(WeightsError, match="files of hf-hub:someone/tiny do not make a working test_byobnet"):
        pg.load_model("hf-hub:someone/tiny")


def test_repositories_without_a_classifier(hub):
    hub("someone/headless", {**TINY, "num_classes": 0, "model_args": {"num_classes": 0}}, {"a": torch.zeros(1)})
    with pytest.raises(ModelError, match="hf-hub:someone/headless has no classifier"):
        pg.load_model("hf-hub:someone/headless", pretrained=False)


@pytest.mark.parametrize("key", ["hf_hub_filename", "file", "url"])
def test_a_repository_cannot_name_another_file_of_weights(hub, key):
    network = tiny_network(0)
    asked = {**TINY["pretrained_cfg"], "custom_load": "hf", "source": "file", key: "pytorch_model.bin"}
    folder = hub("someone/tiny", {**TINY, "pretrained_cfg": asked}, network.state_dict())
    torch.save({"a": Refused()}, folder / "pytorch_model.bin")
    asked[key] = str(folder / "pytorch_model.bin") if key == "file" else asked[key]
    (folder / "config.json").write_text(json.dumps({**TINY, "pretrained_cfg": asked}))
    loaded = pg.load_model("hf-hub:someone/tiny").model
    assert torch.equal(loaded.head.fc.weight, network.head.fc.weight)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="weights of hf-hub:someone/tiny"):
        pg.load_model("hf-hub:someone/tiny")


def test_names_of_the_hub_that_are_malformed_or_not_there(hub):
    for name in (
        "",
        "a/b/c",
        "../a",
        "a--b/c",
        "timm/x@",
        "timm/x@a b",
        "timm/x@a@b",
        "timm/x@../y",
        "timm/x@/y",
        "/tmp",
        "C:/x",
    ):
        with pytest.raises(ModelError, match="does not name a repository"):
            models.check_model_name(f"hf-hub:{name}")
    models.check_model_name("hf-hub:someone/missing@refs/pr/1")
    with pytest.raises(WeightsError, match=r"hf-hub:someone/missing .*use efficientnet_lite0, which works offline"):
        pg.load_model("hf-hub:someone/missing")
    with pytest.raises(SettingError, match=r"weights` is 'V1'"):
        pg.load_model("hf-hub:someone/missing", weights="V1")


def test_networks_without_a_classifier(monkeypatch):
    headless = timm.create_model("resnet18", num_classes=0)
    monkeypatch.setattr(models, "_check_registered", lambda name: None)
    monkeypatch.setattr(timm, "create_model", lambda *arguments, **options: headless)
    with pytest.raises(ModelError, match="has no classifier"):
        pg.load_model("convnext_nano")


def test_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r"parchgrad\[demo\]"):
        pg.load_model("efficientnet_lite0")


@pytest.mark.parametrize("content", [b"", b"no weights at all", "pickle", "other"])
def test_damaged_weights(monkeypatch, tmp_path, content):
    path = tmp_path / "weights.pth"
    if content == "pickle":
        # Anything but tensors is refused by weights_only=True.
        torch.save({"a": Refused()}, path)
    elif content == "other":
        torch.save({"a": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    monkeypatch.setattr(models, "_offline_weights", lambda: path)
    with pytest.raises(WeightsError, match="are damaged"):
        pg.load_model("efficientnet_lite0")


class Refused:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was executed",))


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def fail(*arguments, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(models, "_check_registered", lambda name: None)
    monkeypatch.setattr(torchvision.models, "get_model", fail)
    with pytest.raises(WeightsError, match=r"weights of resnet18 .*no network.*https://.*\.pth"):
        pg.load_model("resnet18")
    for error in (SafetensorError("header too large"), OSError("no network")):
        monkeypatch.setattr(timm, "create_model", Mock(side_effect=error))
        with pytest.raises(WeightsError, match="weights of convnext_nano"):
            pg.load_model("convnext_nano")
    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(WeightsError, match=r"weights of convnext_nano .*use efficientnet_lite0"):
        pg.load_model("convnext_nano")


@pytest.mark.parametrize(
    ("name", "library"),
    [
        *[(name, name) for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "convnext_tiny")],
        ("vgg16", "vgg16_bn"),
        ("efficient_b0", "efficientnet_b0"),
        ("inceptionv3", "inception_v3"),
    ],
)
def test_encoders_of_the_research_code_come_with_the_first_weights(monkeypatch, name, library):
    loaded = Mock(return_value=torch.nn.Linear(2, 2))
    monkeypatch.setattr(torchvision.models, "get_model", loaded)
    model = get_pretrained_model(name)
    assert model is loaded.return_value
    assert not model.training
    weights = torchvision.models.get_model_weights(library)["IMAGENET1K_V1"]
    loaded.assert_called_once_with(library, weights=weights)


def test_other_names_come_with_their_default_weights(monkeypatch):
    loaded = Mock(return_value=torch.nn.Linear(2, 2))
    monkeypatch.setattr(torchvision.models, "get_model", loaded)
    get_pretrained_model("wide_resnet50_2")
    weights = torchvision.models.get_model_weights("wide_resnet50_2").IMAGENET1K_V2
    loaded.assert_called_once_with("wide_resnet50_2", weights=weights)
    with pytest.raises(ModelError, match="resnet18"):
        get_pretrained_model("resnet-18")


def test_weights_by_name(monkeypatch):
    monkeypatch.setattr(torchvision.models, "get_model", Mock(return_value=torch.nn.Linear(2, 2)))
    sizes = [
        pg.load_model("resnet50", weights=weights).preprocess.transform.resize_size for weights in (None, "DEFAULT")
    ]
    assert sizes == [[232], [232]]
    assert pg.load_model("resnet50", weights="IMAGENET1K_V1").preprocess.transform.resize_size == [256]
    with pytest.raises(SettingError, match=r"no weights 'V1'. Use one of IMAGENET1K_V1, IMAGENET1K_V2"):
        pg.load_model("resnet50", weights="V1")
    with pytest.raises(SettingError, match=r"weights` is 'V1'"):
        pg.load_model("convnext_nano", weights="V1")


@pytest.mark.parametrize(("name", "size"), [("inception_v3", 299), ("googlenet", 224)])
def test_auxiliary_heads_are_left_out(name, size):
    classifier = pg.load_model(name, pretrained=False)
    called = []
    for module in pg.find_convolutions(classifier.model).values():
        module.register_forward_hook(lambda module, inputs, output: called.append(module))
    with torch.no_grad():
        assert classifier.model(torch.randn(1, 3, size, size)).shape == (1, 1000)
    assert {id(module) for module in called} == {id(m) for m in pg.find_convolutions(classifier.model).values()}


def test_predictions_are_ranked_as_the_explainer_ranks_them():
    class Fixed(torch.nn.Module):
        def forward(self, inputs):
            # Probabilities of these are equal in float32.
            return torch.tensor([[0.0, 1e-8, 3e-8, 2e-8]]).expand(len(inputs), 4)

    preprocess = models.Preprocessing(lambda image: image, (0, 0, 0), (1, 1, 1))
    classifier = models.Classifier(Fixed().eval(), preprocess, tuple("abcd"), "fixed")
    (found,) = classifier.predict(torch.zeros(1, 3, 4, 4), count=3)
    assert [prediction.category for prediction in found] == ["c", "d", "b"]
    assert [prediction.probability for prediction in found] == [0.25, 0.25, 0.25]
