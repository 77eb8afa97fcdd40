"""The explorer as people and programs reach it: requests, commands and a real browser."""

import json
import re
import signal
import socket
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

import parchgrad as pg
from parchgrad.explorer.inputs import EXAMPLES, ImageSource, View
from parchgrad.explorer.views import Explorer
from parchgrad.visual import save_figure
from parchgrad.workflows.demonstration import example_photographs
from tests.support import maps_on, python, shown_maps, wait_for
from tests.system.browser import Page, browser, needs_browser, served


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


def test_addresses_paths_and_large_files_are_refused(address, folder):
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


def test_the_page_is_held_to_this_server(address):
    answer = httpx.get(address)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    style = httpx.get(f"{address}/theme.css").text
    assert "http" not in re.sub(r"http://www\.w3\.org", "", style)


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


@needs_browser
def test_an_image_is_looked_at_in_a_browser(address, tmp_path):
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
        combobox, compared = page.one("#class input"), page.one("#rather-than input")

        def search(name="tabby", box=combobox):
            box.click()
            box.send_keys(Keys.CONTROL, "a")
            box.send_keys(name)
            page.wait(lambda: page.text("[role=option]").strip().endswith(name))
            box.send_keys(Keys.ENTER)

        # Rather than another class, which must be another one.
        assert compared.get_attribute("aria-label") == "Rather than"
        page.changes(lambda: search("espresso", compared))
        page.wait(lambda: "rather than espresso" in page.text("#result"))
        assert "pg.Contrast(target=968, against=967)" in page.text("#code")
        search("espresso")
        page.wait(lambda: "Cannot explain 'espresso' rather than itself." in page.text("#result [role=alert]"))
        search("Nothing", compared)
        page.wait(lambda: "for espresso," in page.text("#result"))
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
        (found,) = maps_on(f'class="pg-map" src="{page.map()}"')
        wanted = shown_maps(lite0, cup, pg.Explainer(lite0.model, pg.Evidence(quantile=0.21), layers=0.75), 281)[1]
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
        # Another example, by the keyboard alone.
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
def test_maps_stay_in_view_on_a_phone(address):
    from selenium.webdriver.common.keys import Keys

    edges = "const box = document.querySelector(arguments[0]).getBoundingClientRect(); return [box.top, box.bottom]"
    with browser() as driver:
        page = Page(driver, address)
        page.emulate(420, 800)
        for setting in ("#selector", "#quantile", "#softness", "#gates", "#comparison"):
            if setting == "#gates":
                page.script("document.querySelector('#more button').click()")
                page.one("#gates label")
            page.script("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", setting)
            page.wait(lambda: abs(page.script(edges, "#shown")[0]) < 1)
            bottom = page.script(edges, "#result .pg-map")[1]
            top, end = page.script(edges, setting)
            assert 0 < page.script(edges, "#result .pg-map")[0] < bottom < page.script(edges, "#shown")[1] < 400
            assert bottom < top < end < 800
        page.changes(lambda: page.one("#quantile input[type=range]").send_keys(Keys.ARROW_RIGHT))
        assert driver.execute_script("return document.documentElement.scrollWidth") == 420
        # All are there, the last one behind a swipe.
        assert len(page.all("#result .pg-pictures > figure")) == 4
        assert page.script(
            "const row = document.querySelector('.pg-pictures'); return row.scrollWidth > row.clientWidth"
        )


@needs_browser
def test_maps_and_settings_share_a_screen(address):
    edges = "return document.querySelector(arguments[0]).getBoundingClientRect().bottom"
    with browser(width=1400, height=1000) as driver:
        page = Page(driver, address)
        for part in ("#result", "#comparison", "#quantile", "#softness", "#network", "#measure", "#more"):
            assert 0 < page.script(edges, part) <= 920, part


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
        assert list(dict.fromkeys(filter(None, places[top:] + places[:top]))) == ["shown", "settings", "of-maps"]
        next(tab for tab in page.all("[role=tab]") if "Mosaic" in tab.text).click()
        paths = []
        for name, image in zip(EXAMPLES, example_photographs(), strict=True):
            image.convert("RGB").save(tmp_path / f"{name}.jpg")
            paths.append(str(tmp_path / f"{name}.jpg"))
        page.upload(paths[0], "#files")
        page.wait(lambda: "Add 3 more." in page.text("#game"))
        page.one("#take-examples").click()
        page.wait(lambda: len(page.all("#game .pg-map")) == 12)
        said = page.one("#game .pg-score").get_attribute("aria-label")
        plain, score, _, chance = (float(number) for number in re.findall(r"\d\.\d\d", said))
        assert chance == 0.25
        assert score > plain > chance

        page.one("#save-npy").click()
        (saved,) = page.wait(lambda: list(tmp_path.glob("mosaic_*.npy")))
        wanted = Explorer().play([ImageSource(name) for name in EXAMPLES], View()).attribution.numpy()
        np.testing.assert_allclose(np.load(saved), wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
        page.one("#save-gif").click()
        page.wait(lambda: "needs a single image" in page.text("#status"))
        next(tab for tab in page.all("[role=tab]") if "One" in tab.text).click()
        page.wait(lambda: "layers edited" in page.text("#status"))
        page.one("#save-png").click()
        (figure,) = page.wait(lambda: list(tmp_path.glob("cat_*.png")))
        found = Explorer().explore(ImageSource("cat"), View())
        save_figure(found.figure(), tmp_path / "wanted.png")
        with Image.open(figure) as drawn, Image.open(tmp_path / "wanted.png") as wanted:
            assert drawn.size == wanted.size
            difference = np.asarray(drawn, dtype=float) - np.asarray(wanted, dtype=float)
            assert np.abs(difference).mean() < 0.5
        # What was saved with other settings has another name.
        page.one("#signed input").click()
        page.wait(lambda: "negative" in page.text("#result"))
        page.one("#more button").click()
        page.one("#prune input").click()
        page.wait(lambda: "gamma 10" in page.text("#result"))
        page.one("#save-npy").click()
        (weighed,) = page.wait(lambda: list(tmp_path.glob("cat_*_gamma10_signed.npy")))
        wanted = Explorer().explore(ImageSource("cat"), View(gamma=10.0)).attribution.numpy()
        np.testing.assert_allclose(np.load(weighed), wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
        page.one("#save-gif").click()
        (moving,) = page.wait(lambda: list(tmp_path.glob("cat_*.gif")))
        with Image.open(moving) as frames:
            assert frames.n_frames > 6
        assert all(url.startswith((address, "data:", "blob:")) for url in page.requests())


EXPLORING = ("--port 99999", "--port x", "--model nonsuch", "--statistics none", "--statistics .", "--max-megabytes 0")


MISTAKEN = """
import sys
from parchgrad.cli import main
for typed in sys.argv[1:]:
    print("asked", typed, file=sys.stderr)
    try:
        main(["explore", *typed.split()])
    except SystemExit as end:
        print(f"ended {end.code}", file=sys.stderr)
"""


def test_every_mistake_ends_the_explorer_with_a_sentence():
    ended = python("-c", MISTAKEN, *EXPLORING, COLUMNS="200")
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    told = re.findall(r"^asked (.*)\n([\s\S]*?)ended (.*)\n", ended.stderr, flags=re.MULTILINE)
    assert [typed for typed, *_ in told] == list(EXPLORING)
    for typed, said, code in told:
        assert code == "2", typed
        assert said.startswith("Usage:") or re.fullmatch(r"Error: .*\.\n", said), said
