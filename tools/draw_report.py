"""Draw the pictures of reading_the_report.md from a report on generated shapes; needs Chromium and its driver.

python tools/draw_report.py
"""

import base64
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver

import parchgrad as pg
from parchgrad.data.shapes import GeneratedShapes
from parchgrad.evaluation.runs import evaluate
from parchgrad.evaluation.settings import Grid
from parchgrad.workflows.report_page import make_report

IMAGES = Path(__file__).parents[1] / "docs" / "images"
WIDTH, HEIGHT = 1100, 1330


def write_report(folder: Path) -> Path:
    """Evaluate two selectors and return the page of the report."""
    grid = Grid(selectors=("evidence", "energy"))
    evaluate(pg.load_model("shapes").model, GeneratedShapes(count=40), grid.settings(), folder / "run", name="shapes")
    return make_report([folder / "run"]).save(folder / "report")


def open_page(page: Path) -> webdriver.Chrome:
    """Open a page in a headless browser."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    sizes = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    driver.get(page.as_uri())
    return driver


def photograph(driver: webdriver.Chrome, top: float, height: float) -> Image.Image:
    """Take a picture of a part of the page, in pixels from its top."""
    clip = {"x": 0, "y": top, "width": WIDTH, "height": height, "scale": 1}
    found = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    return Image.open(io.BytesIO(base64.b64decode(found["data"]))).convert("RGB")


def main() -> None:
    """Draw the top of the page, and one example of each group."""
    with tempfile.TemporaryDirectory() as folder:
        driver = open_page(write_report(Path(folder)))
        try:
            script = "return [...document.querySelectorAll(arguments[0])].map(e => [e.offsetTop, e.offsetHeight])"
            end = driver.execute_script(script, "details")[0][0]
            photograph(driver, 0, end).save(IMAGES / "report.jpg", quality=85)
            # Each heading is followed by the first example of its group.
            headings = driver.execute_script(script, "h4:has(+ .example)")
            examples = driver.execute_script(script, "h4 + .example")
            parts = [
                photograph(driver, start, top + height - start)
                for (start, _), (top, height) in zip(headings, examples, strict=True)
            ]
            both = Image.new("RGB", (WIDTH, sum(part.height for part in parts)))
            for place, part in enumerate(parts):
                both.paste(part, (0, sum(above.height for above in parts[:place])))
            both.save(IMAGES / "report-examples.jpg", quality=85)
        finally:
            driver.quit()


if __name__ == "__main__":
    main()
