"""Draw the pictures of docs/gallery: run the code of each page, and save its figure and a detail for the index.

python tools/draw_gallery.py [PAGE ...]
"""

import argparse
import io
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps

GALLERY = Path(__file__).resolve().parents[1] / "docs" / "gallery"
DOTS_PER_INCH = 105
QUALITY = 80
# Side of a detail in pixels: twice that on the page, for dense screens.
SIDE = 280
GAP = 6
_BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Detail:
    """The part of a page's figure that the index shows.

    Attributes:
        rows: indices of the figure's axes, in the rows to show them in.
        centre: part to keep of a detail that is not square, from (0, 0) for the left and top to (1, 1).
    """

    rows: tuple[tuple[int, ...], ...]
    centre: tuple[float, float] = (0.5, 0.5)


DETAILS = {
    "classification": Detail(((3,),)),
    "contrast": Detail(((3,),)),
    "detection": Detail(((1,),)),
    "segmentation": Detail(((3,),)),
    "embeddings": Detail(((1,), (2,))),
    "several_labels": Detail(((3,),)),
    "regression": Detail(((1,),)),
    "two_inputs": Detail(((1,),)),
    "signal": Detail(((0,), (1,)), centre=(0.03, 0.5)),
    "volume": Detail(((0,),)),
    "clip": Detail(((2, 3), (7, 8))),
}
"""Details by the name of the page."""


def run_page(page: Path) -> Figure:
    """Run the Python blocks of a page, and return the `figure` that they make."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in _BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(block, str(page), "exec"), names)
    figure = names["figure"]
    assert isinstance(figure, Figure)
    return figure


def render(figure: Figure) -> Image.Image:
    """Render a figure on white, since pages may have a dark background."""
    # Makes the axes' extents fit the picture.
    figure.set_dpi(DOTS_PER_INCH)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DOTS_PER_INCH, facecolor="white")
    return Image.open(buffer).convert("RGB")


def cut_out(figure: Figure, picture: Image.Image, detail: Detail) -> Image.Image:
    """Cut axes of equal size out of a rendered figure, and tile them on a square."""
    tiles = {
        (across, down): inside(figure.axes[index], picture)
        for down, row in enumerate(detail.rows)
        for across, index in enumerate(row)
    }
    width, height = tiles[0, 0].size
    columns, rows = len(detail.rows[0]), len(detail.rows)
    tiled = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for (across, down), tile in tiles.items():
        tiled.paste(tile, (across * (width + GAP), down * (height + GAP)))
    return ImageOps.fit(tiled, (SIDE, SIDE), centering=detail.centre)


def inside(axes: Axes, picture: Image.Image) -> Image.Image:
    """Cut axes out of a rendered figure, without their border."""
    left, bottom, right, top = axes.get_window_extent().padded(-1).extents
    return picture.crop((round(left), round(picture.height - top), round(right), round(picture.height - bottom)))


def save(picture: Image.Image, name: str) -> None:
    """Save a picture of the gallery."""
    path = GALLERY / "images" / f"{name}.jpg"
    picture.save(path, quality=QUALITY, optimize=True)
    print(f"{path.name}: {picture.width} x {picture.height}, {path.stat().st_size / 1000:.0f} kB", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the pictures of all pages, or of those named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="PAGE", default=list(DETAILS), help=", ".join(DETAILS))
    pages = parser.parse_args(arguments).pages
    for name in pages:
        if name not in DETAILS:
            parser.error(f"PAGE is {name!r}, but it must be one of {', '.join(DETAILS)}.")
    with tempfile.TemporaryDirectory() as folder:
        # Pages save their figures in the current folder.
        os.chdir(folder)
        for name in pages:
            figure = run_page(GALLERY / f"{name}.md")
            picture = render(figure)
            save(picture, name)
            save(cut_out(figure, picture, DETAILS[name]), f"{name}-small")


if __name__ == "__main__":
    main()
