"""The demo for Hugging Face Spaces, as its own process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from packaging.requirements import Requirement

from tests.support import ROOT, maps_on, wait_for

pytest.importorskip("gradio", reason="Gradio, of the extra web, is not installed.")

from tests.system.browser import User, show_request  # it needs Gradio too

SPACE = ROOT / "space"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    yield from started(tmp_path_factory)


@pytest.fixture
def crowded_address(tmp_path_factory):
    """A server whose queue may be filled without disturbing other tests."""
    yield from started(tmp_path_factory)


def started(tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    environment |= {"TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path), "SPACE_ID": "owner/parchgrad"}
    with subprocess.Popen([sys.executable, "app.py"], cwd=SPACE, env=environment, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline().decode().startswith("Serving http")
            yield f"http://127.0.0.1:{port}"
            assert process.poll() is None
        finally:
            process.send_signal(signal.SIGKILL)


def test_the_demo_explains_an_image(address):
    user = User(address)
    try:
        user.take_example("coffee")
        best = {
            "network": "efficientnet_lite0",
            "selector": "evidence",
            "layers": "0.75",
            "quantile": 0.2,
            "softness": 1,
        }
        page = user.show(**best, gates=8)
        assert "Maps for espresso" in page
        assert len(maps_on(page)) == 3
        assert "'resnet50' is not available" in user.ask(network="resnet50").replace("&#x27;", "'")
    finally:
        user.close()


def test_the_demo_reads_no_file_of_its_host(address):
    held = (SPACE / "app.py", SPACE / "requirements.txt", ROOT / "pyproject.toml", "/etc/passwd", "/proc/self/environ")
    for path in (*map(str, held), "app.py", "requirements.txt", "../pyproject.toml", "%2e%2e/pyproject.toml"):
        for route in ("gradio_api/file=", "gradio_api/file/", "file=", "gradio_api/stream/", "static/", "assets/", ""):
            answer = httpx.get(f"{address}/{route}{path}", timeout=30)
            assert answer.status_code in (403, 404, 405), (route, path)
    join = f"{address}/gradio_api/queue/join"
    take = next(
        event["id"] for event in httpx.get(f"{address}/config").json()["dependencies"] if event["api_name"] == "take"
    )
    for path in map(str, held):
        message = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}], "fn_index": take}
        assert httpx.post(join, json={**message, "session_hash": path}).status_code == 200
        with httpx.stream("GET", f"{address}/gradio_api/queue/data", params={"session_hash": path}) as stream:
            done = next(line for line in stream.iter_lines() if "process_completed" in line)
        assert not json.loads(done.removeprefix("data:"))["success"]


def test_the_demo_is_bounded_and_may_be_framed_by_its_site_alone(crowded_address):
    address = crowded_address
    large = {"files": ("large.png", bytes(6 * 2**20), "image/png")}
    wait_for(lambda: httpx.post(f"{address}/gradio_api/upload", files=large, timeout=60).status_code == 413)
    policy = httpx.get(address).headers["content-security-policy"]
    assert policy.endswith("frame-ancestors https://huggingface.co")
    config, answers = httpx.get(f"{address}/config").json(), []
    for number in range(40):
        # Each is seconds of work.
        request = show_request(config, f"user {number}", method="smoothgrad", quantile=0.1 + number / 100)
        answers.append(httpx.post(f"{address}/gradio_api/queue/join", json=request, timeout=60).status_code)
    assert answers.index(503) >= 20
    assert set(answers) == {200, 503}


def test_the_header_of_the_space_names_its_file_and_a_version_that_fits():
    header = (SPACE / "README.md").read_text(encoding="utf-8").split("---")[1]
    settings = dict(re.findall(r"^(\w+): (.*)$", header, re.MULTILINE))
    assert (SPACE / settings["app_file"]).is_file()
    (bound,) = [
        Requirement(line)
        for line in re.findall(r'"(gradio>[^"]*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    ]
    assert settings["sdk"] == "gradio"
    assert settings["sdk_version"] in bound.specifier
    # A limit of the site.
    assert len(settings["short_description"]) <= 60
