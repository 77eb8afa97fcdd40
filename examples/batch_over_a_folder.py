"""Explain every photograph of a folder, batch by batch, each for the class that the network predicts.

    python examples/batch_over_a_folder.py                    # makes a folder of scikit-image's photographs first
    python examples/batch_over_a_folder.py holiday/ --batch 16

For each photograph come out a picture, the raw map (.npy) and all settings (.json), and for the folder maps.csv and an
overview; in outputs/examples/folder unless --out says otherwise. Memory depends on the batch, not on the folder, and
files that are no complete image are named and left out. The number in the table is how little of the picture holds half
of the map: small where the map is concentrated.
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
    """Share of the pixels, the strongest first, that hold half of the map of (3, H, W)."""
    sums = pg.heatmap(attribution.unsqueeze(0)).flatten().double().sort(descending=True).values.cumsum(dim=0)
    return (int((sums < sums[-1] / 2).sum()) + 1) / len(sums)


def name_results(files: Sequence[Path], root: Path) -> dict[Path, str]:
    """Name each file's results after its folders and itself; equal names, of a.jpg and a.png, are numbered."""
    names: dict[Path, str] = {}
    for file in files:
        stem = name = "-".join(file.relative_to(root).with_suffix("").parts)
        number = 2
        while name in names.values():
            name, number = f"{stem}-{number}", number + 1
        names[file] = name
    return names


def main(arguments: Sequence[str] | None = None) -> None:
    """Explain the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder of photographs")
    parser.add_argument("--batch", type=int, default=4, help="photographs in one pass")
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
        sys.exit(f"There is no photograph in {given.folder}.")
    names = name_results(files, given.folder)
    classifier = pg.load_model("efficientnet_lite0")

    rows, shown = [], []
    for batch in (files[start : start + given.batch] for start in range(0, len(files), given.batch)):
        images = {}
        for file in batch:
            try:
                images[file] = read_image(file)
            except pg.ParchGradError as error:
                print(f"left out: {error}")
        # `target=None` explains each row's predicted class; all rows go through the network together.
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
    print(f"wrote {len(rows)} maps, maps.csv and overview.jpg into {given.out}")


if __name__ == "__main__":
    main()
