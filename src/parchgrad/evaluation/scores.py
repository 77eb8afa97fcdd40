"""All scores of a map: their titles, directions, families and settings."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from parchgrad._io.checks import check_whole_number
from parchgrad.errors import SettingError
from parchgrad.evaluation import localisation, perturbation, sanity
from parchgrad.evaluation.methods import Method
from parchgrad.evaluation.perturbation import RATIOS, Order, Replacement, Responses
from parchgrad.evaluation.sanity import RandomisationOrder
from parchgrad.evaluation.sparsity import gini
from parchgrad.evaluation.stability import NOISES, check_noises, stability
from parchgrad.explain.outputs import Logits

__all__ = ["FAMILIES", "HEADLINES", "SCORES", "Direction", "Family", "Score", "ScoreSettings", "at_ratio", "score_maps"]

Direction = Literal["higher", "lower", "neither"]
Family = Literal[
    "perturbation",
    "insertion",
    "relevance_gain",
    "localisation",
    "sparsity",
    "sensitivity",
    "randomisation",
    "class_similarity",
    "stability",
]
FAMILIES: tuple[Family, ...] = get_args(Family)


@dataclass(frozen=True, kw_only=True)
class Score:
    """A score of a map.

    Attributes:
        title: title for display.
        meaning: what it measures, as a noun phrase.
        better: direction that is better; `"neither"` for descriptive scores.
        family: group of scores that are computed together.
        by_ratio: whether the score is a mean over shares of replaced pixels, shares of random weights or noise levels,
            and is also reported at each of them.
    """

    title: str
    meaning: str
    better: Direction
    family: Family
    by_ratio: bool = False


# Name, title, meaning, and which direction is better if the most and if the least relevant pixels are erased.
_ERASED: tuple[tuple[str, str, str, tuple[Direction, Direction]], ...] = (
    ("aopc", "AOPC", "drop of the class probability", ("higher", "lower")),
    (
        "log_odds",
        "log-odds",
        "logarithm of the class probability, relative to that of the whole image,",
        ("lower", "higher"),
    ),
    ("accuracy", "accuracy", "share of the images that are predicted as the explained class", ("lower", "higher")),
    ("fractional_difference", "fractional difference", "lost share of the class probability", ("higher", "lower")),
)
_GAIN_REPLACEMENTS: Mapping[Replacement, str] = {"zero": "by zero", "blur": "by a blur"}
SCORES: Mapping[str, Score] = {
    "aopc": Score(
        title="AOPC",
        meaning="drop of the class probability when the most relevant pixels are erased (MoRF), minus the drop when "
        "the least relevant are (LeRF)",
        better="higher",
        family="perturbation",
        by_ratio=True,
    ),
    **{
        f"{name}_{order}": Score(
            title=f"{title}, {'MoRF' if order == 'morf' else 'LeRF'}",
            meaning=f"{meaning} when the {'most' if order == 'morf' else 'least'} relevant pixels are erased",
            better=better,
            family="perturbation",
            by_ratio=True,
        )
        for name, title, meaning, directions in _ERASED
        for order, better in zip(("morf", "lerf"), directions, strict=True)
    },
    "insertion": Score(
        title="insertion",
        meaning="mean class probability while pixels are inserted, most relevant first",
        better="higher",
        family="insertion",
    ),
    "deletion": Score(
        title="deletion",
        meaning="mean class probability while pixels are erased, most relevant first",
        better="lower",
        family="insertion",
    ),
    **{
        f"srg_{replacement}": Score(
            title=f"SRG, {replacement}",
            meaning="mean class probability while the least relevant pixels are replaced, minus that while the most "
            f"relevant are (symmetric relevance gain), {words}",
            better="higher",
            family="relevance_gain",
        )
        for replacement, words in _GAIN_REPLACEMENTS.items()
    },
    "mass_inside": Score(
        title="mass inside",
        meaning="share of the map inside the object's mask, box or cell",
        better="higher",
        family="localisation",
    ),
    "region_share": Score(
        title="area share",
        meaning="share of the image that the mask, box or cell covers",
        better="neither",
        family="localisation",
    ),
    "weighted_mass_inside": Score(
        title="mass inside, by area",
        meaning="mass inside, divided by the area share; 1 for an even map",
        better="higher",
        family="localisation",
    ),
    "pointing_game": Score(
        title="pointing game",
        meaning="share of the images whose largest map value is inside",
        better="higher",
        family="localisation",
    ),
    "gini": Score(title="Gini index", meaning="concentration of the map", better="neither", family="sparsity"),
    "max_sensitivity": Score(
        title="max-sensitivity",
        meaning="largest relative change of the map under imperceptible noise",
        better="lower",
        family="sensitivity",
    ),
    "randomisation_spearman": Score(
        title="random weights, Spearman",
        meaning="rank correlation with the map of a network with random weights",
        better="lower",
        family="randomisation",
        by_ratio=True,
    ),
    # Neither: SSIM rates unrelated maps as more similar the sparser they are.
    "randomisation_similarity": Score(
        title="random weights, SSIM",
        meaning="structural similarity to the map of a network with random weights",
        better="neither",
        family="randomisation",
        by_ratio=True,
    ),
    "class_similarity": Score(
        title="another class, Spearman",
        meaning="rank correlation with the map of another class",
        better="lower",
        family="class_similarity",
    ),
    "stability_cosine": Score(
        title="stability, cosine",
        meaning="cosine with the map of a slightly noisy copy",
        better="higher",
        family="stability",
        by_ratio=True,
    ),
    "stability_spearman": Score(
        title="stability, Spearman",
        meaning="rank correlation with the map of a slightly noisy copy",
        better="higher",
        family="stability",
        by_ratio=True,
    ),
    "stability_norm_ratio": Score(
        title="stability, norm ratio",
        meaning="larger norm divided by the smaller, of the map and the map of a slightly noisy copy",
        better="lower",
        family="stability",
        by_ratio=True,
    ),
}
"""The scores by name."""

# Image size that the source's tolerance is meant for; on small images it would cover half of the image.
_TOLERANCE_SIZE = 224

HEADLINES = (
    "aopc",
    "mass_inside",
    "pointing_game",
    "insertion",
    "deletion",
    "max_sensitivity",
    "stability_cosine",
    "randomisation_spearman",
)
"""The scores with charts; the first one with values chooses the examples."""


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """Settings of the scores.

    Attributes:
        families: groups of scores to compute; only `"perturbation"`, `"localisation"` and `"sparsity"`, the fastest,
            are on by default.
        ratios: shares of the pixels that are replaced, in [0, 1].
        replacement: what replaces them; see `replacement_images`. Insertion, deletion and SRG use their own.
        steps: number of steps of insertion, deletion and SRG, at least 1.
        tolerance: tolerance of the pointing game, in pixels of an image with a shorter side of 224; scales with size.
        radius: noise bound of max-sensitivity, in units of the preprocessed image, positive.
        samples: number of noisy copies for max-sensitivity, at least 1.
        randomised: shares of the modules with random weights, in (0, 1].
        order: order of randomisation, `"top_down"`, `"bottom_up"` or `"independent"`.
        draws: number of randomisations to average over, at least 1.
        noises: noise levels of the stability scores, as shares of the image's range, positive.
        noise_draws: number of noisy copies per image and noise level for the stability scores, at least 1.
        seed: random seed of ties, noise and weights.
        internal_batch_size: number of images per pass, at least 1.

    Raises:
        SettingError: if a family is unknown, or a setting is out of range.
    """

    families: tuple[Family, ...] = ("perturbation", "localisation", "sparsity")
    ratios: tuple[float, ...] = RATIOS
    replacement: Replacement = "zero"
    steps: int = 20
    tolerance: float = 15.0
    radius: float = 0.02
    samples: int = 10
    randomised: tuple[float, ...] = (0.1, 0.5, 1.0)
    order: RandomisationOrder = "top_down"
    draws: int = 1
    noises: tuple[float, ...] = NOISES
    noise_draws: int = 4
    seed: int = 0
    internal_batch_size: int = 32

    def __post_init__(self) -> None:
        for family in self.families:
            if family not in FAMILIES:
                raise SettingError(f"`families` contains {family!r}, but each must be one of {', '.join(FAMILIES)}.")
        for name in ("internal_batch_size", "steps", "samples", "draws", "noise_draws"):
            check_whole_number(name, getattr(self, name), 1)
        if not self.ratios or not all(0 <= ratio <= 1 for ratio in self.ratios):
            raise SettingError(f"`ratios` is {self.ratios}, but it must be shares of the pixels, in [0, 1].")
        if not self.randomised or not all(0 < share <= 1 for share in self.randomised):
            raise SettingError(f"`randomised` is {self.randomised}, but it must be shares of the modules, in (0, 1].")
        check_noises(self.noises)
        if not 0 <= self.tolerance < math.inf:
            raise SettingError(f"`tolerance` is {self.tolerance}, but it must be finite and at least 0.")
        if not self.radius > 0:
            raise SettingError(f"`radius` is {self.radius}, but it must be positive.")
        for name, kind in (("replacement", Replacement), ("order", RandomisationOrder)):
            if getattr(self, name) not in get_args(kind):
                raise SettingError(
                    f"`{name}` is {getattr(self, name)!r}, but it must be one of {', '.join(get_args(kind))}."
                )


def at_ratio(name: str, ratio: float) -> str:
    """Name a score at one share of replaced pixels, share of random weights, or noise level.

    Example:
        >>> at_ratio("aopc_morf", 0.1)
        'aopc_morf@0.1'
    """
    return f"{name}@{ratio:g}"


def score_maps(
    model: nn.Module,
    method: Method,
    images: Tensor,
    target: Tensor,
    heat: Tensor,
    regions: Sequence[Tensor | None],
    settings: ScoreSettings | None = None,
    *,
    make_method: Callable[[nn.Module], Method] | None = None,
) -> dict[str, Tensor]:
    """Score the maps of a batch.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        method: method that made the maps; only called for other images or classes.
        images: images (B, C, H, W).
        target: explained class of each image, shape (B,).
        heat: maps (B, H, W).
        regions: region of the class in each image, boolean (H, W); None if unknown.
        settings: settings of the scores; None uses the defaults.
        make_method: makes the method for a model with other weights, for the family `"randomisation"`.

    Returns:
        Scores by name, each (B,), float64; NaN where undefined.

    Raises:
        SettingError: if a setting is out of range, or `make_method` is missing.
        InputError: if images, maps and regions do not match.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval()
        >>> images, target = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
        >>> def method(images, target):
        ...     return images.mean(1)
        >>> found = score_maps(model, method, images, target, method(images, target), [None, None])
        >>> found["mass_inside"]
        tensor([nan, nan], dtype=torch.float64)
    """
    chosen = settings or ScoreSettings()
    found: dict[str, Tensor] = {}
    if "perturbation" in chosen.families:
        found |= _perturbation_scores(model, images, target, heat, chosen)
    found |= _curve_scores(model, images, target, heat, chosen)
    if "localisation" in chosen.families:
        nowhere = torch.zeros(heat.shape[1:], dtype=torch.bool, device=heat.device)
        region = torch.stack([nowhere if known is None else known.to(heat.device) for known in regions])
        found["mass_inside"] = localisation.mass_inside(heat, region)
        # An empty region has no share to compare a map with.
        share = localisation.area_share(region)
        found["region_share"] = share.masked_fill(share == 0, math.nan)
        found["weighted_mass_inside"] = localisation.weighted_mass_inside(heat, region)
        tolerance = chosen.tolerance * min(heat.shape[1:]) / _TOLERANCE_SIZE
        found["pointing_game"] = localisation.pointing_game(heat, region, tolerance=tolerance)
    if "sparsity" in chosen.families:
        found["gini"] = gini(heat)
    if "sensitivity" in chosen.families:
        found["max_sensitivity"] = sanity.max_sensitivity(
            method,
            images,
            target,
            radius=chosen.radius,
            samples=chosen.samples,
            seed=chosen.seed,
            internal_batch_size=chosen.internal_batch_size,
        )
    if "randomisation" in chosen.families:
        if make_method is None:
            raise SettingError(
                "`make_method` is None, but the scores 'randomisation' need it to explain models with other weights."
            )
        found |= _randomisation_scores(model, make_method, images, target, chosen)
    if "class_similarity" in chosen.families:
        with torch.no_grad():
            classes = Logits(model, None)(images[:1]).shape[1]
        found["class_similarity"] = sanity.class_similarity(
            method, images, target, heat, classes=classes, seed=chosen.seed
        )
    if "stability" in chosen.families:
        found |= _stability_scores(method, images, target, chosen)
    return found


def _curve_scores(
    model: nn.Module, images: Tensor, target: Tensor, heat: Tensor, settings: ScoreSettings
) -> dict[str, Tensor]:
    """Scores of probability curves from the whole image to none of it, or back."""

    @cache
    def curve(order: Order, replacement: Replacement) -> Responses:
        return perturbation.respond(
            model,
            images,
            target,
            heat,
            order=order,
            ratios=perturbation.even_steps(settings.steps),
            replacement=replacement,
            seed=settings.seed,
            internal_batch_size=settings.internal_batch_size,
        )

    found: dict[str, Tensor] = {}
    if "insertion" in settings.families:
        # To insert the most relevant pixels first is to erase the least relevant first, read backwards.
        found["insertion"] = perturbation.area_under_curve(curve("lerf", "blur"))
        found["deletion"] = perturbation.area_under_curve(curve("morf", "zero"))
    if "relevance_gain" in settings.families:
        for replacement in _GAIN_REPLACEMENTS:
            found[f"srg_{replacement}"] = perturbation.symmetric_relevance_gain(
                curve("morf", replacement), curve("lerf", replacement)
            )
    return found


def _randomisation_scores(
    model: nn.Module,
    make_method: Callable[[nn.Module], Method],
    images: Tensor,
    target: Tensor,
    settings: ScoreSettings,
) -> dict[str, Tensor]:
    steps = sanity.parameter_randomisation(
        model,
        make_method,
        images,
        target,
        order=settings.order,
        seeds=range(settings.seed, settings.seed + settings.draws),
        shares=settings.randomised,
    )
    found: dict[str, Tensor] = {}
    for name, field in (
        ("randomisation_spearman", "spearman"),
        ("randomisation_similarity", "structural_similarity"),
    ):
        flat = torch.stack([getattr(step, field) for step in steps])
        values = flat.reshape(settings.draws, len(settings.randomised), -1).mean(dim=0)
        found[name] = values.mean(dim=0)
        found |= {at_ratio(name, share): value for share, value in zip(settings.randomised, values, strict=True)}
    return found


def _stability_scores(method: Method, images: Tensor, target: Tensor, settings: ScoreSettings) -> dict[str, Tensor]:
    measured = stability(
        method,
        images,
        target,
        noises=settings.noises,
        draws=settings.noise_draws,
        seed=settings.seed,
        internal_batch_size=settings.internal_batch_size,
    )
    found: dict[str, Tensor] = {}
    for name, values in (
        ("stability_cosine", measured.cosine),
        ("stability_spearman", measured.spearman),
        ("stability_norm_ratio", measured.norm_ratio),
    ):
        found[name] = values.mean(dim=0)
        found |= {at_ratio(name, noise): value for noise, value in zip(settings.noises, values, strict=True)}
    return found


def _perturbation_scores(
    model: nn.Module, images: Tensor, target: Tensor, heat: Tensor, settings: ScoreSettings
) -> dict[str, Tensor]:
    by_ratio: dict[str, Tensor] = {}
    for order in get_args(perturbation.Order):
        responses = perturbation.respond(
            model,
            images,
            target,
            heat,
            order=order,
            ratios=settings.ratios,
            replacement=settings.replacement,
            seed=settings.seed,
            internal_batch_size=settings.internal_batch_size,
        )
        by_ratio[f"aopc_{order}"] = perturbation.probability_drop(responses)
        by_ratio[f"log_odds_{order}"] = perturbation.log_odds(responses)
        by_ratio[f"accuracy_{order}"] = perturbation.accuracy(responses)
        by_ratio[f"fractional_difference_{order}"] = perturbation.fractional_difference(responses)
    by_ratio["aopc"] = by_ratio["aopc_morf"] - by_ratio["aopc_lerf"]
    found = {name: values.mean(dim=1) for name, values in by_ratio.items()}
    for name, values in by_ratio.items():
        found |= {at_ratio(name, ratio): values[:, place] for place, ratio in enumerate(settings.ratios)}
    return found
