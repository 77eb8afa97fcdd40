import os
import pickle
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model

import parchgrad as pg
from parchgrad.data.samples import LabelledImages
from parchgrad.errors import InputError, ModelError, ModelWarning, WeightsError
from parchgrad.evaluation.rows import read_rows
from parchgrad.evaluation.runs import evaluate
from parchgrad.evaluation.scores import ScoreSettings
from parchgrad.evaluation.settings import Setting
from parchgrad.models.own_networks import check_network_name, load_network
from tests.support import small_network

SPARSITY = ScoreSettings(families=("sparsity",))


@pytest.fixture(autouse=True)
def search_path(monkeypatch):
    # Files and folders of networks are added to it.
    monkeypatch.setattr(sys, "path", [*sys.path])


def saved(model, path):
    (save_file if path.suffix == ".safetensors" else torch.save)(model.state_dict(), path)
    return path


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("file", ["net.safetensors", "net.pth"])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("resnet18", lambda: get_model("resnet18", num_classes=2)),
        ("mobilenetv3_small_050", lambda: __import__("timm").create_model("mobilenetv3_small_050", num_classes=2)),
    ],
)
def test_weights_bring_their_number_of_classes(tmp_path, name, make, file):
    own = make().eval()
    classes = tmp_path / "classes.txt"
    classes.write_text("intact\n\n defect \n")
    found = load_network(name, weights=saved(own, tmp_path / file), classes=classes)
    assert same(found.model, own)
    assert not found.model.training
    assert (found.categories, found.synsets, found.name) == (("intact", "defect"), (), f"{name}-net")
    # The preprocessing is that of the architecture.
    assert found.preprocess.mean == pg.load_model(name, pretrained=False).preprocess.mean
    assert load_network(name, weights=tmp_path / file).categories == ("class 0", "class 1")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model"])
def test_checkpoints_of_trainers_are_unpacked(tmp_path, prefix, key):
    own = get_model("resnet18", num_classes=3)
    state = {f"{prefix}{name}": value for name, value in own.state_dict().items()}
    torch.save(state if key is None else {key: state, "epoch": 4, "best": 0.5}, tmp_path / "net.ckpt")
    assert same(load_network("resnet18", weights=tmp_path / "net.ckpt").model, own)


def test_weights_of_the_same_classes_keep_their_names(tmp_path):
    own = get_model("resnet18")
    found = load_network("resnet18", weights=saved(own, tmp_path / "tuned.pth"))
    assert same(found.model, own)
    assert found.categories[967] == "espresso"


def test_a_pickle_with_code_is_not_executed(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    for held in (Harm(), {"state_dict": {"fc.weight": Harm()}}):
        with (tmp_path / "net.pth").open("wb") as file:
            pickle.dump(held, file)
        with pytest.raises(WeightsError, match="execute code"):
            load_network("resnet18", weights=tmp_path / "net.pth")
    torch.save(get_model("resnet18"), tmp_path / "whole.pth")
    with pytest.raises(WeightsError, match="state_dict"):
        load_network("resnet18", weights=tmp_path / "whole.pth")
    assert not (tmp_path / "made").exists()


def test_old_releases_of_torch_read_safetensors_alone(tmp_path, monkeypatch):
    own = get_model("resnet18", num_classes=2)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    with pytest.raises(WeightsError, match=r"2\.9\.1 can execute code"):
        load_network("resnet18", weights=saved(own, tmp_path / "net.pth"))
    assert same(load_network("resnet18", weights=saved(own, tmp_path / "net.safetensors")).model, own)


def test_weights_that_do_not_fit(tmp_path):
    with pytest.raises(WeightsError, match="lacks 'layer"):
        load_network("resnet34", weights=saved(get_model("resnet18"), tmp_path / "net.pth"))
    with pytest.raises(WeightsError, match=r"has another shape of '[\w.]+' and \d+ more"):
        load_network("resnet50", weights=saved(get_model("wide_resnet50_2"), tmp_path / "net.pth"))
    for held in ({}, [1], {"epoch": 3}, torch.ones(2)):
        torch.save(held, tmp_path / "net.pth")
        with pytest.raises(WeightsError, match="no dictionary of tensors"):
            load_network("resnet18", weights=tmp_path / "net.pth")
    (tmp_path / "net.pth").write_bytes(b"nothing")
    for name in ("net.pth", "nowhere.pth", "nowhere.safetensors"):
        with pytest.raises(WeightsError, match=name):
            load_network("resnet18", weights=tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "cat\ndog\n", ("cat", "dog")),
        ("a.json", '["cat", "dog"]', ("cat", "dog")),
        ("a.json", '{"1": "dog", "0": "cat"}', ("cat", "dog")),
        ("a.json", '{"1": "dog"}', "no class '0'"),
        ("a.json", "[1, 2]", "list of names"),
        ("a.json", "[", "Cannot read class names"),
        ("a.txt", "cat\n", "has 2 classes, but `classes` has 1 names"),
    ],
)
def test_files_of_class_names(tmp_path, name, text, expected):
    weights = saved(get_model("resnet18", num_classes=2), tmp_path / "net.pth")
    (tmp_path / name).write_text(text)
    if isinstance(expected, tuple):
        assert load_network("resnet18", weights=weights, classes=tmp_path / name).categories == expected
    else:
        with pytest.raises((InputError, ModelError), match=expected):
            load_network("resnet18", weights=weights, classes=tmp_path / name)


FILE = """
from neighbour import WIDTH
import torch
from torch import nn
from torchvision import transforms
import parchgrad as pg

def make():
    return nn.Sequential(nn.Conv2d(3, WIDTH, 8, 8), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 3))

def classifier():
    steps = [transforms.Resize((32, 32)), transforms.ToTensor(), transforms.Normalize((0.1, 0.2, 0.3), (1, 1, 1))]
    return pg.Classifier(make(), transforms.Compose(steps), ("a", "b", "c"), "mine")

network = make()
number = 3
def wrong():
    return [make()]
def broken():
    raise KeyError("out of the user's own code")
"""


@pytest.fixture
def networks(tmp_path, monkeypatch):
    # Another name for each test: modules are imported once.
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "neighbour.py").write_text("WIDTH = 8\n")
    (folder / "own.py").write_text(FILE)
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    monkeypatch.delitem(sys.modules, "neighbour", raising=False)
    return folder


@pytest.mark.parametrize("place", ["own", "own.py", "./own.py", "absolute"])
def test_functions_make_networks(networks, place):
    place = str(networks / "own.py") if place == "absolute" else place
    found = load_network(f"{place}:classifier")
    assert (found.categories, found.name, found.preprocess.mean) == (("a", "b", "c"), "mine", (0.1, 0.2, 0.3))
    assert not found.model.training
    for function in ("make", "network"):
        with pytest.warns(ModelWarning, match="without preprocessing"):
            found = load_network(f"{place}:{function}")
        assert found.categories == ("class 0", "class 1", "class 2")
        assert (found.name, found.preprocess.mean) == (f"{place}:{function}", (0.485, 0.456, 0.406))
    own = small = load_network(f"{place}:classifier").model
    found = load_network(f"{place}:classifier", weights=saved(small, networks / "w.safetensors"))
    assert same(found.model, own)


def test_modules_of_timm_and_hugging_face_bring_what_they_know(networks):
    (networks / "known.py").write_text(
        "import timm, transformers\n"
        "def of_timm():\n    return timm.create_model('vit_tiny_patch16_224', num_classes=4)\n"
        "def of_hugging_face():\n"
        "    names = {0: 'cat', 1: 'dog'}\n"
        "    return transformers.ResNetForImageClassification(transformers.ResNetConfig(\n"
        "        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], id2label=names))\n"
    )
    found = load_network("known.py:of_timm")
    assert (found.preprocess.mean, found.categories) == ((0.5,) * 3, tuple(f"class {index}" for index in range(4)))
    with pytest.warns(ModelWarning, match="without preprocessing"):
        assert load_network("known.py:of_hugging_face").categories == ("cat", "dog")


def test_functions_that_make_none(networks):
    for name, words in (
        ("own.py:number", "returns a int"),
        ("own.py:wrong", "returns a list"),
        ("own.py:nothing", "no function 'nothing'"),
        ("nowhere.py:make", "no file 'nowhere.py'"),
        ("nowhere:make", "no module 'nowhere'"),
        ("own.py", "is a file"),
        ("mine.pth", "`weights=`"),
        ("resnet19", "resnet18"),
    ):
        with pytest.raises(ModelError, match=words):
            load_network(name)
    # Mistakes in the user's own code are shown as they are.
    with pytest.raises(KeyError, match="own code"):
        load_network("own.py:broken")
    (networks / "needs.py").write_text("import a_package_that_is_missing\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_missing"):
        load_network("needs:make")


def test_names_are_checked_without_running_anything(networks):
    (networks / "loud.py").write_text("raise SystemExit('was run')\n")
    check_network_name("loud.py:make")
    check_network_name("hf-hub:timm/resnet18.a1_in1k")
    with pytest.raises(ModelError):
        check_network_name("missing.py:make")


def test_logits_are_extracted_in_every_use_of_a_classifier(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small_network(dtype=torch.float32)

        def forward(self, x):
            logits = self.body(x)
            return logits - 5, logits

    preprocess, names = pg.load_model("shapes").preprocess, tuple("abcde")
    pair = Pair().eval()
    found = pg.Classifier(pair, preprocess, names, "pair", logits=lambda output: output[1])
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(found.model(x), pair.body(x))
    # The same layers under the same names, and the network itself as it was.
    assert [*found.model.named_parameters()] == [*pair.named_parameters()]
    assert isinstance(pair(x), tuple)
    assert [row[0].index for row in found.predict(x)] == pair.body(x).argmax(1).tolist()
    assert replace(found, name="other").model is found.model
    attribution = pg.Explainer(found.model, layers=["body.2"]).attribute(x, 1)
    assert torch.equal(attribution, pg.Explainer(pair.body, layers=["2"]).attribute(x, 1))
    evaluated = tmp_path / "run"
    images = LabelledImages([(image, 1) for image in x], categories=names)
    evaluate(found.model, images, [Setting(), Setting(method="grad_cam")], evaluated, scores=SPARSITY)
    plain = tmp_path / "plain"
    evaluate(pair.body, images, [Setting(), Setting(method="grad_cam")], plain, scores=SPARSITY)
    assert [row["gini"] for row in read_rows(evaluated)] == [row["gini"] for row in read_rows(plain)]
    with pytest.raises(ModelError, match="logits"):
        pg.Classifier(pair, preprocess, names, "pair").predict(x)


def test_neighbours_of_two_networks_do_not_meet(tmp_path):
    for name, classes in (("one", 3), ("other", 7)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "layers.py").write_text(f"CLASSES = {classes}\n")
        (tmp_path / name / "net.py").write_text(
            "import parchgrad as pg\nfrom layers import CLASSES\n"
            "def make():\n    return pg.load_model('shapes', pretrained=False, num_classes=CLASSES)\n"
        )
    before = list(sys.path)
    found = [load_network(f"{tmp_path / name}/net.py:make") for name in ("one", "other")]
    assert [len(each.categories) for each in found] == [3, 7]
    assert sys.path == before
    assert "layers" not in sys.modules


def test_heads_of_training_are_left_out(tmp_path):
    own = get_model("inception_v3", num_classes=2, init_weights=False)
    found = load_network("inception_v3", weights=saved(own, tmp_path / "net.safetensors"))
    assert len(found.categories) == 2
    held = found.model.state_dict()
    assert held.keys() == {name for name in own.state_dict() if not name.startswith("AuxLogits.")}
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in held.items())


def test_networks_of_other_dtypes_are_counted(networks):
    (networks / "precise.py").write_text("from own import make as single\ndef make():\n    return single().double()\n")
    with pytest.warns(ModelWarning, match="without preprocessing"):
        assert len(load_network("precise.py:make").categories) == 3
