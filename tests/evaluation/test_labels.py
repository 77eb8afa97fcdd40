import math

import pytest

from parchgrad.evaluation.labels import describe, is_control, is_edit, label_settings
from parchgrad.evaluation.settings import Grid, Setting


def rows_of(*settings, **own_methods):
    """One row for each setting and for each method of the caller's own, as a run writes them."""
    rows = [
        {"setting": setting.title, **vars(setting), "gamma": "inf" if math.isinf(setting.gamma) else setting.gamma}
        for setting in settings
    ]
    rows += [{"setting": title, **dict.fromkeys(vars(Setting())), **fields} for title, fields in own_methods.items()]
    # Read from a file, null is NaN.
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]


def names_of(*settings, **own_methods):
    return list(label_settings(rows_of(*settings, **own_methods)).names.values())


def test_settings_are_named_by_what_differs():
    grid = Grid(selectors=("evidence", "energy"), quantiles=(None, 0.5))
    labels = label_settings(rows_of(*grid.settings()))
    assert [labels.names[setting.title] for setting in grid.settings()] == [
        "plain gradient",
        "random map",
        "Grad-CAM",
        "centre blob",
        "random channels, as Evidence, quantile 0.2",
        "Evidence, quantile 0.2",
        "random channels, as Evidence, quantile 0.5",
        "Evidence, quantile 0.5",
        "random channels, as Gradient energy, quantile 0.1",
        "Gradient energy, quantile 0.1",
        "random channels, as Gradient energy, quantile 0.5",
        "Gradient energy, quantile 0.5",
    ]
    assert labels.shared == {
        "Evidence": "softness 1, automatic layers, gates 8",
        "Gradient energy": "softness 0.5, upper 0.5 of the layers, gates 1",
        "All": "conserve energy, smooth strides, balance",
    }


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        # Gates, strides and balance follow from the softness, so they need no words.
        ([Setting(selector="energy", softness=softness) for softness in (0, 1)], ["softness 0", "softness 1"]),
        (
            [Setting(selector="energy", layers=layers) for layers in ("all", 0.25, ("conv1", "layer4.*"))],
            ["all layers", "upper 0.25 of the layers", "layers conv1+layer4.*"],
        ),
        (
            [Setting(selector="energy", gates=gates, balance=balance) for gates in (0, 2) for balance in (True, False)],
            ["gates 0, balance", "gates 0, no balance", "gates 2, balance", "gates 2, no balance"],
        ),
        ([Setting(selector="energy", gamma=gamma) for gamma in (math.inf, 2)], ["gamma inf", "gamma 2"]),
        # As many digits as tell them apart.
        ([Setting(selector="energy", quantile=q) for q in (0.1, 0.1000001)], ["quantile 0.1", "quantile 0.1000001"]),
    ],
)
def test_what_differs_in_words(settings, names):
    assert names_of(*settings) == [f"Gradient energy, {name}" for name in names]


def test_methods_rules_and_masks_have_names():
    assert names_of(
        Setting(gates=2, antialias=True),
        Setting(method="grad_cam", gates=2),
        Setting(method="input_x_gradient"),
        Setting(method="smoothgrad", selector="evidence"),
        Setting(selector="class", masks="another"),
        Setting(selector="class", masks="shuffled"),
        # Without an edit of its settings.
        Setting(selector="random"),
    ) == [
        "plain gradient, gates 2, smooth strides",
        "Grad-CAM, gates 2",
        "input x gradient",
        "SmoothGrad with Evidence",
        "Class-wise, channels of another class",
        "Class-wise, shuffled channels",
        "Random channels",
    ]


def test_no_two_settings_have_one_name():
    grid = Grid(
        methods=("gradient", "smoothgrad"),
        selectors=(None, "evidence", "energy"),
        softnesses=(0, 0.5, 1),
        layers=("all", ("a", "b"), 0.5),
        gates=(None, 2),
        conserves=(None, "independent"),
    )
    names = names_of(*grid.settings())
    assert len(set(names)) == len(names) > 100
    # The caller's own methods keep their title, whatever it is.
    assert names_of(Setting(), Setting(selector="evidence"), Evidence={}, mine={}) == [
        "plain gradient",
        Setting(selector="evidence").title,
        "Evidence",
        "mine",
    ]


def test_rows_of_other_releases_are_named():
    earlier = {"setting": "a", "method": "gradient", "selector": "energy", "quantile": 0.1}
    later = {"setting": "b", "method": "gradient", "selector": "loudest", "quantile": 0.1}
    assert list(label_settings([earlier, later]).names.values()) == ["Gradient energy", "loudest"]
    assert describe({"setting": "a"}) == {}


def test_what_is_a_control_and_what_an_edit():
    settings = {
        Setting(): (False, False),
        Setting(method="random_map"): (True, False),
        Setting(method="centre_blob"): (True, False),
        Setting(method="grad_cam"): (False, False),
        Setting(method="smoothgrad"): (False, False),
        Setting(selector="energy"): (False, True),
        Setting(selector="random"): (True, False),
        Setting(selector="energy", masks="another"): (True, False),
        Setting(selector="energy", masks="shuffled"): (True, False),
    }
    for row, expected in zip(rows_of(*settings), settings.values(), strict=True):
        assert (is_control(row["setting"], row), is_edit(row["setting"], row)) == expected
    (own,) = rows_of(mine={})
    assert (is_control("mine", own), is_edit("mine", own)) == (False, False)
    # A control of `make_controls` under its name there.
    assert is_control("random channels", own)
