import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import parchgrad as pg
from parchgrad.errors import LayerError, SettingError, StatisticsError
from parchgrad.evaluation.methods import (
    grad_cam,
    maps_of,
    masks_of_another_class,
    random_channels,
    random_map,
    shuffled_masks,
)
from parchgrad.evaluation.settings import Grid, Setting, make_method
from tests.support import random_statistics

_ON, _OFF = ({"antialias": value, "balance": value} for value in (True, False))


@pytest.mark.parametrize(
    ("setting", "suits"),
    [
        (
            Setting(selector="energy"),
            {"quantile": 0.1, "softness": 0.5, "layers": 0.5, "conserve": "energy", "gates": 1.0, **_ON},
        ),
        (
            Setting(selector="evidence"),
            {"quantile": 0.2, "softness": 1.0, "layers": "auto", "conserve": "energy", "gates": 8.0, **_ON},
        ),
        (
            Setting(selector="class", softness=0),
            {"quantile": 0.1, "softness": 0.0, "layers": 0.5, "conserve": "energy", "gates": 0.0, **_OFF},
        ),
        (
            Setting(selector="random", softness=0.5),
            {"quantile": 0.1, "softness": 0.0, "layers": 0.5, "conserve": "energy", "gates": 1.0, **_ON},
        ),
        # It replaces the derivative of rectifiers itself.
        (
            Setting(selector="energy", method="GuidedBackprop"),
            {"quantile": 0.1, "softness": 0.5, "layers": 0.5, "conserve": "energy", "gates": 0.0, **_ON},
        ),
        (
            Setting(),
            {"quantile": None, "softness": None, "layers": None, "conserve": None, "gates": 0.0, **_OFF},
        ),
        (
            Setting(quantile=0.3, softness=0.2, layers="all", conserve="exact", gamma=2.0, gates=2),
            {"quantile": None, "softness": None, "layers": None, "conserve": None, "gates": 2.0, **_OFF},
        ),
    ],
)
def test_a_setting_holds_what_suits_it(setting, suits):
    assert {name: getattr(setting, name) for name in suits} == suits
    explicit = Setting(**{**vars(setting), **suits})
    assert (setting, hash(setting)) == (explicit, hash(explicit))
    assert setting.gamma == math.inf


@pytest.mark.parametrize("name", ["energy", "activation", "evidence", "random"])
@pytest.mark.parametrize("softness", [None, 0.0, 0.25])
def test_a_setting_is_the_edit_of_an_explainer(network, name, softness):
    setting = Setting(selector=name, softness=softness)
    selector = {
        "energy": pg.GradientEnergy,
        "activation": pg.GradientTimesActivation,
        "evidence": pg.Evidence,
        "random": pg.RandomChannels,
    }[name]
    own = {} if softness is None or name == "random" else {"softness": softness}
    found = pg.Explainer(network, selector(**own)).edit
    for member in ("layers", "gamma", "conserve", "gates", "antialias", "balance"):
        assert getattr(setting, member) == getattr(found, member)
    for member in ("quantile", "softness"):
        assert getattr(setting, member) == getattr(found.selector, member, 0.0)


@pytest.mark.parametrize(
    ("setting", "title"),
    [
        (Setting(), "gradient"),
        (Setting(gates=2), "gradient, gates 2"),
        (Setting(method="grad_cam", antialias=True), "Grad-CAM, antialias on"),
        (Setting(method="grad_cam", balance=True), "Grad-CAM, balance on"),
        (Setting(selector="evidence"), "gradient, evidence 0.2, auto layers"),
        (Setting(selector="evidence", softness=0), "gradient, evidence 0.2, softness 0, auto layers"),
        (
            Setting(selector="energy", softness=0, gates=8, antialias=True, balance=True),
            "gradient, energy 0.1, softness 0, 0.5 layers, gates 8, antialias on, balance on",
        ),
        (
            replace(Setting(selector="energy", softness=0), selector="random"),
            "gradient, random 0.1, 0.5 layers, gates 0, antialias off, balance off",
        ),
        (
            Setting(method="smoothgrad", selector="class", quantile=0.25, layers=["a*", "b"], gamma=2, conserve="none"),
            "SmoothGrad, class 0.25, a*+b layers, gamma 2, conserve none",
        ),
        (
            Setting(selector="energy", layers="conv1", antialias=False, masks="shuffled"),
            "gradient, energy 0.1, conv1 layers, antialias off, shuffled masks",
        ),
        (
            Setting(selector="energy", balance=False, masks="another"),
            "gradient, energy 0.1, 0.5 layers, balance off, masks of another class",
        ),
        (Setting(selector="energy", layers=("all", "0.5")), "gradient, energy 0.1, 'all'+'0.5' layers"),
    ],
)
def test_titles_say_what_differs_from_the_defaults(setting, title):
    assert setting.title == title


def test_settings_that_differ_have_titles_that_do():
    settings = [
        Setting(
            method=method,
            selector=selector,
            softness=softness,
            layers=layers,
            conserve=conserve,
            gates=gates,
            antialias=antialias,
            balance=balance,
        )
        for method, selector, softness, layers, conserve, gates, antialias, balance in itertools.product(
            ("gradient", "GuidedBackprop"),
            (None, "energy", "evidence", "class", "random"),
            (None, 0, 0.5, 1),
            (None, "all", 0.5),
            (None, "energy", "independent"),
            (None, 0, 2, 8),
            (None, True, False),
            (None, True, False),
        )
    ]
    assert len({setting.title for setting in settings}) == len(set(settings)) < len(settings)


_NUMBERS = st.sampled_from([0.1, 0.1 + 1e-12, 0.2, 0.5, 1.0]) | st.floats(0.01, 1)
_NAMES = st.sampled_from(["a", "b", "a+b", "all", "published", "0.5", "inf", "'a'", "a, gamma 2 layers"]) | st.text()
_SETTINGS = st.builds(
    Setting,
    selector=st.sampled_from(["energy", "evidence", "random"]),
    quantile=_NUMBERS,
    softness=st.none() | st.sampled_from([0, 0.5]) | _NUMBERS,
    layers=st.none() | st.sampled_from(["all", "published"]) | _NUMBERS | _NAMES | st.lists(_NAMES, min_size=1),
    gamma=st.just(math.inf) | st.floats(0.01, 1e6),
    gates=st.none() | _NUMBERS | st.just(0),
    antialias=st.none() | st.booleans(),
    balance=st.none() | st.booleans(),
)


@given(st.lists(_SETTINGS, min_size=2, max_size=6))
def test_titles_are_as_different_as_settings(settings):
    assert len({setting.title for setting in settings}) == len(set(settings))


def test_the_grid_brings_the_controls_and_a_random_twin_of_every_edit():
    grid = Grid(
        methods=("gradient", "smoothgrad"),
        selectors=(None, "energy", "activation"),
        quantiles=(0.1, 0.3),
        softnesses=(0.0, 0.5),
        layers=("all", 0.5),
        gammas=(math.inf, 2.0),
    )
    settings = grid.settings()
    assert len(set(settings)) == len(settings)
    assert len({setting.title for setting in settings}) == len(settings)
    assert [setting.method for setting in settings[:4]] == ["gradient", "random_map", "grad_cam", "centre_blob"]
    edits = [setting for setting in settings if setting.selector]
    # Hard and soft cuts have other gates, and so have their twins.
    assert len(edits) == 2 * 3 * 16
    others = [s for s in replace(grid, masks=("own", "another", "shuffled")).settings() if s not in settings]
    # The controls by masks are of the gradient alone, and not of random channels.
    assert len(others) == 2 * 16 * 2
    assert {(s.method, s.masks) for s in others} == {("gradient", "another"), ("gradient", "shuffled")}
    assert len({s.title for s in others}) == 64
    for setting in edits:
        twin = Setting(**{**vars(setting), "selector": "random"})
        assert twin in settings
        kept = ("quantile", "layers", "gamma", "conserve", "gates", "antialias", "balance")
        assert [getattr(twin, name) for name in kept] == [getattr(setting, name) for name in kept]
    assert Setting(method="smoothgrad") in settings
    json.dumps([setting.title for setting in settings])


def test_a_grid_takes_what_suits_each_selector_and_one_twin_for_those_alike():
    titles = [setting.title for setting in Grid(selectors=("energy", "evidence", "activation")).settings()]
    assert titles[4:] == [
        "gradient, random 0.1, 0.5 layers",
        "gradient, energy 0.1, 0.5 layers",
        "gradient, random 0.2, auto layers, gates 8",
        "gradient, evidence 0.2, auto layers",
        "gradient, activation 0.1, 0.5 layers",
    ]


def test_gates_of_a_grid_are_those_of_plain_methods_too():
    grid = Grid(
        methods=("gradient", "grad_cam", "random_map"),
        selectors=(None, "energy"),
        gates=(None, 0, 2),
        antialiases=(None, True),
        balances=(None, True),
    )
    found = grid.settings()
    assert [setting.title for setting in found if setting.selector is None] == [
        "gradient",
        "random map",
        "Grad-CAM",
        "centre blob",
        "gradient, balance on",
        "gradient, antialias on",
        "gradient, antialias on, balance on",
        "gradient, gates 2",
        "gradient, gates 2, balance on",
        "gradient, gates 2, antialias on",
        "gradient, gates 2, antialias on, balance on",
        "Grad-CAM, balance on",
        "Grad-CAM, antialias on",
        "Grad-CAM, antialias on, balance on",
        "Grad-CAM, gates 2",
        "Grad-CAM, gates 2, balance on",
        "Grad-CAM, gates 2, antialias on",
        "Grad-CAM, gates 2, antialias on, balance on",
    ]
    rules = {(each.gates, each.antialias, each.balance) for each in found if each.selector == "energy"}
    assert rules == {(1.0, True, True), (0.0, True, True), (2.0, True, True)}
    (off,) = Grid(balances=(False,)).settings()[-1:]
    assert (off.selector, off.balance) == ("evidence", False)


@pytest.mark.parametrize("made", [np.array, torch.tensor, list, lambda values: list(np.float32(values))])
def test_a_grid_takes_arrays_and_lists_as_well(made):
    tenths = (0.125, 0.25, 0.5)
    grid = Grid(quantiles=made(tenths), gammas=made([2.0]), layers=["all", ["a", "b"]])
    wanted = Grid(quantiles=tenths, gammas=(2.0,), layers=("all", ("a", "b")))
    assert grid == wanted
    assert hash(grid) == hash(wanted)
    assert {type(quantile) for quantile in grid.quantiles} == {float}
    assert grid.settings() == wanted.settings()


@pytest.mark.parametrize("single", [np.array(0.1), np.float64(0.1), np.ones((2, 2)), b"ab", {0.1}])
def test_a_grid_refuses_what_is_no_sequence_of_values(single):
    with pytest.raises(SettingError, match="`quantiles` is"):
        Grid(quantiles=single)


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU:UserWarning")
def test_settings_make_the_methods_they_name(network):
    images, target = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1])
    held = random_statistics({"0": 6, "2": 6})
    for setting, expected in (
        (Setting(method="random_map"), random_map(seed=4)),
        (Setting(method="grad_cam"), grad_cam(network)),
        (Setting(method="input_x_gradient"), maps_of(pg.Explainer(network, None, method="input_x_gradient"))),
        (
            Setting(selector="random", layers=("2",), quantile=0.5, gates=2.0),
            random_channels(network, quantile=0.5, seed=4, edit=pg.Edit(layers=["2"], gates=2.0)),
        ),
        (
            replace(Setting(selector="evidence", softness=0, conserve="none"), selector="random", quantile=0.5),
            random_channels(
                network, quantile=0.5, seed=4, edit=pg.Edit(selector=pg.Evidence(softness=0), conserve="none")
            ),
        ),
        (Setting(selector="evidence"), maps_of(pg.Explainer(network))),
        (
            Setting(selector="energy", softness=0, layers=0.5, conserve="independent"),
            maps_of(pg.Explainer(network, pg.GradientEnergy(softness=0), layers=0.5, conserve="independent")),
        ),
        (
            Setting(selector="energy", gates=1, antialias=False, method="smoothgrad"),
            maps_of(pg.Explainer(network, pg.GradientEnergy(), gates=1, antialias=False, method="smoothgrad")),
        ),
        (Setting(gates=2), maps_of(pg.Explainer(network, None, gates=2))),
        (Setting(method="grad_cam", gates=2, antialias=True), grad_cam(network, gates=2, antialias=True)),
        (
            Setting(selector="energy", method="GuidedBackprop"),
            maps_of(pg.Explainer(network, pg.GradientEnergy(), method="GuidedBackprop")),
        ),
        (
            Setting(selector="instance", softness=0.25),
            maps_of(pg.Explainer(network, pg.InstanceWise(held, quantile=0.1, softness=0.25))),
        ),
        (
            Setting(selector="class", layers="all", gamma=3.0, conserve="exact"),
            maps_of(pg.Explainer(network, pg.ClassWise(held, quantile=0.1), layers="all", gamma=3.0, conserve="exact")),
        ),
        (
            Setting(selector="class", layers="all", masks="another"),
            masks_of_another_class(network, pg.Edit(selector=pg.ClassWise(held, quantile=0.1), layers="all")),
        ),
        (
            Setting(selector="energy", layers="all", masks="shuffled", gamma=2.0),
            shuffled_masks(network, pg.Edit(selector=pg.GradientEnergy(), layers="all", gamma=2.0), seed=4),
        ),
    ):
        method = make_method(network, setting, statistics=held, seed=4)
        torch.testing.assert_close(method(images, target), expected(images, target))
    with pytest.raises(StatisticsError, match="needs channel statistics"):
        make_method(network, Setting(selector="instance"))
    with pytest.raises(LayerError):
        make_method(network, Setting(selector="energy", layers=("nowhere",)))
    with pytest.raises(SettingError, match="`selector` is 'best'"):
        Setting(selector="best")
    with pytest.raises(SettingError, match="`masks` is 'none'"):
        Setting(selector="energy", masks="none")
    for options in ({}, {"selector": "energy", "method": "smoothgrad"}):
        with pytest.raises(SettingError, match="`masks` is 'shuffled'"):
            Setting(masks="shuffled", **options)
    with pytest.raises(SettingError, match=r"`selector` is 'energy'.* 'grad_cam'"):
        Setting(method="grad_cam", selector="energy")
    words = r"'centre_blob' has no gradient\. Leave out `gates`, `antialias` and `balance`"
    for rules in ({"gates": 2}, {"antialias": True}, {"balance": True}):
        with pytest.raises(SettingError, match=words):
            Setting(method="centre_blob", **rules)
    for options, words in (
        ({"softness": 1.5}, "`softness` is 1.5"),
        ({"gates": -1}, "`gates` is -1"),
        ({"gates": math.inf}, "`gates` is inf"),
        ({"antialias": 1}, "`antialias` is of type int"),
        ({"balance": 1}, "`balance` is of type int"),
        ({"conserve": "all"}, "`conserve` is 'all'"),
        ({"gamma": 0}, "`gamma` is 0"),
    ):
        with pytest.raises(SettingError, match=words):
            Setting(selector="class", **options)
    with pytest.raises(SettingError, match="`gates` is 2"):
        make_method(network, Setting(method="GuidedBackprop", gates=2))


@pytest.mark.parametrize(
    ("setting", "make"),
    [
        (Setting(balance=True), lambda network: maps_of(pg.Explainer(network, None, balance=True))),
        (Setting(method="grad_cam", balance=True), lambda network: grad_cam(network, balance=True)),
        (
            Setting(selector="energy", balance=False, method="integrated_gradients"),
            lambda network: maps_of(
                pg.Explainer(network, pg.GradientEnergy(), balance=False, method="integrated_gradients")
            ),
        ),
        (
            Setting(selector="random", quantile=0.5, balance=True),
            lambda network: random_channels(network, quantile=0.5, seed=4, edit=pg.Edit(layers=0.5, gates=0, **_ON)),
        ),
        (
            Setting(selector="energy", balance=False, masks="another"),
            lambda network: masks_of_another_class(network, pg.Edit(selector=pg.GradientEnergy(), balance=False)),
        ),
        (
            Setting(selector="energy", balance=False, masks="shuffled"),
            lambda network: shuffled_masks(network, pg.Edit(selector=pg.GradientEnergy(), balance=False), seed=4),
        ),
    ],
)
def test_balance_reaches_every_kind_of_method(setting, make):
    torch.manual_seed(1)
    layers = (nn.Conv2d(3, 6, 3), nn.SiLU(), nn.Conv2d(6, 6, 3), nn.SiLU(), nn.Flatten(), nn.Linear(96, 5))
    network = nn.Sequential(*layers).double().eval()
    images, target = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1])
    found = make_method(network, setting, seed=4)(images, target)
    torch.testing.assert_close(found, make(network)(images, target))
    other = make_method(network, replace(setting, balance=not setting.balance), seed=4)
    assert not torch.allclose(found, other(images, target))
