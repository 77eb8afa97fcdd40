"""Every block, command, notebook and link of the documentation does what it says."""

import ast
import csv
import importlib
import importlib.util
import io
import json
import pkgutil
import re
import shlex
import subprocess
import sys
import warnings
import zlib
from contextlib import redirect_stdout
from pathlib import Path

import captum.attr
import captum.metrics
import numpy as np
import pytest
import torch
import typer
from PIL import Image
from skimage import data
from torchvision.models import WeightsEnum, get_model
from torchvision.models.segmentation import fcn_resnet50

import parchgrad
from parchgrad import cli, errors
from tests.support import ROOT, input_gradient, small_network

DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))}
NOTEBOOKS = {str(path.relative_to(ROOT)): path for path in sorted(DOCS.rglob("*.ipynb"))}

# Commands that name these need weights, images or processes that are not there: only their options are looked at.
_ELSEWHERE = ("resnet", "imagenet", "torchrun", "first.safetensors", "parchgrad explore")

# Libraries that pages show beside this one, which no extra installs.
_BESIDE = re.compile(r"^(?:from|import) (pytorch_grad_cam|quantus)\b", flags=re.MULTILINE)

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")


def blocks_of(path, language):
    return [text for found, text in _BLOCK.findall(path.read_text(encoding="utf-8")) if found == language]


def pages_with(language):
    return [pytest.param(path, id=name) for name, path in PAGES.items() if blocks_of(path, language)]


def commands_of(path):
    """The commands of this package on a page, as lists of words, without what comes before `parchgrad`."""
    for line in "".join(blocks_of(path, "sh")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "parchgrad" in words and words[0] in ("parchgrad", "torchrun"):
            yield line, words[words.index("parchgrad") + 1 :]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder as a reader may have it, for all pages one after the other: a photograph, and a folder of some."""
    place = tmp_path_factory.mktemp("desk")
    Image.fromarray(data.coffee()).save(place / "photo.jpg", quality=95)
    (place / "networks.py").write_text(
        "import parchgrad\n\n\ndef make():\n    return parchgrad.load_model('shapes')\n", encoding="utf-8"
    )
    for name in ("mine.pth", "classes.txt"):
        (place / name).touch()
    for name in ("coffee", "cat", "camera", "rocket"):
        folder = place / "photos" / name
        folder.mkdir(parents=True)
        Image.fromarray(getattr(data, name)()).convert("RGB").save(folder / "1.jpg")
    yield place
    # Statistics of all layers are large.
    for path in place.rglob("*.safetensors"):
        path.unlink()


@pytest.fixture
def reader(desk, monkeypatch):
    """The reader, who sits in that folder, offline: weights of torchvision are random."""
    monkeypatch.chdir(desk)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr(
        WeightsEnum,
        "get_state_dict",
        lambda self, *_, **__: get_model(type(self).__name__.partition("_")[0].lower()).state_dict(),
    )
    return desk


# ROAD of pytorch-grad-cam 1.5.7 with NumPy 2.
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.parametrize("page", pages_with("python"))
def test_the_python_blocks_of_a_page_run_as_printed(page, reader):
    names: dict[str, object] = {"__name__": "__main__"}
    missing = set()
    for block in blocks_of(page, "python"):
        needed = {name for name in _BESIDE.findall(block) if importlib.util.find_spec(name) is None}
        missing |= needed
        if not needed:
            exec(compile(block, str(page), "exec"), names)
    if missing:
        pytest.skip(f"The rest of the page ran; not installed: {', '.join(sorted(missing))}.")
    if page.name == "README.md":
        assert (reader / "maps" / "photo.png").stat().st_size > 10_000


def test_the_call_for_a_segmentation_network_serves_deeplab_too():
    block = blocks_of(DOCS / "how_to" / "segmentation_and_multi_label.md", "python")[0]
    names: dict[str, object] = {}
    exec(block.replace("fcn_resnet50", "deeplabv3_resnet50"), names)
    images = names["images"].clone().requires_grad_()
    scores = names["network"](images)["out"]
    # Of random weights, which class is called anywhere is by chance.
    target = int(scores.argmax(dim=1).flatten().bincount().argmax())
    called = scores.argmax(dim=1) == target
    (gradient,) = torch.autograd.grad(scores[:, target][called].sum(), images)
    explainer = parchgrad.Explainer(names["network"], None, logits=lambda output: output["out"])
    plain = explainer.attribute(images, parchgrad.RegionScore(target=target))
    torch.testing.assert_close(plain, gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))
    edited = names["explainer"].attribute(images, parchgrad.RegionScore(target=target))
    assert edited.any()
    assert not torch.allclose(edited, plain)


def test_the_adapters_keep_the_order_of_pixels_and_the_forms_that_other_libraries_expect():
    names: dict[str, object] = {}
    for block in blocks_of(DOCS / "how_to" / "other_libraries.md", "python"):
        if not _BESIDE.search(block):
            exec(block, names)
    model, x, classes = small_network(dtype=torch.float32), torch.rand(3, 3, 8, 8), [4, 0, 2]
    heat = parchgrad.heatmap(parchgrad.Explainer(model).attribute(x, classes)).numpy()

    cam = names["ParchGradCAM"](model)
    # As a target of pytorch-grad-cam, which takes the output with or without a dimension of rows.
    maps = cam(input_tensor=x, targets=[lambda output, index=index: output[..., index] for index in classes])
    assert (maps.shape, maps.dtype) == ((3, 8, 8), np.float32)
    for found, expected in zip(maps, heat, strict=True):
        # The 99th percentile of 64 pixels lies between the two largest: all but one keep their proportions.
        top = np.quantile(expected, 0.99)
        np.testing.assert_allclose(found, np.minimum(expected / top, 1), rtol=1e-5)
    predicted = model(x).argmax(dim=1).tolist()
    of_predicted = cam(x, [lambda output, index=index: output[..., index] for index in predicted])
    np.testing.assert_allclose(cam(x), of_predicted, rtol=1e-4)

    found = names["explain"](model=model, inputs=x.numpy().astype(np.float64), targets=np.array(classes), device="cpu")
    np.testing.assert_array_equal(found, heat)
    plain = names["explain"](model, x.numpy(), np.array(classes), selector=None)
    gradients = [
        input_gradient(model, row[None], index)[0].abs().mean(0) for row, index in zip(x, classes, strict=True)
    ]
    np.testing.assert_allclose(plain, torch.stack(gradients), rtol=1e-5)


def test_the_patterns_of_the_page_leave_out_the_heads():
    network = fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True)
    patterns = parchgrad.choose_layers(network, ["*.layer3.*", "*.layer4.*"])
    assert patterns
    assert not [name for name in patterns if "classifier" in name]


def test_options_between_backticks_are_left_alone(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "extensions")
    plain = importlib.import_module("command_line").plain
    assert (
        plain("see `parchgrad explain --help`, or --layers 0.5") == "see `parchgrad explain --help`, or `--layers` 0.5"
    )


# Balance alone leaves the gradient of the network of shapes as it is.
@pytest.mark.filterwarnings("ignore:Methods that do not fit shapes are left out")
@pytest.mark.parametrize("page", pages_with("sh"))
def test_the_commands_of_a_page_run_or_at_least_exist(page, reader, capsys):
    for settings in blocks_of(page, "toml")[:1]:
        assert not (reader / "study.toml").exists()
        (reader / "study.toml").write_text(settings)
    for line, words in commands_of(page):
        if any(name in line for name in _ELSEWHERE):
            check_options(words)
            continue
        with warnings.catch_warnings():
            # Notes, which a command says in a line.
            warnings.simplefilter("default", errors.StatisticsWarning)
            with pytest.raises(SystemExit) as end:
                cli.main(words)
        assert not end.value.code, f"{line}: {capsys.readouterr().err}"


def test_every_page_reports_its_own_evaluations_in_folders_of_its_own():
    owners: dict[str, str] = {}
    for name, path in PAGES.items():
        for line, words in commands_of(path):
            if words[0] not in ("evaluate", "report") or any(found in line for found in _ELSEWHERE):
                continue
            folder = Path(words[words.index("--out") + 1])
            if words[0] == "evaluate":
                assert owners.setdefault(str(folder), name) == name, f"{name} and {owners[str(folder)]} share {folder}"
            else:
                assert owners.get(str(Path(words[1]).parent)) == name, f"{line} of {name} reports what it did not write"
                assert owners.setdefault(str(folder), name) == name, f"{name} and {owners[str(folder)]} share {folder}"


def check_options(words):
    """Parse a command without running it; an unknown command or option is an error."""
    command, context = typer.main.get_command(cli.app), None
    while hasattr(command, "commands"):
        command = command.commands[words[0]]
        words = words[1:]
    context = command.make_context(command.name, list(words))
    assert not context.args


def test_commands_that_do_not_exist_are_found():
    with pytest.raises(KeyError):
        check_options(["stats", "nothing"])
    with pytest.raises(Exception, match="--nothing"):
        check_options(["explain", "photo.jpg", "--nothing"])


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=NOTEBOOKS)
def test_a_notebook_says_again_what_is_committed(path, reader):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, object] = {"__name__": "__main__"}
    pictures = 0
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        printed, value = run_cell("".join(cell["source"]), names)
        outputs = cell["outputs"]
        committed = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
        assert_alike(printed, committed, f"cell {number}")
        shown = [output["data"] for output in outputs if output["output_type"] == "execute_result"]
        assert len(shown) == (value is not None)
        for content in shown:
            if "image/jpeg" in content:
                pictures += 1
                assert hasattr(value, "savefig")
            else:
                assert_alike(repr(value), "".join(content["text/plain"]), f"cell {number}")
    assert pictures
    assert path.stat().st_size < 1_500_000


def run_cell(source, names):
    """Run a cell: what it prints, and the value of its last expression."""
    body = ast.parse("\n".join(line for line in source.splitlines() if not line.startswith("%"))).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    value = None
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    return printed.getvalue(), value


def assert_alike(found, committed, where):
    """The same words; numbers may differ as those of two processors do."""
    number = r"-?\d+\.\d+"
    assert re.sub(number, "#", found).split() == re.sub(number, "#", committed).split(), where
    pair = [np.array(re.findall(number, text), dtype=float) for text in (found, committed)]
    np.testing.assert_allclose(*pair, atol=0.021, err_msg=where)


def linked(text):
    return [(name, anchor) for name, anchor in _LINK.findall(text) if name or anchor]


def anchors(path):
    """The names of a page's headings in links."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [*PAGES, *NOTEBOOKS])
def test_links_lead_somewhere(name):
    page = ROOT / name
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        text = "\n".join(
            "".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"
        )
    for target, anchor in linked(text):
        path = page.parent / target if target else page
        assert path.exists(), f"{name} links to {target}"
        if anchor:
            assert anchor in anchors(path), f"{name} links to {target}#{anchor}"


def test_the_pages_are_built_without_a_warning_and_need_no_network(tmp_path):
    asked = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path)]
    built = subprocess.run(asked, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)="(https?:[^"]*)"', page.read_text())
        assert not loaded, f"{page.name} loads {loaded}"
    # Every name of a module's __all__ is documented, there or where it is taken from.
    inventory = (tmp_path / "objects.inv").read_bytes().split(b"\n", 4)[4]
    lines = [line.split() for line in zlib.decompress(inventory).decode().splitlines()]
    found = {words[0].rpartition(".")[::2] for words in lines if words[1].startswith("py:")}
    packages = pkgutil.walk_packages(parchgrad.__path__, "parchgrad.")
    modules = [importlib.import_module(package.name) for package in packages if package.name != "parchgrad.__main__"]
    modules.append(parchgrad)
    documented = {
        (own, id(getattr(module, own))) for module in modules for home, own in found if home == module.__name__
    }
    for module in modules:
        for name in set(getattr(module, "__all__", ())) - {"__version__"}:
            assert (name, id(getattr(module, name))) in documented, f"{module.__name__}.{name} is not in the reference"


def test_the_gallery_lists_every_page_with_small_pictures():
    folder = DOCS / "gallery"
    index = (folder / "index.md").read_text(encoding="utf-8")
    pages = {path.stem for path in folder.glob("*.md")} - {"index"}
    assert pages == set(re.findall(r"images/(\w+)-small.jpg.*\(\1\.md\)", index))
    assert pages == set(index.partition(":hidden:")[2].strip("`\n ").split())
    for page in pages:
        assert f"(images/{page}.jpg)" in (folder / f"{page}.md").read_text(encoding="utf-8")
    sizes = [path.stat().st_size for path in (folder / "images").iterdir()]
    assert len(sizes) == 2 * len(pages)
    assert max(sizes) <= 120_000
    assert sum(sizes) <= 1_000_000


def test_every_cell_of_the_comparison_that_names_a_source_has_one():
    page = DOCS / "comparison.md"
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


def test_the_numbers_of_the_readme_are_those_of_the_study():
    text = PAGES["README.md"].read_text(encoding="utf-8")
    (rows,) = re.findall(r"\n\| method \| passes.*\n\|-.*\n((?:\|.*\n)+)", text)
    numbers = re.findall(r"\d\.\d{3}", rows)
    with (DOCS / "study" / "results.csv").open(encoding="utf-8") as file:
        measured = [f"{float(line['mean']):.3f}" for line in csv.DictReader(file) if line["mean"]]
    assert len(numbers) > 30
    assert set(numbers) <= set(measured)


def test_the_numbers_of_the_related_methods_are_those_of_the_study():
    numbers = re.findall(r"\b\d+\.\d{3}\b", PAGES["docs/related_work.md"].read_text(encoding="utf-8"))
    results = "".join(
        (DOCS / "study" / name).read_text(encoding="utf-8") for name in ("architectures.md", "outputs.md")
    )
    assert len(numbers) > 10
    assert set(numbers) <= set(re.findall(r"\b\d+\.\d{3}\b", results))


def test_the_cells_of_the_study_page_are_those_of_its_results():
    page, results = ((DOCS / "study" / name).read_text(encoding="utf-8") for name in ("README.md", "results.md"))
    cells = re.findall(r"\| (\**[\d.]+ \([+-][\d.]+ to [+-][\d.]+\)\**) (?=\|)", page)
    assert len(cells) > 40
    for cell in cells:
        assert f"| {cell} |" in results, f"{cell} is not in the results"
