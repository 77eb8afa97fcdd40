import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

import parchgrad as pg
from parchgrad._io.files import locked
from parchgrad.data.folders import PhotographFolder
from parchgrad.data.images import read_image
from parchgrad.data.preprocessing import Preprocessing
from parchgrad.data.samples import DrawnSamples
from parchgrad.errors import ImageError, InputError, ModelError, ModelWarning, OutputError, SettingError
from parchgrad.evaluation.examples import EXAMPLES_FILE, Examples
from parchgrad.evaluation.rows import read_rows
from parchgrad.evaluation.runs import evaluate
from parchgrad.evaluation.scores import ScoreSettings
from parchgrad.evaluation.settings import Grid, Setting
from parchgrad.evaluation.sparsity import gini
from parchgrad.workflows.evaluation import DataSettings, EvaluationSettings, evaluate_all, open_data, read_settings
from tests.support import random_statistics, small_network

WHOLE = """
model = ["resnet18", "efficientnet_lite0"]
target = "predicted"
batch_size = 4
seed = 3
statistics = "held.safetensors"

[data]
name = "imagenet"
root = "photos"
annotations = "boxes"
count = 50
mosaics = 4

[grid]
methods = ["gradient", "smoothgrad"]
selectors = ["none", "class"]
quantiles = [0.1, 0.3]
softnesses = ["none", 0, 0.5]
layers = ["none", "published", 0.5, ["layer4.*", "layer3.*"]]
gammas = ["inf", 2]
conserves = ["exact", "none"]
gates = ["none", 0, 2.5]
antialiases = [true, false]
balances = ["none", false, true]

[scores]
families = ["perturbation", "sparsity"]
ratios = [0.2, 0.4]
replacement = "blur"
"""


def written(tmp_path, text):
    path = tmp_path / "study.toml"
    path.write_text(text)
    return path


def test_a_file_says_all_settings(tmp_path):
    assert read_settings(written(tmp_path, WHOLE)) == EvaluationSettings(
        models=("resnet18", "efficientnet_lite0"),
        target="predicted",
        batch_size=4,
        seed=3,
        statistics="held.safetensors",
        data=DataSettings(name="imagenet", root="photos", annotations="boxes", count=50, mosaics=4),
        grid=Grid(
            methods=("gradient", "smoothgrad"),
            selectors=(None, "class"),
            quantiles=(0.1, 0.3),
            softnesses=(None, 0.0, 0.5),
            layers=(None, "published", 0.5, ("layer4.*", "layer3.*")),
            gammas=(math.inf, 2.0),
            # "none" is a value of its own here.
            conserves=("exact", "none"),
            gates=(None, 0.0, 2.5),
            antialiases=(True, False),
            balances=(None, False, True),
        ),
        scores=ScoreSettings(families=("perturbation", "sparsity"), ratios=(0.2, 0.4), replacement="blur"),
    )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('model = ["resnet18", "efficientnet_lite0"]', "", "does not set `model`"),
        ("quantiles", "quantile", r"'quantile' in \[grid\].* 'quantiles'"),
        ("[scores]", "[score]", "'score' in the settings.* 'scores'"),
        ('name = "imagenet"', 'name = "imagnet"', r"'data\.name' .* is 'imagnet'.*'shapes', 'folder'"),
        ('name = "imagenet"', "", r"'data\.name' is missing"),
        ('annotations = "boxes"', "", r"'imagenet' needs 'annotations'.* `annotations`"),
        ('"perturbation"', '"faithful"', r"'scores\.families' .* is 'faithful'.* 'perturbation'"),
        ("mosaics = 4", "mosaics = -4", "`mosaics` is -4"),
        ("count = 50", 'count = "many"', r"'data\.count' .* is 'many'.* integer"),
        ("count = 50", "count = true", r"'data\.count' .* is True"),
        ("mosaics = 4", "mosaics = 4.0", r"'data\.mosaics' .* is 4\.0"),
        ("mosaics = 4", "confidence = [0.9]", r"'data\.confidence' .* is \[0\.9\]"),
        ("mosaics = 4", f"confidence = {10**400}", "confidence"),
        ("count = 50", "count = 2026-11-30", "date"),
        ('root = "photos"', "root = 7", r"'data\.root' .* is 7"),
        ("[0.1, 0.3]", '[0.1, "x"]', r"'grid\.quantiles' .* is 'x'.* number"),
        ("layers = [", "layers = [true, ", r"'grid\.layers' .* is True"),
        ('"inf"', '"infinite"', r"'grid\.gammas' .* is 'infinite'"),
        ('"exact"', '"all"', r"'grid\.conserves' .* is 'all'.* 'energy', 'independent'"),
        ("[true, false]", '"on"', r"'grid\.antialiases' .* is 'on'"),
        ("[true, false]", "1", r"'grid\.antialiases' .* is 1"),
        ('["none", false, true]', '"on"', r"'grid\.balances' .* is 'on'"),
        ('["none", false, true]', "1", r"'grid\.balances' .* is 1"),
        ('["none", 0, 2.5]', '"wide"', r"'grid\.gates' .* is 'wide'"),
        ('"predicted"', '"best"', "'target' .* is 'best'.* 'label' or 'predicted'"),
        ("[data]", "[data.more]", r"'more' in \[data\]"),
        ("[scores]", "[[scores]]", r"'scores' .* is \[\{"),
        ('["resnet18", "efficientnet_lite0"]', "18", "'models' .* is 18"),
    ],
)
def test_mistakes_are_said_in_words(tmp_path, old, new, words):
    assert old in WHOLE
    with pytest.raises(SettingError, match=words):
        read_settings(written(tmp_path, WHOLE.replace(old, new)))


def test_a_single_value_is_a_list_of_one(tmp_path):
    path = written(
        tmp_path,
        'model = "shapes"\n[data]\nname = "shapes"\ncount = 2\nblur = 1\n[grid]\nquantiles = 0.2\ngammas = "inf"\n'
        'layers = 1\nselectors = "none"\nmethods = "smoothgrad"\n[scores]\nfamilies = "sparsity"\nratios = 1',
    )
    found = read_settings(path)
    assert found == EvaluationSettings(
        models=("shapes",),
        data=DataSettings(name="shapes", count=2, blur=1.0),
        grid=Grid(methods=("smoothgrad",), selectors=(None,), quantiles=(0.2,), layers=(1.0,), gammas=(math.inf,)),
        scores=ScoreSettings(families=("sparsity",), ratios=(1.0,)),
    )
    assert all(isinstance(value, float) for value in (found.data.blur, *found.grid.layers, *found.scores.ratios))


def test_overrides_go_before_the_file_and_need_none(tmp_path):
    path, whole = written(tmp_path, WHOLE), read_settings(written(tmp_path, WHOLE))
    nothing = {
        "model": None,
        "seed": None,
        "data": {"root": None, "count": None},
        "grid": {},
        "scores": {"steps": None},
    }
    assert read_settings(path, nothing) == whole
    given = {"model": ["vgg16"], "seed": 0, "data": {"count": 7}, "grid": {"layers": ["all", ["conv1"]]}}
    assert read_settings(path, given) == replace(
        whole,
        models=("vgg16",),
        seed=0,
        data=replace(whole.data, count=7),
        grid=replace(whole.grid, layers=("all", ("conv1",))),
    )
    alone = {"model": "shapes", "data": {"name": "shapes", "count": 3}}
    assert read_settings(None, alone) == EvaluationSettings(
        models=("shapes",), data=DataSettings(name="shapes", count=3)
    )
    with pytest.raises(SettingError, match="does not set `model` and `data`"):
        read_settings(None, nothing)
    with pytest.raises(SettingError, match=r"'data' .* is 'shapes'"):
        read_settings(written(tmp_path, 'model = "shapes"\ndata = "shapes"'), given)


def test_settings_made_in_python_are_checked_too():
    with pytest.raises(SettingError, match=r"`name` is 'imagnet'.* shapes, folder"):
        DataSettings(name="imagnet")
    with pytest.raises(SettingError, match="`families` contains 'faithfulness'"):
        ScoreSettings(families=("faithfulness",))


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.toml'"):
        read_settings(tmp_path / "nowhere.toml")
    with pytest.raises(InputError, match="is not valid TOML"):
        read_settings(written(tmp_path, "model = \n"))
    with pytest.raises(SettingError, match="does not set `data`"):
        read_settings(written(tmp_path, 'model = "resnet18"'))


@pytest.fixture
def photographs(tmp_path):
    for place in range(12):
        folder = tmp_path / "photos" / f"class {place % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((10, 9), 20 + 10 * place).convert("RGB").save(folder / f"{place}.png")
    return tmp_path / "photos"


@pytest.fixture
def classifier(monkeypatch):
    transform = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])
    made = pg.Classifier(
        small_network(dtype=torch.float32),
        Preprocessing(transform, (0.0,) * 3, (1.0,) * 3),
        tuple(f"class {index}" for index in range(5)),
        "small",
    )
    monkeypatch.setattr("parchgrad.workflows.evaluation.load_network", lambda name, **files: replace(made, name=name))
    monkeypatch.setattr("parchgrad.workflows.evaluation.check_network_name", lambda name: None)
    return made


def test_folders_are_opened_with_the_classes_of_the_model(photographs, classifier):
    data = open_data(DataSettings(name="folder", root=str(photographs)), classifier)
    assert len(data) == 12
    for index in range(12):
        sample = data[index]
        assert sample.name.startswith(f"class {sample.label}/")
        assert sample.image.shape == (3, 8, 8)
    drawn = open_data(DataSettings(name="folder", root=str(photographs), count=5, seed=2), classifier)
    names = [drawn[index].name for index in range(5)]
    assert len(set(names)) == 5
    assert set(names) < {data[index].name for index in range(12)}
    again = open_data(DataSettings(name="folder", root=str(photographs), count=5, seed=2), classifier)
    assert drawn.fingerprint == again.fingerprint
    other = open_data(DataSettings(name="folder", root=str(photographs), count=5, seed=3), classifier)
    assert drawn.fingerprint != other.fingerprint
    with pytest.raises(SettingError, match="count` is 13, but it must be from 1 to 12"):
        DrawnSamples(data, count=13)


def test_data_may_be_made_harder_or_into_mosaics(photographs, classifier):
    plain = open_data(DataSettings(name="folder", root=str(photographs)), classifier)
    shuffled = open_data(DataSettings(name="folder", root=str(photographs), jigsaw=3), classifier)
    assert not torch.equal(shuffled[0].image, plain[0].image)
    assert torch.equal(shuffled[0].image.flatten().sort().values, plain[0].image.flatten().sort().values)
    blurred = open_data(DataSettings(name="folder", root=str(photographs), blur=1.0), classifier)
    assert blurred[0].image.var() < plain[0].image.var()
    mosaics = open_data(DataSettings(name="folder", root=str(photographs), mosaics=1, confidence=0.0), classifier)
    assert (len(mosaics), mosaics[0].image.shape) == (4, (3, 16, 16))


def test_data_that_is_not_there_is_said(tmp_path, photographs, classifier):
    for name in ("cifar10", "cifar100", "mnist", "fashion_mnist"):
        with pytest.raises(ImageError, match=f"does not contain torchvision's {name}"):
            open_data(DataSettings(name=name, root=str(tmp_path)), classifier)
    with pytest.raises(ImageError, match="outside class folders"):
        open_data(DataSettings(name="folder", root=str(photographs / "class 0")), classifier)


@pytest.mark.parametrize("flat", [True, False])
def test_predicted_classes_need_no_labels(tmp_path, photographs, classifier, flat):
    root = tmp_path / "mine"
    for index, file in enumerate(sorted(photographs.rglob("*.*"))[:4]):
        # Folders that are named after no class.
        folder = root if flat else root / f"shelf {'abab'[index]}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / f"{index}{file.suffix}")
    settings = {"name": "folder", "root": str(root)}
    asked = EvaluationSettings(
        models=("small",),
        data=DataSettings(**settings),
        scores=ScoreSettings(families=("sparsity",)),
        target="predicted",
    )
    (run,) = evaluate_all(asked, tmp_path / "out")
    transform = classifier.preprocess
    files = {file.relative_to(root).as_posix(): file for file in root.rglob("*.*")}
    for row in read_rows(run):
        expected = int(classifier.model(transform(read_image(files[row["image"]])).unsqueeze(0)).argmax())
        assert row["target"] == row["predicted"] == row["label"] == expected
    for labelled in (replace(asked, target="label"), replace(asked, data=DataSettings(**settings, mosaics=1))):
        with pytest.raises(ImageError, match="target='predicted'"):
            evaluate_all(labelled, tmp_path / "other")


def test_folders_of_torchvision_and_this_package_are_evaluated_in_python(tmp_path, photographs, classifier):
    settings, scores = [Setting(), Setting(selector="energy")], ScoreSettings(families=("sparsity",))
    whole, own = ImageFolder(photographs, classifier.preprocess), PhotographFolder(photographs, classifier.preprocess)
    data = {
        "torchvision": Subset(whole, range(0, 12, 3)),
        "labelled": Subset(own.with_categories(classifier.categories), range(0, 12, 3)),
    }
    found = {}
    for name, images in data.items():
        evaluate(classifier.model, images, settings, tmp_path / name, scores=scores)
        found[name] = {(row["setting"], row["image"], row["label"], row["gini"]) for row in read_rows(tmp_path / name)}
    assert found["torchvision"] == found["labelled"]
    assert len(found["labelled"]) == 8
    evaluate(classifier.model, own, settings, tmp_path / "alone", scores=scores, target="predicted")
    with pytest.raises(InputError, match="has no label"):
        evaluate(classifier.model, own, settings, tmp_path / "none", scores=scores)
    # The labels of fewer folders than classes would be those of other classes.
    shutil.rmtree(shutil.copytree(photographs, tmp_path / "fewer") / "class 2")
    with pytest.raises(InputError, match="has 4 classes, but the model has 5"):
        evaluate(classifier.model, ImageFolder(tmp_path / "fewer", classifier.preprocess), settings, tmp_path / "no")


def test_every_model_has_a_run_that_goes_on(tmp_path, photographs, classifier):
    names = ("small", "hf-hub:someone/other@v2")
    asked = EvaluationSettings(
        models=names,
        data=DataSettings(name="folder", root=str(photographs), count=4),
        scores=ScoreSettings(families=("sparsity",)),
        grid=Grid(layers=("all",)),
    )
    told = []
    runs = evaluate_all(asked, tmp_path / "out", on_progress=lambda *counts: told.append(counts))
    assert runs == (tmp_path / "out" / "small", tmp_path / "out" / "hf-hub--someone--other@v2")
    settings = len(asked.grid.settings())
    assert [counts[-1] for counts in told] == [4 * settings] * len(told)
    assert told[-1] == (names[1], 4 * settings, 4 * settings)
    for run, name in zip(runs, names, strict=True):
        rows = read_rows(run)
        assert len(rows) == 4 * settings
        assert {row["model"] for row in rows} == {name}
    told.clear()
    evaluate_all(asked, tmp_path / "out", on_progress=lambda *counts: told.append(counts))
    assert told == []


# Ten images leave classes with fewer than two, which the selector says.
@pytest.mark.filterwarnings("ignore::parchgrad.errors.StatisticsWarning")
def test_statistics_may_be_collected_in_the_run(tmp_path, photographs, classifier):
    others = shutil.copytree(photographs, tmp_path / "others")
    text = f"""
model = "small"
[data]
name = "folder"
root = "{photographs}"
count = 3
seed = 1
[statistics]
name = "folder"
root = "{others}"
count = 10
[grid]
selectors = ["class"]
quantiles = [0.34]
layers = ["all"]
[scores]
families = ["sparsity"]
"""
    asked = read_settings(written(tmp_path, text))
    assert asked.statistics == DataSettings(name="folder", root=str(others), count=10)
    (run,) = evaluate_all(asked, tmp_path / "out")
    rows = [row for row in read_rows(run) if row["selector"] == "class"]
    drawn = open_data(asked.statistics, classifier)
    pairs = [(drawn[index].image, drawn[index].label) for index in range(10)]
    selector = pg.ClassWise(pg.collect_statistics(classifier.model, pairs), quantile=0.34)
    explainer = pg.Explainer(classifier.model, selector, layers="all")
    images = open_data(asked.data, classifier)
    for row in rows:
        sample = images[row["index"]]
        heat = pg.heatmap(explainer.attribute(sample.image.unsqueeze(0), sample.label))
        assert row["gini"] == pytest.approx(gini(heat).item(), rel=1e-4)
    # They are collected once; other ones do not slip into the run.
    saved = (run / "statistics.safetensors").stat().st_mtime_ns
    evaluate_all(asked, tmp_path / "out")
    assert (run / "statistics.safetensors").stat().st_mtime_ns == saved
    with pytest.raises(SettingError, match=r"\[statistics\] and \[data\] have the same 'root'"):
        read_settings(written(tmp_path, text.replace(str(others), str(photographs))))
    with pytest.raises(SettingError, match="has statistics of other images"):
        evaluate_all(read_settings(written(tmp_path, text.replace("count = 10", "count = 9"))), tmp_path / "out")


@pytest.mark.usefixtures("classifier")
def test_statistics_are_not_collected_for_a_folder_that_would_be_refused(tmp_path, photographs, monkeypatch):
    others = shutil.copytree(photographs, tmp_path / "others")
    asked = EvaluationSettings(
        models=("small",),
        data=DataSettings(name="folder", root=str(photographs), count=3),
        statistics=DataSettings(name="folder", root=str(others), count=10),
        grid=Grid(selectors=("class",)),
    )
    run = tmp_path / "out" / "small"
    run.mkdir(parents=True)

    def collect(*_, **__):
        raise AssertionError("nothing is collected")

    monkeypatch.setattr("parchgrad.workflows.evaluation.collect_statistics", collect)
    with (
        locked(run / "statistics.safetensors"),
        pytest.raises(OutputError, match=r"'.*statistics\.safetensors' .*lock"),
    ):
        evaluate_all(asked, tmp_path / "out")
    (run / "rows-0.jsonl").touch()
    with pytest.raises(OutputError, match=r"'rows-0\.jsonl', .*'run\.json'"):
        evaluate_all(asked, tmp_path / "out")
    (run / "rows-0.jsonl").unlink()

    def slowly(*_, **__):
        (run / "statistics.safetensors").write_text("meanwhile")
        return random_statistics({"0": 6})

    monkeypatch.setattr("parchgrad.workflows.evaluation.collect_statistics", slowly)
    with pytest.raises(OutputError, match=r"statistics.safetensors' already exists"):
        evaluate_all(asked, tmp_path / "out")
    assert (run / "statistics.safetensors").read_text() == "meanwhile"


# Captum announces the hooks of guided backpropagation and DeepLift.
@pytest.mark.filterwarnings("ignore:Setting (backward|forward)")
def test_the_leaderboard_compares_the_methods_that_fit_and_names_the_others(tmp_path, photographs, classifier):
    statistics = random_statistics({"0": 6, "2": 6})
    statistics.save(tmp_path / "held.safetensors")
    asked = EvaluationSettings(
        models=("small",),
        data=DataSettings(name="folder", root=str(photographs), count=3),
        compare="leaderboard",
        scores=ScoreSettings(families=("sparsity",)),
        statistics=str(tmp_path / "held.safetensors"),
    )
    with pytest.warns(ModelWarning, match=r"small are left out: .*balance \(it equals the plain gradient"):
        (run,) = evaluate_all(asked, tmp_path / "out")
    rows = read_rows(run)
    images = open_data(asked.data, classifier)
    published = pg.ClassWise(statistics, quantile=0.1, softness=0)
    explainers = {
        "gradient": pg.Explainer(classifier.model, None),
        "ParchGrad": pg.Explainer(classifier.model),
        "ParchGrad, published": pg.Explainer(classifier.model, published, conserve="independent"),
    }
    assert {row["setting"] for row in rows} > {*explainers, "Grad-CAM", "occlusion", "random map"}
    for title, explainer in explainers.items():
        own = [row for row in rows if row["setting"] == title]
        assert len(own) == 3
        for row in own:
            sample = images[row["index"]]
            heat = pg.heatmap(explainer.attribute(sample.image.unsqueeze(0), sample.label))
            assert row["gini"] == pytest.approx(gini(heat).item(), rel=1e-4, nan_ok=True)
    # Without statistics of its own, a network has all but the published method.
    with pytest.warns(ModelWarning, match="left out"):
        (other,) = evaluate_all(replace(asked, statistics=None), tmp_path / "other")
    assert {row["setting"] for row in rows} - {row["setting"] for row in read_rows(other)} == {"ParchGrad, published"}


def test_every_model_is_known_before_the_first_is_evaluated(tmp_path):
    asked = EvaluationSettings(models=("shapes", "shapez"), data=DataSettings(name="shapes", count=2))
    with pytest.raises(ModelError, match="model 'shapez'"):
        evaluate_all(asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_statistics_of_generated_shapes_are_of_other_ones():
    shapes = DataSettings(name="shapes", count=5)
    with pytest.raises(SettingError, match="the same 'seed'"):
        EvaluationSettings(models=("shapes",), data=shapes, statistics=DataSettings(name="shapes", count=50))
    EvaluationSettings(models=("shapes",), data=shapes, statistics=DataSettings(name="shapes", count=50, seed=1))


def test_the_seed_is_that_of_random_controls(tmp_path, photographs, classifier):
    ginis = []
    for seed in (0, 1):
        asked = EvaluationSettings(
            models=("small",),
            data=DataSettings(name="folder", root=str(photographs), count=2),
            scores=ScoreSettings(families=("sparsity",)),
            grid=Grid(selectors=(None,)),
            seed=seed,
        )
        (run,) = evaluate_all(asked, tmp_path / f"{seed}")
        ginis.append([row["gini"] for row in read_rows(run) if row["setting"] == "random map"])
    assert ginis[0] != ginis[1]


def test_generated_shapes_are_for_the_network_that_knows_them(classifier):
    settings = DataSettings(name="shapes", count=6, seed=4)
    data = open_data(settings, pg.load_model("shapes"))
    assert len(data) == 6
    assert data[3].mask.any()
    with pytest.raises(SettingError, match="small does not classify generated shapes"):
        open_data(settings, classifier)


def test_examples_are_pictured_as_they_were_before_the_preprocessing(tmp_path):
    asked = EvaluationSettings(
        models=("shapes",), data=DataSettings(name="shapes", count=2), grid=Grid(layers=("all",))
    )
    (run,) = evaluate_all(asked, tmp_path)
    found = Examples.load(run / EXAMPLES_FILE)
    data = open_data(asked.data, pg.load_model("shapes"))
    for example, picture in zip(found.choice.examples, found.pictures, strict=True):
        # Generated pictures are in whole levels, of which nothing is lost.
        levels = ((data[example.index].image * 0.25 + 0.5) * 255).round().permute(1, 2, 0)
        np.testing.assert_array_equal(picture, levels.numpy())
