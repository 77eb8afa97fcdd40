"""From a folder of photographs to channel statistics of a classifier, with all that they depend on, on record."""

import json
from pathlib import Path

from parchgrad.data.folders import PhotographFolder, match_classes
from parchgrad.errors import ImageError
from parchgrad.layers import LayerChoice
from parchgrad.models import Classifier, check_classifier
from parchgrad.statistics import ChannelStatistics
from parchgrad.statistics.accumulate import Progress
from parchgrad.statistics.collect import Labels, collect_statistics

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
    """Collect channel statistics of a classifier over the photographs below a folder.

    With given labels every class has a folder of its own, named by its WordNet id, its category or its index; or there
    are as many folders as classes, and sorted they are in their order. With predicted labels any folder will do.

    Args:
        classifier: the network with its preprocessing and classes.
        folder: where the photographs are; folders within folders are searched too.
        layers: see `collect_statistics`, as for all that follows.
        labels: see there.
        batch_size: see there.
        workers: see there.
        seed: see there.
        checkpoint: see there.
        checkpoint_every: see there.
        skip_unreadable: whether photographs that cannot be read are warned of and left out, instead of ending the
            collection.
        on_progress: see there.

    Returns:
        The statistics; their metadata name the model, its preprocessing and categories, and the data.

    Raises:
        ImageError: if there are no photographs, one cannot be read, or the class folders cannot be told.
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
        if not photographs.folders:
            raise ImageError(
                f"Photographs stand in {str(folder)!r} itself, outside of any class folder; sort all into one folder "
                "for each class, or use predicted labels, which need none."
            )
        class_of, way = match_classes(photographs.folders, classifier.categories, classifier.synsets)
        photographs = photographs.with_classes(class_of)
        described += f", {len(class_of)} class folders by {way}"
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
                "preprocessing": " ".join(str(classifier.preprocess.transform).split()),
                "data": described,
                "categories": json.dumps(classifier.categories),
            },
            on_progress=on_progress,
        )
    except ImageError as error:
        if skip_unreadable:
            raise
        wrong, _, remedy = str(error).removesuffix(".").rpartition("; ")
        raise ImageError(
            f"{wrong}; {remedy}, or leave such out: skip_unreadable=True, or --skip-unreadable on the command line."
        ) from error
