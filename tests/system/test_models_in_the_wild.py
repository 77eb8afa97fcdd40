"""Networks as torchvision and timm register them, with random weights and small pictures, and the page about them.

The families come from the registries of the installed versions; which network of each is the smallest, and what is
to be expected of it, from docs/models.md, which `make survey` writes. A newer timm may have families that the page
does not know: they are nobody's fault here, and are tried by the next survey.
"""

import copy
import importlib
import sys
import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn

import parchgrad as pg
from parchgrad.errors import ModelWarning
from tests.support import ROOT, small_network

TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))
try:
    survey, checks = (importlib.import_module(name) for name in ("survey_models", "survey_checks"))
finally:
    sys.path.remove(str(TOOLS))

PAGE = survey.PAGE.read_text(encoding="utf-8")
ROWS, VERSIONS = survey.read_page(PAGE)
FAMILIES = {(family.library, family.name): family for family in survey.find_families()}
# Of timm those that are quickest to try: few parameters, and content with small pictures.
SMALL_OF_TIMM = 28


def registered(outcome, library):
    """Rows of the page whose network the installed version still has, the smallest first."""
    rows = [
        row
        for row in ROWS
        if (row.outcome, row.library) == (outcome, library)
        and (row.library, row.family) in FAMILIES
        and row.variant in FAMILIES[row.library, row.family].variants
    ]
    return sorted(rows, key=lambda row: (row.size > min(checks.SIZES), row.parameters))


def named(row):
    return f"{row.library}-{row.family}"


WORKING = [*registered("works", "torchvision"), *registered("works", "timm")[:SMALL_OF_TIMM]]


def test_there_are_enough_to_speak_of():
    assert sum(row.library == "torchvision" for row in WORKING) >= 15
    assert sum(row.library == "timm" for row in WORKING) >= 25
    assert [row.family for row in ROWS if row.outcome != "works"] == []


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning:torchvision")
@pytest.mark.parametrize("row", WORKING, ids=named)
def test_a_network_of_the_family_is_explained(row):
    torch.manual_seed(0)
    model = checks.enliven(survey.build(row.library, row.variant))
    inputs, targets = checks.workable_inputs(model), torch.tensor([1, 3])
    weights, hooks = copy.deepcopy(model.state_dict()), checks.hook_count(model)
    flags = [(module.training, getattr(module, "inplace", None)) for module in model.modules()]

    def explain(quantile):
        selector = pg.GradientEnergy(quantile=quantile, softness=0)
        return pg.Explainer(model, selector, layers="all").attribute(inputs, targets)

    with warnings.catch_warnings():
        # Without balance, attention is named.
        warnings.filterwarnings("ignore", "The gradient stays plain", ModelWarning)
        found, whole = explain(0.1), explain(1.0)
    with warnings.catch_warnings():
        # The page notes which networks have parts whose gradient stays plain, or is not balanced.
        for word, message in (("plain: ", "stays plain"), ("not balanced: ", "is not balanced")):
            if word in row.note:
                warnings.filterwarnings("ignore", f"The gradient {message}", ModelWarning)
        best = pg.Explainer(model).attribute(inputs, targets)
        # The rules alone: the logits are the same bit for bit.
        expected = model(inputs.clone().requires_grad_())
        with pg.ParchGrad(model, None, gates=2, antialias=True, balance=True):
            logits = model(inputs.clone().requires_grad_())
    assert torch.equal(logits, expected)
    for each in (found, best):
        assert each.isfinite().all()
        assert (each.flatten(1).abs().amax(dim=1) > 0).all()
    plain = checks.seeded_gradient(model, inputs, targets)
    assert checks.difference(whole, plain) < 1e-4
    assert checks.difference(found, plain) > 1e-3
    assert checks.is_unchanged(model, weights)
    assert checks.hook_count(model) == hooks
    assert flags == [(module.training, getattr(module, "inplace", None)) for module in model.modules()]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_page_is_what_was_generated_and_nothing_fails():
    assert survey.render(ROWS, VERSIONS) == PAGE
    assert not [row for row in ROWS if row.outcome == "fails"]


def test_the_page_has_a_row_for_every_family():
    on_page = {(row.library, row.family) for row in ROWS}
    assert len(on_page) == len(ROWS)
    for module in (torchvision, timm):
        library = module.__name__
        # Builds of a version for several devices have one registry.
        if f"{library} {module.__version__.split('+')[0]}" in VERSIONS:
            of_library = {(row.library, row.family) for row in ROWS if row.library == library}
            assert of_library == {key for key in FAMILIES if key[0] == library}


def test_a_page_is_read_as_it_was_written():
    row = survey.Row(library="timm", family="a", variant="", outcome="fails", note="RuntimeError: 2 | 3")
    others = [
        survey.Row(library=library, family="b", variant="c", outcome="works", parameters=1_200_000, size=64, edited=2)
        for library in survey.LIBRARIES
    ]
    page = survey.render([*others, row], "torch 1, timm 2")
    assert survey.read_page(page) == ([*others, row], "torch 1, timm 2")
    assert "| timm | 1 | 0 | 1 |" in page


def test_the_smallest_network_is_found_without_its_weights():
    family = survey.Family(library="torchvision", name="resnet", variants=("resnet34", "resnet18", "resnet50"))
    variant, skeleton = survey.smallest(family)
    assert variant == "resnet18"
    assert survey.count_parameters(skeleton) == sum(p.numel() for p in torchvision.models.resnet18().parameters())
    assert next(skeleton.parameters()).is_meta


class Counting(nn.Module):
    """Changes itself in every pass."""

    def __init__(self):
        super().__init__()
        self.network = small_network(dtype=torch.float32)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.network(x)


def test_what_is_not_true_of_maps_is_found(monkeypatch):
    model, inputs = small_network(dtype=torch.float32), torch.randn(2, 3, 8, 8)
    assert checks.check_maps(model, inputs, "all") == []
    with pytest.raises(checks.FaultError, match="the weights are not as they were"):
        checks.check_maps(Counting().eval(), inputs, "all")
    with monkeypatch.context() as patched:
        patched.setattr(checks.Reference, "_edit", lambda self, name, gradient: gradient)
        with pytest.raises(checks.FaultError, match="against the reference, the maps are"):
            checks.check_maps(model, inputs, "all")
    with monkeypatch.context() as patched:
        patched.setattr(checks, "seeded_gradient", lambda *_: 2 * inputs)
        with pytest.raises(checks.FaultError, match="with all channels kept, the maps are"):
            checks.check_maps(model, inputs, "all")
    model[-1].weight.data.zero_()
    with pytest.raises(checks.FaultError, match="the plain gradient is zero"):
        checks.check_maps(model, inputs, "all")


def test_a_survey_from_the_registry_to_the_page(monkeypatch, tmp_path, capsys):
    wanted = {("timm", "deit"): "deit_tiny_patch16_224", ("torchvision", "squeezenet"): "squeezenet1_1"}
    families = [
        survey.Family(library=library, name=name, variants=(variant,)) for (library, name), variant in wanted.items()
    ]
    monkeypatch.setattr(survey, "find_families", lambda: families)
    monkeypatch.setattr(survey, "survey_apart", survey.survey_family)
    monkeypatch.setattr(sys, "argv", ["survey_models.py", "--out", str(tmp_path / "models.md")])
    threads = torch.get_num_threads()
    try:
        assert survey.main() == 0
    finally:
        torch.set_num_threads(threads)
    rows, versions = survey.read_page((tmp_path / "models.md").read_text())
    assert {(row.library, row.family): row.outcome for row in rows} == {
        ("timm", "deit"): "works",
        ("torchvision", "squeezenet"): "works",
    }
    assert versions == survey.installed()
    assert "squeezenet1_1" in capsys.readouterr().out


class Adapted(nn.Module):
    """A convolution with a LoRA adapter beside it, as in peft."""

    def __init__(self, base, rank=2, scale=0.5):
        super().__init__()
        self.base, self.scale = base, scale
        self.down = nn.Conv2d(base.in_channels, rank, base.kernel_size, padding=base.padding, bias=False)
        self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False)

    def forward(self, inputs):
        return self.base(inputs) + self.scale * self.up(self.down(inputs))

    def merged(self):
        merged = copy.deepcopy(self.base)
        merged.weight.data += self.scale * torch.einsum("or,rihw->oihw", self.up.weight[:, :, 0, 0], self.down.weight)
        return merged


def test_adapters_change_the_map_until_they_are_merged():
    merged = small_network()
    adapted = copy.deepcopy(merged)
    for place in (0, 2):
        adapted[place] = Adapted(adapted[place]).double().eval()
        merged[place] = adapted[place].merged()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(adapted(images), merged(images), rtol=1e-12, atol=1e-12)
    plain, edited = (
        [pg.Explainer(model, *selector).attribute(images, 1).flatten(1) for model in (adapted, merged)]
        for selector in ((None,), ())
    )
    torch.testing.assert_close(*plain, rtol=1e-9, atol=1e-12)
    assert torch.cosine_similarity(*edited).max() < 0.99
    assert len(pg.find_convolutions(adapted)) == 3 * len(pg.find_convolutions(merged))
