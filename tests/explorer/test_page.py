"""The explorer as people and programs reach it: requests, many users at once, and a real browser."""

import asyncio
import base64
import contextlib
import html
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

import parchgrad as pg
from parchgrad.core.selectors import find_selector
from parchgrad.errors import SettingError
from parchgrad.explorer.inputs import EXAMPLES, Photograph, View
from parchgrad.explorer.views import Explorer, tinted
from parchgrad.visual import save_figure
from parchgrad.workflows.demonstration import example_photographs

pytestmark = pytest.mark.slow
gradio_client = pytest.importorskip("gradio_client", reason="Gradio, of the extra web, is not installed.")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="Chromium or its driver is missing; Debian has chromium and chromium-driver."
)


@contextlib.contextmanager
def served(folder, *options):
    """The command in a process of its own, which is how people run it; its temporary files go into a folder."""
    command = [sys.executable, "-m", "parchgrad", "explore", "--port", "0", "--no-browser", *options]
    environment = os.environ | {"TMPDIR": str(folder)}
    # The tests themselves may run under nohup, which the command would mind.
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    finally:
        signal.signal(signal.SIGHUP, hang_up)
    with started as process:
        try:
            yield process, re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=120)
            finally:
                process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def address(folder):
    with served(folder, "--max-megabytes", "1", "--max-megapixels", "3") as (_, url):
        yield url


def post_form(address, sizes):
    """Send a form of files in pieces, without saying how long it is."""

    def pieces():
        for number, size in enumerate(sizes):
            name = f'name="files"; filename="{number}.png"'
            yield f"--x\r\nContent-Disposition: form-data; {name}\r\n\r\n".encode()
            for _ in range(size // 100_000):
                yield bytes([number]) * 100_000
            yield b"\r\n"
        yield b"--x--\r\n"

    form = {"content-type": "multipart/form-data; boundary=x"}
    return httpx.post(f"{address}/gradio_api/upload", content=pieces(), headers=form)


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class User:
    """One session of the page, driven as its script would drive it."""

    def __init__(self, address):
        # No certificates need be read for plain HTTP, which takes most of a second in all.
        self._client = gradio_client.Client(address, verbose=False, ssl_verify=False, httpx_kwargs={"timeout": 60})
        self._target, self._stamp = None, ""
        self.status = self.offered = None

    def take(self, path):
        self._client.predict(gradio_client.handle_file(str(path)), api_name="/take")

    def take_example(self, name):
        self._client.predict(name, api_name="/take_example")

    def show(self, **settings):
        """What stands in the place of the pictures, once the network is there."""
        end = time.monotonic() + 60
        while "Results appear when it is ready" in (found := self.ask(**settings)):
            assert time.monotonic() < end
            time.sleep(0.1)
        return found

    def ask(self, network="shapes", selector="energy", layers="all", quantile=0.25, **settings):
        """What stands there at once; the settings of `expected` where none are given."""
        chosen = {"method": "gradient", "prune": True, "gamma": 1, "signed": False, "opacity": 1}
        chosen |= {"softness": 0.5, "gates": 1, "antialias": True} | settings
        found = self._client.predict(
            network=network,
            target=self._target,
            stamp=self._stamp,
            selector=selector,
            layers=layers,
            quantile=quantile,
            **chosen,
            api_name="/show",
        )
        # What did not change comes as an empty update.
        result, self.status, stamp, self.offered = found[0], found[2], found[6], found[7]
        self.code, self.offered_layers, self.steadiness = found[3], found[8], found[9]
        self._stamp = stamp if isinstance(stamp, str) else self._stamp
        return result

    def measure(self):
        """What is said of the map's stability."""
        return self._client.predict(api_name="/measure")

    def choose(self, target):
        self._target = target

    def close(self):
        self._client.close()


def pictures(page):
    """The maps on the page, each (H, W, 4) in [0, 1]."""
    found = re.findall(r'class="pg-map" src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) / 255 for one in found]


def expected(classifier, image, target, quantile, *, name="energy", layers="all"):
    selector = find_selector(name).make(quantile=quantile)
    explainers = pg.Explainer(classifier.model, None), pg.Explainer(classifier.model, selector, layers=layers)
    inputs = classifier.preprocess(image).unsqueeze(0)
    maps = [pg.heatmap(explainer.attribute(inputs, target))[0] for explainer in explainers]
    return tinted(maps, signed=False)[1]


def test_users_at_once_get_their_own_maps_and_errors(address, tmp_path):
    shapes, problems, rounds = pg.load_model("shapes"), [], 3
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    images = example_photographs()
    for name, image in zip(EXAMPLES, images, strict=True):
        image.save(tmp_path / f"{name}.png")

    def use(number):
        user = User(address)
        try:
            for turn in range(rounds):
                place = (number + turn) % 4
                user.take(tmp_path / f"{EXAMPLES[place]}.png") if turn % 2 else user.take_example(EXAMPLES[place])
                user.choose(None)
                user.show()
                target, quantile = (number + turn) % 10, round(0.1 + 0.1 * number, 2)
                user.choose(target)
                page = user.show(quantile=quantile)
                for found, wanted in zip(
                    pictures(page), expected(shapes, images[place], target, quantile), strict=True
                ):
                    if np.abs(found - wanted).max() > 0.003:
                        problems.append(f"user {number}, turn {turn}: another map")
                if f"for {shapes.categories[target]}," not in page:
                    problems.append(f"user {number}, turn {turn}: another class")
                if "matches none of" not in user.show(layers="nothing"):
                    problems.append(f"user {number}, turn {turn}: no error where one was due")
            user.take(bad)
            if "'bad.png' is not a readable image" not in user.show().replace("&#x27;", "'"):
                problems.append(f"user {number}: the bad file was not refused")
        finally:
            user.close()

    threads = [threading.Thread(target=use, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert not problems


def test_a_choice_from_an_earlier_list_of_classes_counts_no_more(address):
    user = User(address)
    user.take_example("coffee")
    assert "for espresso," in user.show(network="efficientnet_lite0", layers="conv_head")
    user.choose(281)
    assert "for tabby," in user.show(network="efficientnet_lite0", layers="conv_head")
    user.take_example("camera")
    # The browser may still send the class that was chosen for the cup.
    assert "for tripod," in user.show(network="efficientnet_lite0", layers="conv_head")
    user.close()


def test_what_was_on_its_way_when_the_network_changed_is_no_error(address):
    user = User(address)
    user.take_example("coffee")
    assert "for espresso," in user.show(network="efficientnet_lite0", layers="conv_head")
    user.show(network="shapes")
    # Of the network before: a class that the other has not, and a selector that it cannot have.
    user.choose(967)
    user._stamp = "of before"
    page = user.show(network="shapes", selector="class")
    assert len(pictures(page)) == 2
    assert "gradient energy, quantile 0.25" in page
    assert "needs statistics, which shapes does not have. Using gradient energy." in user.status
    assert user.offered["value"] == "energy"
    # The list, which fell back, asks for the same again.
    user.show(network="shapes")
    assert "Using gradient energy." in user.status
    user.show(network="shapes", quantile=0.3)
    assert "Using gradient energy." not in user.status
    page = user.show(network="efficientnet_lite0", selector="class", quantile=0.1)
    assert "Choose covered layers" in page
    # The list is offered where an error stands as well.
    assert "class" in [value for _, value in user.offered["choices"]]
    user.close()


def test_the_map_is_that_of_the_settings_and_its_stability_belongs_to_it(address):
    user, shapes = User(address), pg.load_model("shapes")
    assert "There is no map yet." in user.measure()
    user.take_example("coffee")
    hard = {"selector": "evidence", "quantile": 0.3, "softness": 0.2, "gates": 2, "antialias": False}
    page = user.show(**hard)
    explainer = pg.Explainer(
        shapes.model, pg.Evidence(quantile=0.3, softness=0.2), layers="all", gates=2, antialias=False
    )
    inputs = shapes.preprocess(example_photographs()[1]).unsqueeze(0)
    maps = [pg.heatmap(found.attribute(inputs))[0] for found in (pg.Explainer(shapes.model, None), explainer)]
    for found, wanted in zip(pictures(page), tinted(maps, signed=False)[1], strict=True):
        assert np.abs(found - wanted).max() < 0.003
    assert "selector = pg.Evidence(quantile=0.3, softness=0.2)" in str(user.code)
    assert "layers='all', gates=2, antialias=False)" in str(user.code)
    assert f"stability {float(explainer.stability(inputs)):.2f}</strong>" in user.measure()
    # It stays with the map, and goes with it.
    user.show(**hard)
    assert user.steadiness != ""
    user.show(**hard | {"gates": 4})
    assert user.steadiness == ""
    user.measure()
    user.take_example("camera")
    user.show(**hard | {"gates": 4})
    assert user.steadiness == ""
    user.close()


def test_the_published_set_is_offered_where_there_is_one(address):
    user = User(address)
    user.take_example("coffee")
    user.show(network="efficientnet_lite0", layers="published")
    assert "3 convolutions edited" in user.status
    assert "published" in [value for _, value in user.offered_layers["choices"]]
    assert "The paper has no layer set for ShapesNetwork" in user.show(layers="published")
    assert "published" not in [value for _, value in user.offered_layers["choices"]]
    user.close()


@pytest.mark.parametrize(
    ("stability", "said"),
    [(0.98, "hardly changes"), (0.6, "changes parts"), (0.3, "Warning"), (float("nan"), "zero everywhere")],
)
def test_a_stability_is_explained_in_a_sentence(stability, said):
    from parchgrad.explorer.page import _steadiness

    found = _steadiness(stability)
    assert said in found
    assert ("pg-warning" in found) == (stability < 0.5)
    assert ("stability 0." in found) == (stability == stability)


def test_what_programs_send_as_they_like_ends_in_one_sentence(address, tmp_path):
    user = User(address)
    for settings, said in (
        ({"network": None}, "`network` is 'None',"),
        ({"layers": ["a"]}, "`layers` is"),
        ({"layers": "a," * 600}, "`layers` has 1,200 characters,"),
        ({"selector": 3}, "`selector` is '3',"),
        ({"selector": "magic"}, "'magic'"),
        ({"method": "magic"}, "'magic'"),
        ({"prune": False, "gamma": 400}, "`gamma` is 400,"),
        ({"quantile": "half"}, "`quantile` is half,"),
        ({"quantile": -1}, "`quantile` is -1,"),
        ({"opacity": None}, "`opacity` is None,"),
        ({"softness": 2}, "`softness` is 2,"),
        ({"gates": -1}, "`gates` is -1,"),
        ({"gates": "wide"}, "`gates` is wide,"),
    ):
        page = html.unescape(user.show(**settings))
        assert "role='alert'" in page
        assert said in page
    user.show()
    user.choose("tabby")
    assert "'tabby', but it must be a whole number." in html.unescape(user.show())
    user.choose(None)
    user._client.predict({}, api_name="/take")
    assert "The upload is empty" in user.show()
    user.close()


def test_a_folder_of_the_server_is_not_named(address, tmp_path):
    example_photographs()[0].save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:20_000])
    user = User(address)
    user.take(tmp_path / "cut.jpg")
    page = html.unescape(user.show())
    assert "Cannot read 'cut.jpg'" in page
    assert "/cut.jpg" not in page
    user.close()


def test_addresses_paths_and_large_files_are_refused(address, folder, tmp_path):
    for path in (
        "file=/etc/passwd",
        "file=http://example.com/x.png",
        "proxy=http://example.com/",
        "file=../../etc/passwd",
    ):
        assert httpx.get(f"{address}/gradio_api/{path}").status_code in (403, 404)
    large = {"files": ("large.png", b"0" * 1_200_000, "image/png")}
    assert httpx.post(f"{address}/gradio_api/upload", files=large).status_code == 413
    # Of unknown length, as one file, and as many that are small enough: four of a megabyte are the most in a form.
    before = {path for path in folder.rglob("*") if path.is_file()}
    assert post_form(address, [1_200_000]).status_code == 413
    assert post_form(address, [900_000] * 6).status_code == 413
    assert post_form(address, [400_000] * 12).status_code == 413
    assert {path for path in folder.rglob("*") if path.is_file()} == before
    # One that is cut off leaves nothing either.
    host, port = address.removeprefix("http://").split(":")
    head = "POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 500000\r\n"
    head += "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    head += 'Content-Disposition: form-data; name="files"; filename="cut.png"\r\n\r\n'
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + b"0" * 300_000)
        wait_for(lambda: {path for path in folder.rglob("*") if path.is_file()} != before)
    wait_for(lambda: {path for path in folder.rglob("*") if path.is_file()} == before)
    kept = post_form(address, [900_000] * 4).json()
    assert [Path(path).stat().st_size for path in kept] == [900_000] * 4
    outside = {"files": ("../../outside.png", b"0", "image/png")}
    (kept,) = httpx.post(f"{address}/gradio_api/upload", files=outside).json()
    assert Path(kept).is_relative_to(folder)

    dependencies = httpx.get(f"{address}/config").json()["dependencies"]
    take = next(item["id"] for item in dependencies if item["api_name"] == "take")
    join = f"{address}/gradio_api/queue/join"
    for place in ("http://example.com/x.png", "file:///etc/passwd", "ftp://example.com/x.png"):
        message = {"data": [{"path": place, "meta": {"_type": "gradio.FileData"}}], "fn_index": take}
        assert httpx.post(join, json={**message, "session_hash": "elsewhere"}).status_code == 403
    message = {"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}], "fn_index": take}
    assert httpx.post(join, json={**message, "session_hash": "inside"}).status_code == 200
    with httpx.stream("GET", f"{address}/gradio_api/queue/data?session_hash=inside", timeout=20) as stream:
        done = next(line for line in stream.iter_lines() if "process_completed" in line)
    assert not json.loads(done.removeprefix("data:"))["success"]
    assert "not uploaded by a user" in done
    for content in (b"[" * 200_000, b" " * 1_100_000):
        assert httpx.post(join, content=content, headers={"content-type": "application/json"}).status_code in (403, 413)

    user = User(address)
    Image.new("1", (2000, 2000)).save(tmp_path / "wide.png")
    user.take(tmp_path / "wide.png")
    assert "has 4.0 megapixels, but the limit is 3" in user.show()
    user.close()


def test_files_are_refused_when_as_many_are_kept_as_may_be(tmp_path):
    with served(tmp_path, "--model", "shapes", "--max-megabytes", "1", "--max-stored-megabytes", "2") as (_, url):
        assert post_form(url, [900_000]).status_code == 200
        assert post_form(url, [700_000, 800_000]).status_code == 507
        stored = sum(path.stat().st_size for path in tmp_path.glob("parchgrad-*/**/*") if path.is_file())
        assert 900_000 <= stored < 910_000
        large = {"files": ("own.png", b"1" * 1_000_000, "image/png")}
        assert httpx.post(f"{url}/gradio_api/upload", files=large).status_code == 200
        answer = httpx.post(f"{url}/gradio_api/upload", files=large)
        assert answer.status_code == 507
        assert "file storage is full" in answer.json()["error"]


def answered(guarded, messages, **scope):
    """What a guarded application sends, given the parts of a request."""
    parts, sent = iter(messages), []

    async def receive():
        return next(parts)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []} | scope
    asyncio.run(guarded(scope, receive, send))
    return sent


def test_the_guard_alone_refuses_what_it_should(tmp_path):
    from parchgrad.explorer.guard import RequestGuard

    bodies = []

    async def application(scope, receive, send):
        bodies.append((await receive())["body"] if scope["method"] == "POST" else b"")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    guard = RequestGuard(application, folder=tmp_path, largest_file=1000, files=4, most_stored=10_000)
    for path in ("file=http://x/", "file/http://x/", "proxy=x", "stream/ftp://x/", "file= https://x/"):
        assert answered(guard, [], method="GET", path=f"/gradio_api/{path}")[0]["status"] == 403
    assert answered(guard, [], method="GET", path="/gradio_api/deep_link")[0]["status"] == 404
    assert not bodies
    start = answered(guard, [], method="GET", path="/gradio_api/file=C:/own.png")[0]
    assert start["status"] == 200
    assert b"frame-ancestors 'none'" in dict(start["headers"])[b"content-security-policy"]

    whole = {"type": "http.request", "body": b'{"data": [1]}', "more_body": False}
    assert answered(guard, [whole])[0]["status"] == 200
    assert bodies[-1] == b'{"data": [1]}'
    handed = len(bodies)
    for place in ("http://x/", "file:///etc/passwd", " ftp://x"):
        named = {"type": "http.request", "body": json.dumps({"data": [{"path": place}]}).encode()}
        assert answered(guard, [named])[0]["status"] == 403
    assert answered(guard, [{"type": "http.request", "body": b"[" * 200_000}])[0]["status"] == 403
    half = {"type": "http.request", "body": b" " * 600_000, "more_body": True}
    assert answered(guard, [half, half])[0]["status"] == 413
    assert answered(guard, [], headers=[(b"content-length", b"1000001")])[0]["status"] == 413
    # A body that is cut off is no body.
    assert answered(guard, [{**whole, "more_body": True}, {"type": "http.disconnect"}]) == []
    assert len(bodies) == handed


def test_the_page_is_held_to_this_server(address):
    answer = httpx.get(address)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    style = httpx.get(f"{address}/theme.css").text
    assert "http" not in re.sub(r"http://www\.w3\.org", "", style)


def test_networks_that_are_not_offered_cannot_be_typed():
    code = (
        "import json; from parchgrad.explorer.page import WebSettings, build_app; "
        "app = build_app(WebSettings(network='shapes', any_network=False)); "
        "print(json.dumps([item['props'] for item in app.get_config_file()['components']], default=str))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    network = next(props for props in json.loads(found.stdout) if props.get("elem_id") == "network")
    assert [name for name, _ in network["choices"]] == ["shapes", "efficientnet_lite0"]
    assert not network["allow_custom_value"]


def test_what_cannot_be_served_is_said():
    from parchgrad.explorer.page import WebSettings, serve

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(SettingError, match=rf"127.0.0.1:{port} \(.*`port`"),
            serve(WebSettings(port=port)),
        ):
            pass
    with pytest.raises(SettingError, match="`host`"), serve(WebSettings(host="192.0.2.1", port=0)):
        pass
    with pytest.raises(SettingError, match="`port` is 70000"):
        WebSettings(port=70_000)
    with pytest.raises(SettingError, match="`max_megabytes` is 0"):
        WebSettings(max_megabytes=0)
    with pytest.raises(SettingError, match=r"`max_megapixels` is 500, but .* 178"):
        WebSettings(max_megapixels=500)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_command_serves_until_it_is_stopped_and_leaves_nothing(tmp_path, ending):
    with served(tmp_path, "--model", "shapes") as (process, url):
        kept = httpx.post(f"{url}/gradio_api/upload", files={"files": ("own.png", b"0", "image/png")}).json()
        assert Path(kept[0]).read_bytes() == b"0"
        assert len(list(tmp_path.glob("parchgrad-*"))) == 1
        process.send_signal(ending)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0
        assert "Traceback" not in said
        assert said.strip().endswith("Stopping.")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_ends_the_command_where_a_shell_had_it_ignored(tmp_path):
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with served(tmp_path, "--model", "shapes") as (process, _):
            signal.signal(signal.SIGINT, earlier)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=120)
            assert process.returncode == 0
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert not list(tmp_path.glob("parchgrad-*"))


def test_without_gradio_the_remedy_is_named():
    missing = "import sys; sys.modules['gradio'] = sys.modules['starlette'] = None"
    code = f"{missing}; from parchgrad.cli import main; main(['explore'])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert found.returncode == 2
    assert "pip install 'parchgrad[web]'" in found.stderr
    assert "Traceback" not in found.stderr


@contextlib.contextmanager
def browser(width=1400, height=1100):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-dev-shm-usage"]
    for flag in [*flags, f"window-size={width},{height}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """What a person does on the page, and sees."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        self.wait(lambda: self.map())

    def all(self, css):
        return self.driver.find_elements("css selector", css)

    def one(self, css):
        return self.wait(lambda: next(iter(self.all(css)), None))

    def text(self, css):
        # In one step: the page may put another element in this place at any time.
        return self.script("return document.querySelector(arguments[0])?.innerText ?? ''", css)

    def script(self, code, *values):
        return self.driver.execute_script(code, *values)

    def map(self):
        """The map with ParchGrad, as it is embedded."""
        return self.script("return document.querySelectorAll('#result .pg-map')[1]?.src")

    def wait(self, condition, seconds=120):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := condition():
                return found
            time.sleep(0.05)
        raise AssertionError(
            f"Waited for {seconds} s; the page says: {self.driver.find_element('css selector', 'body').text}"
        )

    def changes(self, act):
        """Act, and wait until the map is another one."""
        before = self.map()
        act()
        self.wait(lambda: self.map() not in (None, before))
        return self.map()

    def upload(self, path, place="#photograph"):
        self.one(f"{place} input[type=file]").send_keys(str(path))

    def requests(self):
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return {
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        }


@needs_browser
def test_a_photograph_is_looked_at_in_a_browser(address, tmp_path):
    from selenium.webdriver.common.keys import Keys

    lite0 = pg.load_model("efficientnet_lite0")
    cup = example_photographs()[1]
    cup.save(tmp_path / "cup.png")
    (tmp_path / "bad.png").write_text("no picture")
    with browser() as driver:
        page = Page(driver, address)
        page.changes(lambda: page.upload(tmp_path / "cup.png"))
        page.wait(lambda: "espresso" in page.text("#result"))
        assert "cup.png" in page.text("#result")

        # A class from the list of the most probable, then any class by its name.
        page.wait(lambda: "cup" in page.text("#predictions"))
        page.changes(lambda: page.script("document.querySelectorAll('#predictions input')[1].click()"))
        page.wait(lambda: "for cup," in page.text("#result"))
        combobox = page.one("#class input")

        def search():
            combobox.click()
            combobox.send_keys(Keys.CONTROL, "a")
            combobox.send_keys("tabby")
            page.wait(lambda: page.text("[role=option]").strip().endswith("tabby"))
            combobox.send_keys(Keys.ENTER)

        page.changes(search)
        page.wait(lambda: "for tabby," in page.text("#result"))
        # Once more: there is nothing to change.
        search()
        page.wait(lambda: not page.all("[role=option]"))
        time.sleep(1)
        assert combobox.get_attribute("value") == "tabby"
        assert "for tabby," in page.text("#result")

        # A slider, by the keyboard.
        slider = page.one("#quantile input[type=range]")
        page.changes(lambda: slider.send_keys(Keys.ARROW_RIGHT))
        page.wait(lambda: "quantile 0.21" in page.text("#result"))
        (found,) = pictures(f'class="pg-map" src="{page.map()}"')
        wanted = expected(lite0, cup, 281, 0.21, name="evidence", layers=0.75)[1]
        assert np.abs(found - wanted).max() < 0.003
        assert "quantile=0.21" in page.text("#code")

        # How steady the map is, until it is another one.
        page.one("#measure").click()
        page.wait(lambda: re.search(r"stability [01]\.\d\d", page.text("#steadiness")))
        page.one("#more button").click()
        page.changes(lambda: page.one("#gates label:nth-of-type(3)").click())
        page.wait(lambda: "gates=2" in page.text("#code"))
        assert page.text("#steadiness").strip() == ""
        assert page.one("fieldset#gates").get_attribute("aria-label") == "Soft gates"

        # Opacity is blended by the browser: no map is sent again.
        before = page.map()
        for _ in range(30):
            page.one("#opacity input[type=range]").send_keys(Keys.ARROW_LEFT)
        page.wait(
            lambda: page.script("return getComputedStyle(document.querySelector('#result .pg-map')).opacity") == "0.7"
        )
        page.wait(lambda: "opacity=0.7" in page.text("#code"))
        assert page.map() == before

        page.upload(tmp_path / "bad.png")
        page.wait(lambda: "'bad.png' is not a readable image" in page.text("#result [role=alert]"))
        assert not page.all("#result .pg-map")
        # Another photograph, by the keyboard alone.
        page.all("#examples input")[2].send_keys(Keys.SPACE)
        page.wait(lambda: page.map() and "for tripod," in page.text("#result"))

        # The best settings of a selector come with it, except for what was chosen already.
        selector = page.one("#selector input")

        def select(name):
            selector.click()
            selector.send_keys(Keys.CONTROL, "a")
            selector.send_keys(name)
            page.wait(lambda: name in page.text("[role=option]").lower())
            selector.send_keys(Keys.ENTER)

        select("gradient energy")
        page.wait(lambda: "gradient energy, quantile 0.21" in page.text("#result"))
        page.wait(lambda: "GradientEnergy(quantile=0.21)" in page.text("#code"))
        assert "Explainer(classifier.model, selector, gates=2)" in page.text("#code")
        assert page.one("#softness input[type=number]").get_attribute("value") == "0.5"
        select("random")
        page.wait(lambda: "random channels (control), quantile 0.21" in page.text("#result"))
        # They have no softness to set.
        assert not page.one("#softness").is_displayed()
        select("evidence")
        page.wait(lambda: "pg.Evidence(quantile=0.21)" in page.text("#code"))
        assert "Explainer(classifier.model, selector, gates=2)" in page.text("#code")
        assert page.one("#softness").is_displayed()

        # A list that the keyboard has left lies over nothing.
        page.one("#network input").click()
        page.wait(lambda: page.all("#network [role=listbox]"))
        page.one("#opacity input[type=range]").send_keys(Keys.ARROW_LEFT)
        lists = "[...document.querySelectorAll('[role=listbox]')]"
        page.wait(lambda: page.script(f"return !{lists}.some(list => list.checkVisibility())"))
        assert all(url.startswith((address, "data:", "blob:")) for url in page.requests())


@needs_browser
def test_a_mosaic_is_scored_and_saved_in_a_browser(address, tmp_path):
    from selenium.webdriver.common.keys import Keys

    with browser(width=420) as driver:
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
        page = Page(driver, address)
        # Nothing sticks out of a narrow window.
        assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        # The keyboard goes down the page, as the eye does, from its top.
        page.script("document.body.tabIndex = -1; document.body.focus()")
        places = []
        for _ in range(40):
            driver.switch_to.active_element.send_keys(Keys.TAB)
            places.append(page.script("return document.activeElement.closest('#page > *')?.id ?? ''"))
        # It goes round, and may begin anywhere: the page puts new parts into their places meanwhile.
        top = places.index("shown")
        assert list(dict.fromkeys(filter(None, places[top:] + places[:top]))) == ["shown", "settings", "taken-away"]
        next(tab for tab in page.all("[role=tab]") if "Mosaic" in tab.text).click()
        paths = []
        for name, image in zip(EXAMPLES, example_photographs(), strict=True):
            image.convert("RGB").save(tmp_path / f"{name}.jpg")
            paths.append(str(tmp_path / f"{name}.jpg"))
        page.upload(paths[0], "#files")
        page.wait(lambda: "Add 3 more." in page.text("#game"))
        page.one("#take-examples").click()
        page.wait(lambda: len(page.all("#game .pg-map")) == 8)
        said = page.one("#game .pg-score").get_attribute("aria-label")
        plain, score, chance = (float(number) for number in re.findall(r"\d\.\d\d", said))
        assert chance == 0.25
        assert score > plain > chance

        page.one("#save-npy").click()
        (saved,) = page.wait(lambda: list(tmp_path.glob("mosaic_*.npy")))
        wanted = Explorer().play([Photograph(name) for name in EXAMPLES], View()).attribution.numpy()
        np.testing.assert_allclose(np.load(saved), wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
        page.one("#save-gif").click()
        page.wait(lambda: "needs a single image" in page.text("#status"))
        next(tab for tab in page.all("[role=tab]") if "One" in tab.text).click()
        page.wait(lambda: "convolutions edited" in page.text("#status"))
        page.one("#save-png").click()
        (figure,) = page.wait(lambda: list(tmp_path.glob("cat_*.png")))
        found = Explorer().explore(Photograph("cat"), View())
        save_figure(found.figure(), tmp_path / "wanted.png")
        with Image.open(figure) as drawn, Image.open(tmp_path / "wanted.png") as wanted:
            assert drawn.size == wanted.size
            difference = np.asarray(drawn, dtype=float) - np.asarray(wanted, dtype=float)
            assert np.abs(difference).mean() < 0.5
        # What was saved with other settings has another name.
        page.one("#signed input").click()
        page.wait(lambda: "against the class" in page.text("#result"))
        page.one("#more button").click()
        page.one("#prune input").click()
        page.wait(lambda: "gamma 10" in page.text("#result"))
        page.one("#save-npy").click()
        (weighed,) = page.wait(lambda: list(tmp_path.glob("cat_*_gamma10_signed.npy")))
        wanted = Explorer().explore(Photograph("cat"), View(gamma=10.0)).attribution.numpy()
        np.testing.assert_allclose(np.load(weighed), wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
        page.one("#save-gif").click()
        (moving,) = page.wait(lambda: list(tmp_path.glob("cat_*.gif")))
        with Image.open(moving) as frames:
            assert frames.n_frames > 6
        assert all(url.startswith((address, "data:", "blob:")) for url in page.requests())
