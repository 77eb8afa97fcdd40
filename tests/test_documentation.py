"""What the documents print runs, and what they point at is there."""

import re
from pathlib import Path

import captum.attr
import captum.metrics
import pytest
from PIL import Image
from skimage import data

README = Path(__file__).parents[1] / "README.md"


def test_the_blocks_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(data.coffee()).save("photo.jpg", quality=95)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert Path("map.png").stat().st_size > 10_000
    assert names["attribution"].shape == names["x"].shape


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8")))))
def test_links_of_the_readme_lead_somewhere(name):
    assert (README.parent / name).exists()


def test_every_cell_of_the_comparison_that_names_a_source_has_one():
    page = README.parent / "docs" / "comparison.md"
    text, sources = page.read_text(encoding="utf-8").split("## Sources")
    used = set(re.findall(r"\[([CGZQ]\d)\]", text))
    assert used == set(re.findall(r"^- \[([CGZQ]\d)\] - ", sources, flags=re.MULTILINE))
    assert used == set(re.findall(r"^\[([CGZQ]\d)\]: https://", sources, flags=re.MULTILINE))
    for link in re.findall(r"\]\(((?!https)[^)#]+)\)", text):
        assert (page.parent / link).exists()
    # Tables have five libraries in every row.
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {7}


@pytest.mark.skipif(not captum.__version__.startswith("0.9."), reason="the page is about Captum 0.9")
def test_the_comparison_is_right_about_the_captum_that_is_installed():
    metrics = {name for name in captum.metrics.__all__ if "decorator" not in name}
    assert metrics == {"infidelity", "sensitivity_max"}
    assert len(captum.attr._core.lrp.SUPPORTED_LAYERS_WITH_RULES) == 9
    assert {"LRP", "LayerGradCam", "GuidedGradCam", "Occlusion", "Lime", "LLMAttribution"} <= set(captum.attr.__all__)
