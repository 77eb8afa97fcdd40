import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import parchgrad as pg
from parchgrad.data.preprocessing import Preprocessing
from parchgrad.data.samples import Sample
from parchgrad.errors import InputError, OutputError, SettingError
from parchgrad.evaluation.examples import EXAMPLES_FILE, Choice, Example, Examples, choose_examples, make_examples
from parchgrad.evaluation.methods import grad_cam
from parchgrad.evaluation.rows import read_rows
from parchgrad.evaluation.runs import evaluate
from parchgrad.evaluation.scores import ScoreSettings
from parchgrad.evaluation.settings import Grid, Setting
from parchgrad.visual.maps import normalise
from tests.support import Noise, small_network

EDIT = "gradient, energy 0.1, all layers"
OTHER = "gradient, activation 0.1, all layers"
TWIN = "gradient, random 0.1, all layers"
SELECTORS = {EDIT: "energy", OTHER: "activation", TWIN: "random"}


def rows_of(score="aopc", **columns):
    """Rows of the settings with these scores of their images; NaN for None, as `read_rows` gives it."""
    return [
        {
            "setting": title,
            "selector": SELECTORS.get(title, math.nan),
            "index": index,
            "image": f"image {index}",
            "label": index,
            "target": index + 1,
            "predicted": index + 2,
            score: math.nan if value is None else value,
        }
        for title, values in columns.items()
        for index, value in enumerate(values)
    ]


def indices(examples):
    return [example.index for example in examples]


def test_the_largest_and_the_smallest_gains_are_chosen():
    rows = rows_of(
        **{
            "gradient": [0.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0, None, 0.0],
            "random map": [99.0] * 9,
            "Grad-CAM": [50.0, None, 52.0, 53.0, 54.0, 55.0, 56.0, 57.0, 58.0],
            TWIN: [80.0] * 9,
            OTHER: [1.0] * 9,
            EDIT: [4.0, 0.0, 0.0, 8.0, 7.0, 1.0, 2.0, 9.0, None],
        }
    )
    choice = choose_examples(rows)
    assert (choice.score, choice.leading) == ("aopc", EDIT)
    assert choice.settings == ("gradient", EDIT, "Grad-CAM")
    # Gains: 4, -1, -2, 5, 7, 1, 2, none, none.
    assert indices(choice.best) == [4, 3, 0]
    assert indices(choice.worst) == [2, 1, 5]
    assert [example.gain for example in choice.examples] == [7, 5, 4, -2, -1, 1]
    assert choice.worst[1] == Example(
        index=1, image="image 1", label=1, target=2, predicted=3, values=(1.0, 0.0, None), gain=-1.0
    )
    assert choose_examples(rows) == choice


def test_of_a_score_that_is_better_low_the_lowest_wins():
    choice = choose_examples(
        rows_of(
            "deletion",
            **{"gradient": [0.5] * 6, OTHER: [0.6] * 6, EDIT: [0.1, 0.2, 0.3, 0.7, 0.8, 0.4]},
        )
    )
    assert (choice.score, choice.leading) == ("deletion", EDIT)
    assert indices(choice.best) == [0, 1, 2]
    assert indices(choice.worst) == [4, 3, 5]
    assert choice.best[0].gain == pytest.approx(0.4)
    alone = choose_examples(rows_of("deletion", **{EDIT: [0.1, 0.2]}))
    assert (indices(alone.best), indices(alone.worst), alone.settings) == ([0], [1], (EDIT,))


def test_the_first_headline_with_values_counts():
    columns = {"gradient": [0.0, 0.0], EDIT: [0.1, 0.3]}
    rows = rows_of("mass_inside", **columns)
    assert choose_examples([{**row, "aopc": math.nan, "pointing_game": 1.0} for row in rows]).score == "mass_inside"
    assert choose_examples([{**row, "aopc": 1.0} for row in rows]).score == "aopc"
    assert choose_examples(rows_of("gini", **columns)) is None
    assert choose_examples([]) is None


@pytest.mark.parametrize(
    ("values", "best", "worst"),
    [
        ([5, 4, 3, 2, 1, 0], [0, 1, 2], [5, 4, 3]),
        ([0, 1, 2, 3, 4], [4, 3, 2], [0, 1]),
        ([0, 1, 2, 3], [3, 2], [0, 1]),
        ([0, None, 2, None, 3], [4, 2], [0]),
        ([1], [0], []),
        # Of images that are alike the first are best, the last are worst.
        ([1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 2], [7, 6, 5]),
        ([0, 1, 1, 0, 1, 1, 0], [1, 2, 4], [6, 3, 0]),
    ],
)
def test_no_image_is_shown_twice(values, best, worst):
    choice = choose_examples(rows_of(**{"gradient": [0.0] * len(values), EDIT: values}))
    assert (indices(choice.best), indices(choice.worst)) == (best, worst)


def test_who_leads():
    plain = {"gradient": [0.0, 0.0], "random map": [9.0, 9.0], "Grad-CAM": [9.0, 9.0], "centre blob": [9.0, 9.0]}
    assert choose_examples(rows_of(**plain)) is None
    assert choose_examples(rows_of(**plain, **{TWIN: [5.0, 6.0]})) is None
    # Where nothing is edited by chosen channels, another method may lead.
    others = {TWIN: [5.0, 6.0], "SmoothGrad": [0.1, 0.2], "saliency": [0.1, 0.1]}
    assert choose_examples(rows_of(**plain, **others)).leading == "SmoothGrad"
    assert choose_examples(rows_of(**plain, **others, **{EDIT: [0.0, 0.1]})).leading == EDIT
    controls = [{**row, "masks": "another"} for row in rows_of(**{OTHER: [8.0, 9.0]})]
    assert choose_examples([*rows_of(**plain, **{EDIT: [0.0, 0.1]}), *controls]).leading == EDIT
    # Of equals the first; one without scores is none of them.
    assert choose_examples(rows_of(**plain, **{OTHER: [1.0, 2.0], EDIT: [2.0, 1.0]})).leading == OTHER
    assert choose_examples(rows_of(**plain, **{OTHER: [None, None], EDIT: [2.0, 1.0]})).leading == EDIT
    assert choose_examples(rows_of(**plain, **{EDIT: [None, None]})) is None
    unmatched = {"gradient": [0.0, None], EDIT: [None, 1.0]}
    assert choose_examples(rows_of(**unmatched)) is None


class Pictures:
    """Images of several sizes and one or three channels, which hold their own places."""

    categories, fingerprint = ("a", "b"), "pictures"

    def __init__(self, channels=3):
        self.channels = channels

    def __len__(self):
        return 3

    def __getitem__(self, index):
        shape = (self.channels, 5, 6 + index)
        image = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) - 7
        return Sample(image=image, label=index % 2, name=f"{index}")


def chosen(count=3, settings=("one", "two")):
    examples = tuple(
        Example(index=index, image=f"{index}", label=index, target=0, predicted=1, values=(0.5, None), gain=0.25)
        for index in range(count)
    )
    return Choice(score="aopc", leading="two", settings=settings, best=examples[:2], worst=examples[2:])


METHODS = {
    "one": lambda images, target: images.abs().mean(1) * 1e-9,
    "two": lambda images, target: images.abs().mean(1) * math.nan,
}


def made(channels=3, picture=None):
    model = torch.nn.Linear(1, 1).double()
    return make_examples(chosen(), Pictures(channels), METHODS, model=model, picture=picture)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_pictures_and_maps_are_those_of_the_images(channels):
    data, found = Pictures(channels), made(channels)
    assert found.categories == {0: "a", 1: "b", 2: "class 2"}
    for index in range(3):
        image = data[index].image.numpy()
        scaled = (image - image.min()) / (image.max() - image.min())
        expected = scaled.transpose(1, 2, 0) if channels == 3 else np.stack([scaled.mean(0)] * 3, axis=2)
        np.testing.assert_allclose(found.pictures[index] / 255, expected, atol=0.5001 / 255)
        assert found.maps[index].shape == (2, 5, 6 + index)
        # However small the numbers are.
        np.testing.assert_allclose(found.maps[index][0] / 255, normalise(abs(image).mean(0)), atol=0.5001 / 255)
        assert not found.maps[index][1].any(), "what is not finite is blank"


def test_each_map_has_its_own_scale():
    methods = {"one": lambda images, target: images.abs().mean(1), "two": lambda images, target: images[:, 0] ** 4}
    found = make_examples(chosen(), Pictures(), methods, model=torch.nn.Linear(1, 1).double())
    for index in range(3):
        image = Pictures()[index].image.double().numpy()
        heats = [abs(image).mean(0), image[0] ** 4]
        for levels, heat in zip(found.maps[index], heats, strict=True):
            expected = np.clip(heat / np.percentile(heat, 99.5), 0, 1)
            np.testing.assert_allclose(levels / 255, expected, atol=0.5001 / 255)


def test_pictures_may_be_made_by_the_preprocessing():
    preprocessing = Preprocessing(transform=None, mean=(0.5,), std=(0.01,))
    found = made(1, picture=preprocessing.picture)
    expected = (Pictures(1)[1].image[0].numpy() * 0.01 + 0.5).clip(0, 1)
    np.testing.assert_allclose(found.pictures[1][..., 2] / 255, expected, atol=0.5001 / 255)
    with pytest.raises(SettingError, match=r"`picture` .*\(5, 6\).*\(5, 6, 3\)"):
        made(1, picture=lambda image: image[0].numpy())
    flat = made(1, picture=lambda image: np.full((*image.shape[1:], 3), 2.0))
    assert (flat.pictures[0] == 255).all()


def test_an_image_of_one_value_is_black():
    class Flat(Pictures):
        def __getitem__(self, index):
            return Sample(image=torch.ones(3, 4, 4), label=0, name="flat")

    found = make_examples(chosen(), Flat(), METHODS, model=torch.nn.Linear(1, 1))
    assert not found.pictures[0].any()


def test_the_file_gives_back_what_it_was_given(tmp_path):
    path, examples = tmp_path / "new" / EXAMPLES_FILE, made()
    examples.save(path)
    read = Examples.load(path)
    assert read.choice == examples.choice
    assert read.categories == examples.categories
    for kind in ("pictures", "maps"):
        for one, other in zip(getattr(read, kind), getattr(examples, kind), strict=True):
            np.testing.assert_array_equal(one, other)
    assert [file.name for file in path.parent.iterdir()] == [EXAMPLES_FILE]
    with pytest.raises(OutputError):
        examples.save(path / "below")


def damaged(path, tensors=None, **header):
    """Another file of the same examples, changed."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        held = json.loads(file.read(length))["__metadata__"]
    save_file({**load_file(path), **(tensors or {})}, path, {**held, **header})


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_bytes(b"{}"),
        lambda path: path.unlink(),
        lambda path: save_file({"weight": np.zeros(3)}, path),
        lambda path: damaged(path, format="parchgrad examples 0"),
        # Its maps had a scale each.
        lambda path: damaged(path, format="parchgrad examples 1"),
        lambda path: damaged(path, choice="{"),
        lambda path: damaged(path, choice="[]"),
        lambda path: damaged(path, choice="{}"),
        lambda path: damaged(path, categories='[[0, "a"]]'),
        lambda path: damaged(path, categories="[0]"),
        lambda path: damaged(path, {"maps/1": np.zeros((2, 5, 5), np.uint8)}),
        lambda path: damaged(path, {"picture/1": np.zeros((5, 7, 3), np.float32)}),
        lambda path: damaged(path, {"picture/1": np.zeros((5, 7), np.uint8)}),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / EXAMPLES_FILE
    made().save(path)
    damage(path)
    with pytest.raises(InputError, match=r"examples.safetensors' .*run the evaluation again"):
        Examples.load(path)


SETTINGS = (
    Setting(),
    Setting(method="grad_cam"),
    Setting(selector="energy", quantile=0.34, layers=("0", "2"), gamma=2.0, conserve="exact"),
    Setting(selector="activation", quantile=0.34, layers="all"),
)


def run(folder, settings=SETTINGS, data=None, **options):
    scores = ScoreSettings(ratios=(0.2, 0.6), tolerance=1)
    evaluate(small_network(), data or Noise(8), settings, folder, scores=scores, batch_size=3, **options)
    return folder / EXAMPLES_FILE


def test_a_run_keeps_its_examples(tmp_path):
    found = Examples.load(run(tmp_path))
    rows = read_rows(tmp_path)
    assert found.choice == choose_examples(rows)
    # Chosen anew from the rows, slowly.
    aopc = {(row["setting"], row["index"]): row["aopc"] for row in rows}
    titles = [setting.title for setting in SETTINGS]
    leading = max(titles[2:], key=lambda title: sum(aopc[title, index] for index in range(8)))
    by_gain = sorted(range(8), key=lambda index: aopc[leading, index] - aopc["gradient", index])
    assert found.choice.leading == leading
    assert indices(found.choice.best) == by_gain[:-4:-1]
    assert indices(found.choice.worst) == by_gain[:3]
    assert found.choice.settings == ("gradient", leading, "Grad-CAM")
    network, data = small_network(), Noise()
    for place, example in enumerate(found.choice.examples):
        sample = data[example.index]
        assert (example.image, example.label, example.target) == (sample.name, sample.label, sample.label)
        assert example.values == tuple(aopc[title, example.index] for title in found.choice.settings)
        images, target = sample.image.double().unsqueeze(0), torch.tensor([sample.label])
        for row, method in ((0, pg.Explainer(network, None)), (2, grad_cam(network))):
            heat = method(images, target) if row else pg.heatmap(method.attribute(images, target))
            assert_is_drawn(found.maps[place][row], heat[0])


def assert_is_drawn(levels, heat):
    """The map at some scale, which others of the image share, and clipped there."""
    heat, shown = np.asarray(heat), levels < 255
    # Dim levels are rounded too much.
    bright = shown & (levels > 0.6 * levels[shown].max())
    top = 255 * float(np.median(heat[bright] / levels[bright]))
    np.testing.assert_allclose(levels / 255, np.clip(heat / top, 0, 1), atol=1.5 / 255)


def test_a_setting_is_had_back_from_its_rows(tmp_path):
    # Only the settings of the first call are in the second one.
    only_edit = run(tmp_path / "edit", SETTINGS[2:3])
    assert Examples.load(only_edit).choice.settings == (SETTINGS[2].title,)
    first = Examples.load(run(tmp_path / "both", SETTINGS[:3]))
    only_edit.unlink()
    run(tmp_path / "edit", SETTINGS[:2])
    again = Examples.load(only_edit)
    assert again.choice.settings == first.choice.settings == ("gradient", SETTINGS[2].title, "Grad-CAM")
    for one, other in zip(again.maps, first.maps, strict=True):
        np.testing.assert_allclose(one.astype(int), other.astype(int), atol=1)


def test_a_run_that_goes_on_makes_them_anew_and_a_finished_one_does_not(tmp_path):
    path = run(tmp_path, SETTINGS[:1])
    assert not path.exists(), "nothing competes"
    run(tmp_path, SETTINGS[:3])
    before, stamp = Examples.load(path).choice, path.stat().st_mtime_ns
    assert before.leading == SETTINGS[2].title

    class Untouched(Noise):
        def __getitem__(self, index):
            raise AssertionError("nothing is loaded again")

    run(tmp_path, SETTINGS[:3], Untouched(8))
    run(tmp_path, SETTINGS[:1], Untouched(8))
    assert path.stat().st_mtime_ns == stamp
    second = Grid(selectors=("energy", "activation"), layers=("all",), quantiles=(0.34, 0.5, 0.7)).settings()
    run(tmp_path, second)
    after = Examples.load(path).choice
    assert after == choose_examples(read_rows(tmp_path)) != before
    # A damaged file is made anew.
    path.write_bytes(path.read_bytes()[:100])
    run(tmp_path, second)
    assert Examples.load(path).choice == after
    # And so is one of an earlier release.
    damaged(path, format="parchgrad examples 1")
    run(tmp_path, second)
    assert Examples.load(path).choice == after


def test_an_unfinished_run_keeps_nothing(tmp_path):
    path = run(tmp_path, process=(0, 2))
    assert not path.exists()
    # The rows of the second process are there for some of the settings alone.
    run(tmp_path, SETTINGS[:3], process=(1, 2))
    assert not path.exists()
    run(tmp_path, process=(1, 2))
    assert path.exists()


def test_a_method_of_the_callers_own_may_lead_while_it_is_at_hand(tmp_path):
    def bright(model):
        return lambda images, target: images.abs().mean(1)

    path = run(tmp_path, SETTINGS[:2], methods={"bright": bright})
    found = Examples.load(path)
    assert found.choice.settings == ("gradient", "bright", "Grad-CAM")
    image = Noise()[found.choice.best[0].index].image
    assert_is_drawn(found.maps[0][1], image.abs().mean(0))
    path.unlink()
    run(tmp_path, SETTINGS[:2])
    assert not path.exists(), "nobody knows any more how its maps are made"


def test_pictures_and_sizes_pass_through_a_run(tmp_path):
    class Uneven(Noise):
        def __getitem__(self, index):
            return replace(super().__getitem__(index), image=torch.rand(3, 8, 8 + index), boxes=None, mask=None)

    path = tmp_path / EXAMPLES_FILE
    evaluate(
        small_network(),
        Uneven(2),
        SETTINGS,
        tmp_path,
        scores=ScoreSettings(ratios=(0.5,)),
        batch_size=1,
        picture=lambda image: np.full((*image.shape[1:], 3), 0.2),
    )
    found = Examples.load(path)
    assert {picture.shape for picture in found.pictures} == {(8, 8, 3), (8, 9, 3)}
    assert all((picture == 51).all() for picture in found.pictures)
