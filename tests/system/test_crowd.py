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

from tests.support import Hub, maps_on

gradio_client = pytest.importorskip("gradio_client", reason="Gradio, of the extra web, is not installed.")

from benchmarks import explorer as crowds  # noqa: E402  # it needs Gradio itself

from tests.system.browser import Page, User, browser, needs_browser, show_request  # noqa: E402  # it needs Gradio too

SECONDS = float(os.environ.get("PARCHGRAD_SOAK_SECONDS", "8"))


def test_twenty_users_with_good_and_bad_requests_get_right_maps_or_one_sentence():
    """For a minute with `make soak`."""
    tally = crowds.observe(crowds.Crowd(users=20, seconds=SECONDS, network="shapes", layers="all"))
    crowds.report(tally)
    assert not tally.wrong
    # Each user asked at least once, and everything that can be asked was.
    assert sum(tally.counts.values()) >= 20
    assert set(tally.counts) == set(crowds.RIGHT)
    assert tally.alive
    # Whoever waits is told behind how many.
    assert tally.places > 0
    assert "Traceback" not in tally.said
    # The maps that are held, 64 MB, what a session of each user takes, and what is freed but not handed back.
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
    for name in ("test_byobnet", "test_efficientnet"):
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
        assert httpx.get(f"{url}/gradio_api/{path}", timeout=30).status_code in (403, 404)


def test_a_network_that_takes_long_to_arrive_holds_up_nobody_else(url):
    crowd, other = [User(url) for _ in range(5)], User(url)
    slow = {"network": "test_byobnet", "layers": "0.5"}
    try:
        for user in crowd:
            user.take_example("coffee")
        other.take_example("cat")
        # Nobody waits on the server: all are answered, again and again, though the network does not come.
        for _ in range(3):
            for user in crowd:
                assert "Loading test_byobnet. Results appear when it is ready." in user.ask(**slow)
            assert len(maps_on(other.ask())) == 3
        # One that cannot be had is told, and another time as well.
        for _ in range(2):
            assert "Cannot load the weights of test_resnet (404" in other.show(network="test_resnet")
        assert not SlowHub.gate.is_set()
        SlowHub.gate.set()
        for user in crowd:
            assert len(maps_on(user.show(**slow))) == 3
    finally:
        SlowHub.gate.clear()
        for user in (*crowd, other):
            user.close()


def test_who_comes_to_a_full_queue_is_told(url):
    config = httpx.get(f"{url}/config").json()
    user, refused = User(url), None
    with httpx.Client(timeout=30) as client:
        for number in range(400):
            # Each is some work, which nobody has asked for before.
            request = show_request(config, f"user {number}", quantile=0.1 + number / 1000)
            answer = client.post(f"{url}/gradio_api/queue/join", json=request)
            if answer.status_code != 200:
                refused = answer
                break
    assert refused is not None
    assert refused.status_code == 503
    assert "full" in refused.json()["detail"].lower()
    # Afterwards it is as it was.
    end = time.monotonic() + 60
    page = ""
    while not maps_on(page):
        assert time.monotonic() < end
        # The client has errors of its own for a queue that is full.
        with contextlib.suppress(Exception):
            user.take_example("cat")
            page = user.show()
    user.close()


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
            page.wait(lambda: "Loading test_efficientnet" in page.text("#result"))
            driver.save_screenshot(str(tmp_path / "loading.png"))
            SlowHub.gate.set()
            # Without another act of the user.
            page.wait(lambda: "test_efficientnet" in page.text("#code"))
            page.wait(page.map)
        finally:
            SlowHub.gate.clear()
