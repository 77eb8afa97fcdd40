"""Users of the explorer's page: by its interface for programs, and in a browser."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

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


def show_request(config, user, **settings):
    """A request of a new user for maps, given the configuration of the page, with other settings than the first."""
    (show,) = [event for event in config["dependencies"] if event["api_name"] == "show"]
    parts = {part["id"]: part["props"] for part in config["components"]}
    values = [settings.get(parts[number].get("elem_id"), parts[number].get("value")) for number in show["inputs"]]
    return {"fn_index": show["id"], "session_hash": user, "data": values}


class User:
    """One session of the page, driven as its script would drive it."""

    def __init__(self, address):
        # No certificates need be read for plain HTTP, which takes most of a second in all.
        self._client = gradio_client.Client(address, verbose=False, ssl_verify=False, httpx_kwargs={"timeout": 60})
        self._target, self._stamp = None, ""

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
        chosen |= {"softness": 0.5, "gates": 1, "antialias": True, "balance": True} | settings
        found = self._client.predict(
            network=network,
            target=self._target,
            against="alone",
            stamp=self._stamp,
            selector=selector,
            layers=layers,
            quantile=quantile,
            **chosen,
            api_name="/show",
        )
        # What did not change comes as an empty update.
        result, stamp = found[0], found[6]
        self._stamp = stamp if isinstance(stamp, str) else self._stamp
        return result

    def choose(self, target):
        self._target = target

    def close(self):
        self._client.close()


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

    def emulate(self, width, height):
        """Show the page as on a phone; a window cannot be that narrow."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

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

    def upload(self, path, place="#image"):
        self.one(f"{place} input[type=file]").send_keys(str(path))

    def requests(self):
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return {
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        }
