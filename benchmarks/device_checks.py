"""Checks that a device computes what the CPU computes in float64, for each dtype.

`benchmarks/gpu.py` runs them on a GPU, and `tests/system/test_gpu.py` on the CPU. Weights and inputs are rounded to the
dtype first, so that both sides start from the same numbers.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

import parchgrad as pg
from parchgrad.core import convolution
from parchgrad.core.partition import channel_norms, channel_scales
from parchgrad.data.shapes import GeneratedShapes

__all__ = ["CHECKS", "TOLERANCES", "Outcome", "check", "exact_float32"]

TOLERANCES: Mapping[torch.dtype, float] = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest error of each dtype, as the norm of the difference over the norm of the reference.

Maps with the true derivative of rectifiers are not among the checks: it jumps at zero, so that torch's own gradient of
these networks differs by a fifth in bfloat16.
"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a check.

    Attributes:
        name: name of the check.
        dtype: dtype of the model and its inputs, such as `"float16"`.
        error: largest error over the results of the check, relative to the norm of the reference.
        tolerance: largest error that passes.
        repeats: whether a second call gives the same bits.
    """

    name: str
    dtype: str
    error: float
    tolerance: float
    repeats: bool

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Numbers:
    """Where and how precisely to compute with numbers that were rounded to a dtype."""

    device: torch.device
    dtype: torch.dtype
    rounded: torch.dtype

    def of(self, values: Tensor) -> Tensor:
        """Round a tensor, and move it to the device and the dtype of the computation."""
        return values.to(self.rounded).to(self.device, self.dtype)

    def model(self, made: nn.Module) -> nn.Module:
        """Round a model's weights, and move it to the device and the dtype of the computation."""
        return made.to(self.rounded).to(self.device, self.dtype).eval()


Compute = Callable[[Numbers], list[Tensor]]


def check(name: str, device: torch.device, dtype: torch.dtype) -> Outcome:
    """Compare a computation on a device with the CPU in float64, and with itself."""
    compute = CHECKS[name]
    with exact_float32():
        expected = compute(Numbers(torch.device("cpu"), torch.float64, dtype))
        found, again = (compute(Numbers(device, dtype, dtype)) for _ in range(2))
    return Outcome(
        name=name,
        dtype=str(dtype).removeprefix("torch."),
        # Unlike Python's, this maximum is NaN if any distance is.
        error=torch.tensor([distance(one, other) for one, other in zip(found, expected, strict=True)]).max().item(),
        tolerance=TOLERANCES[dtype],
        repeats=all(torch.equal(one, other) for one, other in zip(found, again, strict=True)),
    )


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the norm of the reference."""
    if found.shape != expected.shape:
        return math.inf
    return float((found.cpu().double() - expected).norm() / expected.norm())


@contextmanager
def exact_float32() -> Iterator[None]:
    """Switch TF32 off, which rounds the inputs of float32 products to 10 bits."""
    places = torch.backends.cuda.matmul, torch.backends.cudnn
    earlier = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    try:
        yield
    finally:
        for place, allowed in zip(places, earlier, strict=True):
            place.allow_tf32 = allowed


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Draw normal numbers on the CPU, the same for every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Convolution

# Module, and shape of its input.
CONVOLUTIONS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "3 x 3": (partial(nn.Conv2d, 8, 64, 3, padding=1), (4, 8, 9, 7)),
    "strided": (partial(nn.Conv2d, 8, 64, (3, 5), stride=(2, 1), padding=(1, 2)), (4, 8, 9, 7)),
    "dilated": (partial(nn.Conv2d, 8, 64, 3, dilation=2, padding=2), (4, 8, 9, 7)),
    "1 x 1": (partial(nn.Conv2d, 16, 64, 1), (4, 16, 9, 7)),
    "grouped": (partial(nn.Conv2d, 32, 128, 3, padding=1, groups=8), (4, 32, 9, 7)),
    "depthwise": (partial(nn.Conv2d, 64, 64, 3, padding=1, groups=64), (4, 64, 9, 7)),
    "signal": (partial(nn.Conv1d, 8, 64, 3, padding=1), (4, 8, 20)),
    "volume": (partial(nn.Conv3d, 4, 64, 3, padding=1), (4, 4, 5, 6, 4)),
}


def backward(numbers: Numbers, *, cost: float) -> list[Tensor]:
    """Propagate pruned gradients through convolutions; a low cost of gathering takes only the kept channels."""
    found = []
    costs = {"_COST_OF_A_KEPT_CHANNEL": cost, "_COST_IN_GROUPS": cost, "_POSITIONS_PER_WEIGHT": 0}
    with mock.patch.multiple(convolution, **costs):
        for make, shape in CONVOLUTIONS.values():
            torch.manual_seed(0)
            module = numbers.model(make())
            with torch.no_grad():
                outputs = module(numbers.of(normal(*shape)))
            gradient = numbers.of(normal(*outputs.shape, seed=1))
            wide = gradient if gradient.dtype.itemsize >= 4 else gradient.float()
            # Two rows share a mask, and the others have their own.
            mask = normal(*gradient.shape[:2], seed=2).argsort(dim=1) < 6
            mask[1] = mask[0]
            mask = mask.to(numbers.device)
            scales = channel_scales(wide, channel_norms(wide), mask, gamma=math.inf, conserve="energy")
            geometry, weight = convolution.plain_geometry(module), module.weight.detach()
            found.append(convolution.partitioned_input_gradient(wide, scales, weight, geometry, torch.Size(shape)))
    return found


# Engine


def strided_network() -> nn.Module:
    """A small network with strides, groups, pooling and rectifiers of three kinds, in place."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, stride=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU6(inplace=True),
        nn.Conv2d(16, 16, (3, 2), stride=(1, 2), groups=2),
        nn.LeakyReLU(0.1, inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 5),
    ).eval()


def edits(numbers: Numbers, *, soft: bool) -> list[Tensor]:
    """Compute maps inside blocks: every way to conserve, both kinds of gamma, and a selector of each kind."""
    model = numbers.model(strided_network())
    inputs = numbers.of(normal(4, 3, 17, 15)).requires_grad_()
    classes = torch.arange(4, device=numbers.device)
    names = list(pg.find_convolutions(model))
    if soft:
        options = [
            (selector, {"gates": gates, "antialias": antialias, "conserve": "energy"})
            for selector in (pg.Evidence(), pg.GradientEnergy(), pg.GradientTimesActivation(softness=1))
            for gates, antialias in ((8.0, True), (1.0, False))
        ]
    else:
        # Given masks cannot change by rounding, as the scores of other hard cuts may.
        kept = pg.FixedChannels({name: torch.arange(16) % 3 == 0 for name in names})
        options = [
            (kept, {"gamma": gamma, "conserve": conserve})
            for gamma in (math.inf, 2.0)
            for conserve in ("energy", "independent", "exact", "none")
        ]
    found = []
    for selector, settings in options:
        with pg.ParchGrad(model, selector, layers=names, **settings):
            scores = model(inputs).gather(1, classes.unsqueeze(1))
            found.append(torch.autograd.grad(scores.sum(), inputs)[0])
    return found


# Explainer


def shapes(count: int) -> tuple[Tensor, Tensor]:
    """Generate pictures of shapes and their classes."""
    samples = [GeneratedShapes(count=count, seed=1)[index] for index in range(count)]
    return torch.stack([sample.image for sample in samples]), torch.tensor([sample.label for sample in samples])


def explained(numbers: Numbers, *, network: str, one_by_one: bool = False, **settings: object) -> list[Tensor]:
    """Explain the classes of generated shapes, all at once or one by one."""
    model = numbers.model(pg.load_model(network).model)
    images, classes = shapes(3)
    images = numbers.of(images)
    explainer = pg.Explainer(model, **settings)
    if one_by_one:
        rows = zip(images.split(1), classes.tolist(), strict=True)
        return [torch.cat([explainer.attribute(row, target) for row, target in rows])]
    return [explainer.attribute(images, classes), explainer.attribute(images, explainer.predict(images))]


def explained_in_autocast(numbers: Numbers) -> list[Tensor]:
    """Explain a model in float32 under autocast of the rounded dtype."""
    wide = numbers.dtype if numbers.dtype == torch.float64 else torch.float32
    model = pg.load_model("shapes").model.to(numbers.device, wide)
    images, classes = shapes(3)
    enabled = numbers.dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(numbers.device.type, numbers.dtype if enabled else None, enabled=enabled):
        return [pg.Explainer(model).attribute(images.to(numbers.device, wide), classes)]


# Statistics


def collected(numbers: Numbers, *, labels: str) -> list[Tensor]:
    """Collect statistics on the device."""
    model = numbers.model(pg.load_model("shapes").model)
    images, classes = shapes(24)
    pairs = list(zip(numbers.of(images), classes.tolist(), strict=True))
    statistics = pg.collect_statistics(model, pairs, batch_size=8, labels=labels)
    parts = ("mean", "std", "class_mean") if labels == "given" else ("mean", "std")
    return [getattr(layer, part) for layer in statistics.values() for part in parts]


def selected_by_statistics(numbers: Numbers) -> list[Tensor]:
    """Explain by class-wise channels, with statistics on the CPU and the model on the device."""
    original = pg.load_model("shapes").model
    images, classes = shapes(24)
    statistics = pg.collect_statistics(original, list(zip(images, classes.tolist(), strict=True)))
    model = numbers.model(original)
    # Few images leave many channels normally distributed.
    selector = pg.ClassWise(statistics, test="student", normality_threshold=None)
    return [pg.Explainer(model, selector).attribute(numbers.of(images[:3]), classes[:3])]


CHECKS: Mapping[str, Compute] = {
    "convolution, kept channels": partial(backward, cost=0.01),
    "convolution, all channels": partial(backward, cost=1e9),
    "engine, hard masks": partial(edits, soft=False),
    "engine, soft weights": partial(edits, soft=True),
    "explainer, shapes": partial(explained, network="shapes"),
    "explainer, shapes, one by one": partial(explained, network="shapes", one_by_one=True),
    "explainer, shapes_vit": partial(explained, network="shapes_vit"),
    "explainer, shapes_convnext": partial(explained, network="shapes_convnext"),
    "explainer, shapes_mobilenet": partial(explained, network="shapes_mobilenet"),
    "explainer, gates alone": partial(explained, network="shapes", selector=None, gates=8.0, antialias=True),
    "explainer, integrated gradients": partial(explained, network="shapes", method="integrated_gradients", n_steps=5),
    "explainer, SmoothGrad": partial(explained, network="shapes", method="smoothgrad", samples=4),
    "explainer, autocast": explained_in_autocast,
    "statistics, given labels": partial(collected, labels="given"),
    "statistics, predicted labels": partial(collected, labels="predicted"),
    "statistics, class-wise maps": selected_by_statistics,
}
"""Computations by name: engine, convolution, explainer and statistics."""
