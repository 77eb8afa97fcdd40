"""Run the notebooks of docs/ in an empty folder and save their outputs in them.

Figures are converted to JPEG, which keeps the files small.

python tools/run_notebooks.py [docs/tutorial.ipynb ...]
"""

import argparse
import base64
import io
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

DOCS = Path(__file__).parents[1] / "docs"
QUALITY = 85


def run(path: Path) -> None:
    """Run one notebook from top to bottom, and save it if every cell succeeds."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        # Progress bars are not visible here.
        quiet = {**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found"}
        client = NotebookClient(notebook, timeout=600, resources=resources, record_timing=False, coalesce_streams=True)
        client.execute(env=quiet)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/jpeg"] = as_jpeg(data.pop("image/png"))
                # Drop the text form, the size and address of the figure.
                data.pop("text/plain", None)
    nbformat.write(notebook, path)


def as_jpeg(png: str) -> str:
    """Convert a base64 PNG to a base64 JPEG on white."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    paper = Image.new("RGB", picture.size, "white")
    paper.paste(picture, mask=picture)
    buffer = io.BytesIO()
    paper.save(buffer, format="JPEG", quality=QUALITY, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(DOCS.rglob("*.ipynb")))
    for notebook in parser.parse_args().notebooks:
        run(notebook)
