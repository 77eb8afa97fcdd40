"""Explainers in other processes, and models in torch's wrappers for several devices."""

import copy
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import captum.attr
import pytest
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import parchgrad as pg
from parchgrad.core.hooks import TransientHook
from parchgrad.errors import ModelError
from parchgrad.evaluation.grid_pointing import make_mosaics
from parchgrad.evaluation.rows import read_rows
from parchgrad.evaluation.runs import evaluate
from parchgrad.evaluation.scores import ScoreSettings
from parchgrad.evaluation.settings import Setting
from parchgrad.explain.nonfinite import find_non_finite
from tests.support import Noise, all_selectors, close, comparable, hooks, random_statistics, small_network

INPUTS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
TARGETS = torch.tensor([4, 0, 2, 1])


@pytest.mark.parametrize("selector", [None, *all_selectors()], ids=lambda selector: type(selector).__name__)
def test_a_pickled_explainer_gives_the_same_maps(selector):
    explainer = pg.Explainer(small_network(), selector, layers="all", method="smoothgrad", samples=3)
    expected = explainer.attribute(INPUTS, TARGETS)
    assert torch.equal(pickle.loads(pickle.dumps(explainer)).attribute(INPUTS, TARGETS), expected)


def test_pickled_statistics_are_the_same_and_read_only():
    samples = [(image, index % 2) for index, image in enumerate(INPUTS)]
    statistics = pg.collect_statistics(small_network(), samples)
    copied = pickle.loads(pickle.dumps(statistics))
    assert copied.metadata == statistics.metadata
    assert copied.weight_digests == statistics.weight_digests
    assert torch.equal(copied["2"].class_log_p(), statistics["2"].class_log_p())
    assert torch.equal(copied.sample.rows["2"], statistics.sample.rows["2"])
    for view in (copied.layers, copied.metadata, copied.sample.rows):
        with pytest.raises(TypeError):
            view["2"] = None


def test_an_explainer_works_in_a_worker_process():
    selector = pg.ClassWise(random_statistics({"0": 6, "2": 6}), quantile=0.3)
    explainer = pg.Explainer(small_network(), selector, layers="all")
    expected = explainer.attribute(INPUTS, TARGETS)
    # A fresh interpreter: what a forked one inherits would prove nothing.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(explainer.attribute, INPUTS, TARGETS).result(timeout=240)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("take", [copy.deepcopy, lambda item: pickle.loads(pickle.dumps(item))])
def test_the_hooks_of_an_open_block_do_nothing_in_a_copy(take):
    model = small_network()
    other = pg.Explainer(model, pg.GradientEnergy(quantile=0.3), layers="all")
    expected = other.attribute(INPUTS, TARGETS)
    x = INPUTS.clone().requires_grad_()
    (plain,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    # A function without a name, which cannot be pickled, is no matter of the copy.
    with pg.ParchGrad(model, pg.GradientEnergy(quantile=0.3), layers="all", logits=lambda output: output):
        copied, explainer = take(model), take(other)
        model(x)
        (within,) = torch.autograd.grad(copied(x)[:, 1].sum(), x)
    (after,) = torch.autograd.grad(copied(x)[:, 1].sum(), x)
    assert torch.equal(within, plain)
    assert torch.equal(after, plain)
    assert torch.equal(explainer.attribute(INPUTS, TARGETS), expected)
    held = [hook for module in copied.modules() for hook in module._forward_hooks.values()]
    assert {hook.__name__ for hook in held} == {"_do_nothing"}


@pytest.mark.parametrize("take", [copy.deepcopy, lambda item: pickle.loads(pickle.dumps(item))])
@pytest.mark.parametrize(
    "watch",
    [
        lambda model, inputs: pg.collect_statistics(model, [(image, 0) for image in inputs]),
        lambda model, inputs: find_non_finite(model, lambda images: model(images).sum(), inputs),
    ],
    ids=["statistics", "diagnosis"],
)
def test_a_model_that_is_copied_while_others_watch_it_is_a_plain_one(take, watch):
    model, copies = small_network(), []
    # In the middle of a pass, as another thread would.
    model[2].register_forward_pre_hook(TransientHook(lambda module, inputs: copies.append(take(model)) or None))
    watch(model, INPUTS)
    held = [
        hook
        for module in copies[0].modules()
        for hooks_of in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks_of.values()
    ]
    assert held
    assert {hook.__name__ for hook in held} == {"_do_nothing"}
    assert torch.equal(copies[0](INPUTS), model(INPUTS))


def test_a_copy_made_inside_a_block_starts_outside_of_it():
    model = small_network()
    block = pg.ParchGrad(model, pg.GradientEnergy(quantile=0.3), layers="all")
    x = INPUTS.clone().requires_grad_()
    with block:
        (expected,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
        copied = pickle.loads(pickle.dumps(block))
    assert copied._sessions == []
    with copied:
        (found,) = torch.autograd.grad(copied._plan.model(x)[:, 1].sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: pg.ParchGrad(model, pg.GradientEnergy()),
        lambda model: pg.Explainer(model, None),
        lambda model: pg.Explainer(model, pg.GradientEnergy()),
        lambda model: pg.collect_statistics(model, [(INPUTS[0], 1)]),
        lambda model: evaluate(model, Noise(2), [Setting()], "nowhere"),
        lambda model: make_mosaics(model, Noise(4), count=1),
    ],
)
def test_data_parallel_is_refused_with_the_better_way(use):
    with pytest.raises(ModelError, match=r"DataParallel \(model\) .* model\.module "):
        use(nn.DataParallel(small_network()).eval())
    # Nor within another module, or where layers are chosen beforehand.
    inside = nn.Sequential(nn.Identity(), nn.DataParallel(small_network())).eval()
    with pytest.raises(ModelError, match=r"DataParallel \(model\.1\) .* model\.1\.module "):
        use(inside)
    with pytest.raises(ModelError, match=r"DataParallel \(model\.1\)"):
        pg.choose_layers(inside, "all")


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_model_in_distributed_data_parallel_is_the_model_itself(process_group):
    model = small_network()
    # The fixture's network is frozen, which the wrapper does not take.
    model.requires_grad_()
    statistics = pg.collect_statistics(model, [(image, index % 2) for index, image in enumerate(INPUTS)])
    wrapped = DistributedDataParallel(model).eval()
    for selector in (None, pg.GradientEnergy(quantile=0.3), pg.ClassWise(statistics, quantile=0.3)):
        expected = pg.Explainer(model, selector, layers="all").attribute(INPUTS, [0, 1, 0, 1])
        explainer = pg.Explainer(wrapped, selector, layers="all")
        for _ in range(3):
            assert torch.equal(explainer.attribute(INPUTS, [0, 1, 0, 1]), expected)
        assert explainer.layers == (() if selector is None else ("0", "2"))
    # Chosen names are those of the model itself.
    upper_half = list(pg.choose_layers(wrapped, 0.5, inputs=INPUTS))
    assert upper_half == list(pg.find_convolutions(wrapped))[1:] == ["2"]
    named = pg.Explainer(wrapped, pg.GradientEnergy(quantile=0.3), layers=upper_half)
    assert named.layers == ("2",)
    of_wrapped = pg.collect_statistics(wrapped, [(image, index % 2) for index, image in enumerate(INPUTS)])
    assert list(of_wrapped) == list(statistics)
    assert torch.equal(of_wrapped["2"].class_mean, statistics["2"].class_mean)
    assert hooks(wrapped) == 0


def test_a_wrapped_model_goes_on_with_the_run_of_the_model_itself(process_group, tmp_path):
    model = small_network().requires_grad_()
    wrapped = DistributedDataParallel(model).eval()
    settings = [Setting(), Setting(selector="energy", quantile=0.34, layers="all")]
    scores = ScoreSettings(families=("perturbation",), ratios=(0.4,))
    for given, place in ((model, "bare"), (wrapped, "wrapped")):
        evaluate(given, Noise(3), settings, tmp_path / place, scores=scores)
    close(comparable(read_rows(tmp_path / "wrapped")), comparable(read_rows(tmp_path / "bare")))
    before = (tmp_path / "bare" / "rows-0.jsonl").read_bytes()
    evaluate(wrapped, Noise(3), settings, tmp_path / "bare", scores=scores)
    assert (tmp_path / "bare" / "rows-0.jsonl").read_bytes() == before
    mosaics = [make_mosaics(given, Noise(8), count=1, confidence=0.0) for given in (model, wrapped)]
    assert torch.equal(mosaics[0][0].image, mosaics[1][0].image)


def test_a_block_around_passes_of_the_wrapper_itself(process_group):
    model = small_network().requires_grad_()
    wrapped = DistributedDataParallel(model).eval()
    selector = pg.GradientEnergy(quantile=0.3)
    expected = pg.Explainer(model, selector, layers="all").attribute(INPUTS, TARGETS)
    with pg.ParchGrad(wrapped, selector, layers="all"):
        for _ in range(3):
            saliency = captum.attr.Saliency(wrapped)
            found = saliency.attribute(INPUTS.clone().requires_grad_(), target=TARGETS, abs=False)
            assert torch.equal(found, expected)
