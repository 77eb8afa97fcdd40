"""The page of the explorer without its server: events, what they show, and requests that are refused."""

import asyncio
import gc
import html
import json
import re
import socket
import warnings

import numpy as np
import pytest
from PIL import Image

import parchgrad as pg
from parchgrad.errors import SettingError
from parchgrad.visual import tint
from parchgrad.workflows.demonstration import example_photographs
from tests.support import maps_on, python, shown_maps, wait_for

pytest.importorskip("gradio", reason="Gradio, of the extra web, is not installed.")


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    from parchgrad.explorer.page import build_app
    from parchgrad.explorer.settings import WebSettings

    with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings():
        patched.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        # Gradio leaves event loops open, the last one as that of this thread.
        warnings.simplefilter("ignore")
        built = build_app(WebSettings(network="shapes", any_network=False, max_megapixels=3))
        gc.collect()
        asyncio.get_event_loop().close()
        asyncio.set_event_loop(None)
    return built


class User:
    """One session of the page; events call the handlers as the page's script would."""

    def __init__(self, app):
        self._handlers = {handler.api_name: handler for handler in app.fns.values()}
        self._held, self.updates = {}, {}

    def act(self, event, *inputs, **settings):
        """Trigger an event, and return what it changed by the id of the component."""
        handler = self._handlers[event]
        given = inputs or [settings.get(part.elem_id, self._held.get(part, part.value)) for part in handler.inputs]
        found = handler.fn(*given)
        self.updates = {}
        for part, update in (found if isinstance(found, dict) else {handler.outputs[0]: found}).items():
            properties = getattr(update, "properties", {"value": update})
            self.updates[part.elem_id] = properties
            # The settings that an event is given last for this event alone.
            if "value" in properties and part.elem_id in (None, "class", "rather-than", "stamp", "selector"):
                self._held[part] = properties["value"]
        return {name: properties["value"] for name, properties in self.updates.items() if "value" in properties}

    def show(self, layers="all", quantile=0.25, selector="energy", **settings):
        """Trigger an explanation, and return the page in place of the maps."""
        settings = {"softness": 0.5, "gates": 1, "antialias": True, "balance": True} | settings
        found = self.act("show", layers=layers, quantile=quantile, selector=selector, **settings)
        return found.get("result", "")


@pytest.fixture
def user(app):
    return User(app)


@pytest.fixture(scope="module")
def shapes():
    return pg.load_model("shapes")


def test_the_map_is_that_of_the_settings_and_its_stability_belongs_to_it(user, shapes):
    assert "There is no map yet." in user.act("measure")["steadiness"]
    user.act("take_example", "coffee")
    hard = {"selector": "evidence", "quantile": 0.3, "softness": 0.2, "gates": 2, "antialias": False}
    hard |= {"balance": False}
    page = user.show(**hard)
    selector = pg.Evidence(quantile=0.3, softness=0.2)
    explainer = pg.Explainer(shapes.model, selector, layers="all", gates=2, antialias=False, balance=False)
    for found, wanted in zip(maps_on(page)[:2], shown_maps(shapes, example_photographs()[1], explainer), strict=True):
        assert np.abs(found - wanted).max() < 0.003
    code = user.updates["code"]["value"]
    assert "selector = pg.Evidence(quantile=0.3, softness=0.2)" in code
    assert "layers='all', gates=2, antialias=False, balance=False)" in code
    inputs = shapes.preprocess(example_photographs()[1]).unsqueeze(0)
    assert f"stability {float(explainer.stability(inputs)):.2f}</strong>" in user.act("measure")["steadiness"]
    # It stays with the map, and goes with it.
    user.show(**hard)
    assert "value" not in user.updates["steadiness"]
    user.show(**hard | {"gates": 4})
    assert user.updates["steadiness"] == {"value": ""}


def test_users_have_their_own_images_and_classes(app, shapes):
    users, images = [User(app), User(app)], example_photographs()
    for place, one in enumerate(users):
        one.act("take_example", ("cat", "coffee")[place])
        one.show()
    for turn in range(2):
        for place, one in enumerate(users):
            target, quantile = 3 * place + turn, 0.2 + 0.1 * turn
            page = one.show(**{"class": target}, quantile=quantile)
            explainer = pg.Explainer(shapes.model, pg.GradientEnergy(quantile=quantile), layers="all")
            wanted = shown_maps(shapes, images[place], explainer, target)
            for found, expected in zip(maps_on(page)[:2], wanted, strict=True):
                assert np.abs(found - expected).max() < 0.003
            assert f"for {shapes.categories[target]}," in page


def test_a_class_from_an_earlier_list_does_not_count(user, shapes):
    user.act("take_example", "coffee")
    user.show()
    late = {"class": 3, "stamp": user.updates["stamp"]["value"]}
    assert f"for {shapes.categories[3]}," in user.show(**late)
    user.act("take_example", "camera")
    ((predicted,),) = shapes.predict(shapes.preprocess(example_photographs()[2]).unsqueeze(0), count=1)
    assert predicted.index != 3
    # The browser may send the class of the image before.
    for _ in range(2):
        assert f"for {predicted.category}," in user.show(**late)


def test_what_the_class_is_compared_with_is_kept_while_it_makes_sense(user, shapes):
    images = [shapes.preprocess(example_photographs()[place]).unsqueeze(0) for place in (1, 2)]
    first, second = (int(shapes.model(image).argmax()) for image in images)
    other = next(index for index in range(10) if index not in (first, second))
    name = {index: shapes.categories[index] for index in range(10)}
    user.act("take_example", "coffee")
    user.show()
    assert user.updates["rather-than"]["choices"][:4][::3] == [("Nothing", "alone"), ("arrow", 0)]
    page = user.show(**{"rather-than": "rest"})
    explainer = pg.Explainer(shapes.model, pg.GradientEnergy(quantile=0.25), layers="all")
    contrast = pg.Contrast(target=first, against="rest")
    expected = shown_maps(shapes, example_photographs()[1], explainer, contrast)
    for found, wanted in zip(maps_on(page)[:2], expected, strict=True):
        assert np.abs(found - wanted).max() < 0.003
    assert ", rather than all others<" in page
    assert re.search(rf"{name[first]}_rather-than-all-others_.*\.npy$", user.act("run_2")["fetched"])
    same = html.unescape(user.show(**{"rather-than": first}))
    assert f"Cannot explain '{name[first]}' rather than itself." in same
    assert f"rather than {name[other]}<" in user.show(**{"rather-than": other})
    # The next image keeps the choice, unless it is the explained class itself.
    user.act("take_example", "camera")
    assert re.search(rf"for {name[second]}, [\d.]+%, rather than {name[other]}<", user.show(**{"rather-than": other}))
    assert user.updates["rather-than"]["value"] == other
    assert f"rather than {name[first]}<" in user.show(**{"rather-than": first})
    user.act("take_example", "coffee")
    assert "rather than" not in user.show(**{"rather-than": first})
    assert user.updates["rather-than"]["value"] == "alone"
    # Another network has other classes; a choice from the list before does not count.
    late = {"rather-than": other, "stamp": user.updates["stamp"]["value"]}
    assert f"rather than {name[other]}<" in user.show(**late)
    lite0 = {"network": "efficientnet_lite0"}
    wait_for(lambda: "Results appear when it is ready" not in user.show(**lite0, **late))
    assert "for espresso," in user.show(**lite0, **late)
    assert "rather than" not in user.show(**lite0, **late)


def test_a_selector_without_statistics_falls_back(user):
    user.act("take_example", "coffee")
    assert "gradient energy, quantile 0.25" in user.show(selector="class")
    assert "needs statistics, which shapes does not have. Using gradient energy." in user.updates["status"]["value"]
    assert user.updates["selector"]["value"] == "energy"
    # The updated list triggers the same event again.
    user.show()
    assert "Using gradient energy." in user.updates["status"]["value"]
    user.show(quantile=0.3)
    assert "Using gradient energy." not in user.updates["status"]["value"]


def test_the_third_map_is_chosen(user, shapes):
    user.act("take_example", "coffee")
    inputs = shapes.preprocess(example_photographs()[1]).unsqueeze(0)
    (energy,) = pg.heatmap(pg.Explainer(shapes.model, pg.GradientEnergy()).attribute(inputs))
    assert np.abs(maps_on(user.show(comparison="energy"))[2] - tint(energy)).max() < 0.003
    assert user.act("run")["fetched"].endswith("_with-energy.png")
    assert len(maps_on(user.show(comparison="none"))) == 2
    # Statistics came with the network before.
    assert len(maps_on(user.show(comparison="class"))) == 2
    assert (
        "No third map: ParchGrad, class-wise (statistics) does not work with shapes." in user.updates["status"]["value"]
    )
    assert user.updates["comparison"]["value"] == "none"
    assert "class" not in [value for _, value in user.updates["comparison"]["choices"]]


def test_an_improbable_class_is_said(user, shapes):
    user.act("take_example", "coffee")
    probabilities = shapes.model(shapes.preprocess(example_photographs()[1]).unsqueeze(0)).softmax(dim=1)[0]
    least, most = int(probabilities.argmin()), int(probabilities.argmax())
    assert probabilities[least] < 0.05 < probabilities[most]
    user.show()
    for index, improbable in ((most, False), (least, True)):
        page = user.show(**{"class": index})
        assert ("pg-warning" in page) == improbable
        assert (f"The network gives {shapes.categories[index]} " in page) == improbable


def test_a_change_of_the_network_offers_its_lists(user):
    user.act("take_example", "coffee")
    lite0 = {"network": "efficientnet_lite0"}
    wait_for(lambda: "Results appear when it is ready" not in user.show(**lite0, layers="published"))
    assert "3 layers edited" in user.updates["status"]["value"]
    assert "published" in [value for _, value in user.updates["layers"]["choices"]]
    # Still of the network before: a class that the other one does not have.
    assert len(maps_on(user.show(**{"class": 967, "stamp": "of before"}))) == 3
    assert "published" not in [value for _, value in user.updates["layers"]["choices"]]
    assert "Choose covered layers" in user.show(**lite0, selector="class")
    # The list is offered where an error stands as well.
    assert "class" in [value for _, value in user.updates["selector"]["choices"]]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"network": None}, "`network` is 'None',"),
        ({"network": "resnet18"}, "'resnet18' is not available"),
        ({"layers": ["a"]}, "`layers` is"),
        ({"layers": "a," * 600}, "`layers` has 1,200 characters,"),
        ({"layers": "published"}, "The paper has no layer set for ShapesNetwork"),
        ({"selector": 3}, "`selector` is '3',"),
        ({"selector": "magic"}, "'magic'"),
        ({"method": "magic"}, "'magic'"),
        ({"comparison": "magic"}, "'magic'"),
        ({"comparison": None}, "`comparison` is 'None',"),
        ({"prune": False, "gamma": 400}, "`gamma` is 400,"),
        ({"quantile": "half"}, "`quantile` is half,"),
        ({"quantile": -1}, "`quantile` is -1,"),
        ({"opacity": None}, "`opacity` is None,"),
        ({"softness": 2}, "`softness` is 2,"),
        ({"gates": -1}, "`gates` is -1,"),
        ({"gates": "wide"}, "`gates` is wide,"),
        ({"class": "tabby"}, "'tabby', but it must be a whole number."),
        ({"rather-than": "tabby"}, "`against` is 'tabby', but it must be the index of a class other than"),
        ({"rather-than": 1000}, "The index is 1000, but the model has 10 outputs."),
    ],
)
def test_values_that_programs_send_are_refused_in_one_sentence(user, settings, said):
    user.show()
    page = html.unescape(user.show(**settings))
    assert "role='alert'" in page
    assert said in page


def test_files_are_refused_without_naming_the_folder_of_the_server(user, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    example_photographs()[0].save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:20_000])
    Image.new("1", (2000, 2000)).save(tmp_path / "wide.png")
    for file, said in (
        ({"path": str(tmp_path / "bad.png")}, "'bad.png' is not a readable image"),
        ({"path": str(tmp_path / "cut.jpg")}, "Cannot read 'cut.jpg'"),
        ({"path": str(tmp_path / "wide.png")}, "has 4.0 megapixels, but the limit is 3"),
        ({}, "The upload is empty"),
    ):
        user.act("take", file)
        page = html.unescape(user.show())
        assert said in page
        assert str(tmp_path) not in page


def test_a_mosaic_is_scored(user):
    user.act("take_four_examples")
    user.act("lambda_2")
    user.show()
    said = re.search(r'class="pg-score"[^>]*aria-label="([^"]*)"', user.updates["game"]["value"])[1]
    plain, score, _, chance = (float(number) for number in re.findall(r"\d\.\d\d", said))
    assert score > plain > chance == 0.25


def test_a_result_is_saved_under_its_settings(user, shapes):
    user.act("take_example", "cat")
    user.show(signed=True)
    # The third of three buttons: PNG, GIF, npy.
    saved = user.act("run_2")["fetched"]
    assert re.search(r"cat_.*_signed\.npy$", saved)
    explainer = pg.Explainer(shapes.model, pg.GradientEnergy(quantile=0.25), layers="all")
    expected = explainer.attribute(shapes.preprocess(example_photographs()[0]).unsqueeze(0))[0].numpy()
    np.testing.assert_allclose(np.load(saved), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("stability", "said"),
    [(0.98, "hardly changes"), (0.6, "changes parts"), (0.3, "Warning"), (float("nan"), "zero everywhere")],
)
def test_a_stability_is_explained_in_a_sentence(stability, said):
    from parchgrad.explorer.rendering import describe_stability

    found = describe_stability(stability)
    assert said in found
    assert ("pg-warning" in found) == (stability < 0.5)
    assert ("stability 0." in found) == (stability == stability)


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


def test_what_cannot_be_served_is_said():
    from parchgrad.explorer.server import serve
    from parchgrad.explorer.settings import WebSettings

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


def test_without_gradio_the_remedy_is_named():
    missing = "import sys; sys.modules['gradio'] = sys.modules['starlette'] = None"
    found = python("-c", f"{missing}; from parchgrad.cli import main; main(['explore'])")
    assert found.returncode == 2
    assert "pip install 'parchgrad[web]'" in found.stderr
    assert "Traceback" not in found.stderr


def test_networks_that_are_not_offered_cannot_be_typed(app):
    network = next(block for block in app.blocks.values() if block.elem_id == "network")
    assert [name for name, _ in network.choices] == ["shapes", "efficientnet_lite0"]
    assert not network.allow_custom_value
