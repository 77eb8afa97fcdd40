"""Rebuild the compact channel statistics of EfficientNet-Lite0 that come with the package.

    python tools/bundle_statistics.py FOLDER

FOLDER contains images of ImageNet's classes. Their labels are not used, only the network's predictions. The statistics
cover the upper half of the convolutions, which includes the published layers.
"""

import argparse
from pathlib import Path

import parchgrad
from parchgrad.cli.shared import ProgressBars
from parchgrad.models.loading import OFFLINE_MODEL

LAYERS = 0.5
SHARE = 0.5
TARGET = Path(parchgrad.__file__).parent / "statistics" / "bundled" / f"{OFFLINE_MODEL}.safetensors"


def main() -> None:
    """Collect the statistics, compact them, and save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of images")
    parser.add_argument("--full", type=Path, help="also save the full statistics to this file")
    arguments = parser.parse_args()
    classifier = parchgrad.load_model(OFFLINE_MODEL)
    with ProgressBars() as progress:
        found = parchgrad.collect_from_folder(
            classifier, arguments.folder, labels="predicted", layers=LAYERS, batch_size=8, on_progress=progress.update
        )
    missing = set(parchgrad.choose_layers(classifier.model, "published")) - set(found)
    if missing:
        raise SystemExit(f"The statistics lack the published layers {sorted(missing)}. Raise LAYERS.")
    if arguments.full:
        found.save(arguments.full)
    found.compact(share=SHARE).save(TARGET)
    print(f"{TARGET.name}: {TARGET.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
