"""Explain all images in a folder in batches, each for its predicted class.

    python examples/batch_over_a_folder.py                    # creates a folder of scikit-image's example images first
    python examples/batch_over_a_folder.py holiday/ --batch 16

For each image the script writes a figure, the raw map (.npy) and all settings (.json); for the folder it writes
maps.csv and an overview. The output folder is outputs/examples/folder; --out changes it. Memory depends on the batch
size, not on the folder. Files that are not complete images are reported and skipped. The table shows the smallest share
of the pixels that holds half of the map: the more concentrated the map, the smaller it is.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from skimage import data
from torch import Tensor

import parchgrad as pg
from parchgrad.data.folders import find_files
from parchgrad.data.images import read_image
from parchgrad.visual import panel, save_figure

PHOTOGRAPHS = ("astronaut", "camera", "cat", "coffee", "rocket")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SHOWN = 6


def half_of_the_map(attribution: Tensor) -> float:
    """Compute the smallest share of the pixels that holds half of the map of an attribution (3, H, W)."""
    sums = pg.heatmap(attribution.unsqueeze(0)).flatten().double().sort(descending=True).values.cumsum(dim=0)
    return (int((sums < sums[-1] / 2).sum()) + 1) / len(sums)


def name_results(files: Sequence[Path], root: Path) -> dict[Path, str]:
    """Name results by folders and file; number equal names, such as those of a.jpg and a.png."""
    names: dict[Path, str] = {}
    for file in files:
        stem = name = "-".join(file.relative_to(root).with_suffix("").parts)
        number = 2
        while name in names.values():
            name, number = f"{stem}-{number}", number + 1
        names[file] = name
    return names


def main(arguments: Sequence[str] | None = None) -> None:
    """Explain all images in the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder of images")
    parser.add_argument("--batch", type=int, default=4, help="number of images per pass")
    parser.add_argument("--out", type=Path, default=Path("outputs/examples/folder"))
    given = parser.parse_args(arguments)
    if given.batch < 1:
        sys.exit("--batch must be at least 1.")
    if given.folder is None:
        given.folder = given.out / "photographs"
        given.folder.mkdir(parents=True, exist_ok=True)
        for name in PHOTOGRAPHS:
            Image.fromarray(getattr(data, name)()).save(given.folder / f"{name}.png")
    files = find_files(given.folder, SUFFIXES)
    if not files:
        sys.exit(f"No images in {given.folder}. Name a folder of {', '.join(SUFFIXES)} files.")
    names = name_results(files, given.folder)
    classifier = pg.load_model("efficientnet_lite0")

    rows, shown = [], []
    for batch in (files[start : start + given.batch] for start in range(0, len(files), given.batch)):
        images = {}
        for file in batch:
            try:
                images[file] = read_image(file)
            except pg.ParchGradError as error:
                print(f"skipped: {error}")
        # `target=None` explains the predicted class of each image, in one batch.
        found = pg.explain_images(classifier, list(images.values()), internal_batch_size=given.batch)
        for file, explanation in zip(images, found, strict=True):
            name = names[file]
            explanation.save(given.out / "maps", name, force=True)
            halves = [half_of_the_map(attribution) for attribution in (explanation.plain, explanation.attribution)]
            rows.append((name, explanation.target.category, explanation.target.probability, *halves))
            print(f"{name:12} {rows[-1][1]:18} {rows[-1][2]:4.0%}", end="")
            print(f"  half of the map in {halves[1]:.2%} (plain: {halves[0]:.2%})")
        shown += found[: SHOWN - len(shown)]
    with open(given.out / "maps.csv", "w", newline="", encoding="utf-8") as table:
        csv.writer(table).writerows([("photograph", "class", "probability", "half_plain", "half_parchgrad"), *rows])
    if shown:
        plain, partitioned = (torch.stack([getattr(e, kind) for e in shown]) for kind in ("plain", "attribution"))
        columns = {"gradient": list(pg.heatmap(plain)), "gradient + ParchGrad": list(pg.heatmap(partitioned))}
        labels = [explanation.target.category for explanation in shown]
        save_figure(panel([e.picture for e in shown], columns, labels=labels), given.out / "overview.jpg")
    print(f"wrote {len(rows)} maps, maps.csv and overview.jpg to {given.out}")


if __name__ == "__main__":
    main()
