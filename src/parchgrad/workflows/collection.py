"""Collect channel statistics from a folder of images, with full metadata."""

import json
from pathlib import Path

from parchgrad.core.layers import LayerChoice
from parchgrad.data.folders import PhotographFolder
from parchgrad.errors import ImageError
from parchgrad.models.classifier import Classifier, check_classifier
from parchgrad.statistics import ChannelStatistics
from parchgrad.statistics.accumulate import Progress
from parchgrad.statistics.batches import Labels
from parchgrad.statistics.collect import collect_statistics

__all__ = ["collect_from_folder"]


def collect_from_folder(
    classifier: Classifier,
    folder: str | Path,
    *,
    layers: LayerChoice = "all",
    labels: Labels = "given",
    batch_size: int = 32,
    workers: int = 0,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 250,
    skip_unreadable: bool = False,
    on_progress: Progress | None = None,
) -> ChannelStatistics:
    """Collect channel statistics of a classifier over the images in a folder and its subfolders.

    With given labels every class has its own folder, named by WordNet id, category or index, or there are as many
    folders as classes, in sorted order. With predicted labels any folder works.

    Args:
        classifier: the network with its preprocessing and classes.
        folder: folder of the images.
        layers: see `collect_statistics`.
        labels: see `collect_statistics`.
        batch_size: see `collect_statistics`.
        workers: see `collect_statistics`.
        seed: see `collect_statistics`.
        checkpoint: see `collect_statistics`.
        checkpoint_every: see `collect_statistics`.
        skip_unreadable: whether to skip unreadable images with a warning instead of raising an error.
        on_progress: see `collect_statistics`.

    Returns:
        The statistics, with the model, its preprocessing and categories, and the data as metadata.

    Raises:
        ImageError: if there are no images, one cannot be read, or the class folders do not match the classes.
        ParchGradError: whatever `collect_statistics` raises.

    Example:
        >>> import tempfile
        >>> import parchgrad as pg
        >>> from PIL import Image
        >>> classifier = pg.load_model("resnet18", pretrained=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for colour in ("red", "green"):
        ...         Image.new("RGB", (300, 260), colour).save(Path(folder, f"{colour}.png"))
        ...     statistics = collect_from_folder(classifier, folder, labels="predicted", layers=["layer4.*"])
        >>> statistics.metadata["model"], statistics.metadata["images"]
        ('resnet18', '2')
    """
    check_classifier(classifier)
    photographs = PhotographFolder(folder, classifier.preprocess.transform, skip_unreadable=skip_unreadable)
    described = f"{len(photographs)} photographs in {Path(folder).resolve().name}"
    if labels == "given":
        try:
            photographs = photographs.with_categories(classifier.categories, classifier.synsets)
        except ImageError as error:
            raise ImageError(f"{error} Predicted labels need no class folders. Pass `labels='predicted'`.") from error
        described += f", {len(photographs.folders)} class folders by {photographs.matched_by}"
    try:
        return collect_statistics(
            classifier.model,
            photographs,
            layers=layers,
            labels=labels,
            batch_size=batch_size,
            workers=workers,
            seed=seed,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            metadata={
                "model": classifier.name,
                "preprocessing": classifier.preprocess.description,
                "data": described,
                "categories": json.dumps(classifier.categories),
            },
            on_progress=on_progress,
        )
    except ImageError as error:
        if skip_unreadable:
            raise
        raise ImageError(f"{error} Unreadable images can be skipped. Pass `skip_unreadable=True`.") from error
