"""Every Python block of the README runs as printed."""

import re
from pathlib import Path

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
