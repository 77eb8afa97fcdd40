"""The explorer under load: many users at once, a full queue, and networks that take long to arrive."""

import contextlib
import http.server
import os
import threading
import time
from typing import ClassVar

import httpx
import pytest
import safetensors.torch
import timm

from parchgrad.errors import SettingError, WeightsError
from tests.test_models import Hub

pytestmark = pytest.mark.slow
gradio_client = pytest.importorskip("gradio_client", reason="Gradio, of the extra web, is not installed.")

from benchmarks import explorer as crowds  # noqa: E402  # it needs Gradio itself

from tests.test_web import Page, User, browser, needs_browser, pictures  # noqa: E402  # so does this

SECONDS = float(os.environ.get("PARCHGRAD_SOAK_SECONDS", "8"))


def test_twenty_users_with_good_and_bad_requests_get_right_maps_or_one_sentence():
    """For a minute with `make soak`."""
    tally = crowds.observe(crowds.Crowd(users=20, seconds=SECONDS, network="shapes", layers="all"))
    crowds.report(tally)
    assert not tally.wrong
    assert tally.counts["right map"] >= 10
    assert sum(tally.counts.values()) >= 20
    assert tally.alive
    # Whoever waits is told behind how many.
    assert tally.places > 0
    assert "Traceback" not in tally.said
    # The maps that are held, 128 MB, and what a session of each user takes.
    assert tally.peak < tally.before + 200 * 2**20


class SlowHub(Hub):
    """Gives weights only when the test lets it."""

    gate = threading.Event()
    weights: ClassVar[dict[str, bytes]] = {}

    def end_headers(self):
        if self.command == "GET":
            self.gate.wait(60)
        super().end_headers()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    for name in ("test_byobnet", "test_efficientnet", "test_convnext"):
        SlowHub.weights[name] = safetensors.torch.save(timm.create_model(name).state_dict())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        home = {"HF_ENDPOINT": address, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "0"}
        with crowds.served("shapes", home) as (found, _, _):
            yield found
        SlowHub.gate.set()
        server.shutdown()


def test_every_malformed_body_and_every_path_outside_is_refused(url):
    join = f"{url}/gradio_api/queue/join"
    for body in crowds.MALFORMED:
        answer = httpx.post(join, content=body, headers={"content-type": "application/json"}, timeout=30)
        assert 400 <= answer.status_code < 500, body[:40]
    for path in crowds.OUTSIDE:
        assert httpx.get(f"{url}/gradio_api/{path}").status_code in (403, 404)


def test_a_network_that_takes_long_to_arrive_holds_up_nobody_else(url):
    waiting, other = User(url), User(url)
    try:
        waiting.take_example("coffee")
        other.take_example("cat")
        said = waiting.show(network="test_byobnet", layers="0.5")
        assert "test_byobnet is being loaded; it is shown as soon as it is here." in said
        assert len(pictures(other.show())) == 2
        # One that cannot be had is told at once, and another time as well.
        for _ in range(2):
            assert "The weights of test_resnet cannot be loaded (404" in other.show(network="test_resnet")
        SlowHub.gate.set()
        end = time.monotonic() + 60
        while "is being loaded" in said:
            assert time.monotonic() < end
            said = waiting.show(network="test_byobnet", layers="0.5")
        assert len(pictures(said)) == 2
    finally:
        SlowHub.gate.clear()
        waiting.close()
        other.close()


def test_who_comes_to_a_full_queue_is_told(url):
    shows = next(item for item in httpx.get(f"{url}/config").json()["dependencies"] if item["api_name"] == "show")
    of_user = [None] * (len(shows["inputs"]) - 11)
    # Each takes no work, but its turn.
    settings = [None, "", "energy", "gradient", "nothing", 0.1, True, 1, False, 1]
    user, refused = User(url), None
    with httpx.Client(timeout=30) as client:
        for number in range(400):
            # The first wait a moment for a network that does not come.
            network = "test_convnext" if number < 4 else "shapes"
            message = {"fn_index": shows["id"], "session_hash": f"user {number}"}
            message["data"] = [*of_user, network, *settings]
            answer = client.post(f"{url}/gradio_api/queue/join", json=message)
            if answer.status_code != 200:
                refused = answer
                break
    assert refused is not None
    assert refused.status_code == 503
    assert "full" in refused.json()["detail"].lower()
    # Afterwards it is as it was.
    end = time.monotonic() + 60
    page = ""
    while not pictures(page):
        assert time.monotonic() < end
        # The client has errors of its own for a queue that is full.
        with contextlib.suppress(Exception):
            user.take_example("cat")
            page = user.show()
    user.close()


def test_networks_are_loaded_beside_each_other_two_at_a_time_and_failures_forgotten(monkeypatch):
    from parchgrad import web

    class Slow:
        def __init__(self):
            self.gates = {name: threading.Event() for name in "abc"}
            self.held = set()

        def holds(self, name):
            return name in self.held

        def classifier(self, name):
            if name == "broken":
                raise WeightsError("damaged")
            assert self.gates[name].wait(10)
            self.held.add(name)

    monkeypatch.setattr(web, "_LOADING_PATIENCE", 0.05)
    explorer = Slow()
    loading = web._Loading(explorer)
    for name in "aba":
        with pytest.raises(web._StillLoadingError, match=f"{name} is being loaded"):
            loading.wait_for(name)
    with pytest.raises(SettingError, match="a and b are being loaded already; choose c again later"):
        loading.wait_for("c")
    explorer.gates["a"].set()
    monkeypatch.setattr(web, "_LOADING_PATIENCE", 10.0)
    loading.wait_for("a")
    for _ in range(2):
        with pytest.raises(WeightsError, match="damaged"):
            loading.wait_for("broken")
    for name in "bc":
        explorer.gates[name].set()
        loading.wait_for(name)
        loading.wait_for(name)
    assert loading._coming == {}


@needs_browser
def test_a_browser_shows_a_network_when_it_is_there(url, tmp_path):
    from selenium.webdriver.common.keys import Keys

    with browser() as driver:
        page = Page(driver, url)
        field = page.one("#network input")
        field.click()
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys("test_efficientnet", Keys.ENTER)
        try:
            page.wait(lambda: "test_efficientnet is being loaded" in page.text("#result"))
            driver.save_screenshot(str(tmp_path / "loading.png"))
            SlowHub.gate.set()
            # Without another act of the user.
            page.wait(lambda: "test_efficientnet" in page.text("#code"))
            page.wait(page.map)
        finally:
            SlowHub.gate.clear()
