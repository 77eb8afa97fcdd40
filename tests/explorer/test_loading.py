"""Networks on their way: who asks never waits, and what was loaded and left is nobody's."""

import gc
import threading
import weakref

import pytest
from torch import nn

from parchgrad.errors import SettingError, WeightsError
from parchgrad.explorer import loading
from parchgrad.explorer import views as exploration
from parchgrad.explorer.loading import Loading, StillLoadingError
from parchgrad.explorer.views import Explorer


class Library:
    """Stands for the libraries of networks: gives one when its gate is open, and knows which are alive."""

    def __init__(self):
        self.gates, self.alive, self.threads = {}, weakref.WeakSet(), []

    def load(self, name):
        self.threads.append(threading.current_thread())
        model = nn.Linear(1, 1)
        self.alive.add(model)
        if name in self.gates:
            assert self.gates[name].wait(60)
        if name.startswith("broken"):
            try:
                raise OSError("not there")
            except OSError as error:
                raise WeightsError("damaged; get it again.") from error
        return model


@pytest.fixture
def library(monkeypatch):
    made = Library()
    monkeypatch.setattr(exploration, "load_model", made.load)
    yield made
    for gate in made.gates.values():
        gate.set()
    arrived()


def arrived():
    """Wait until nothing is on its way."""
    for thread in threading.enumerate():
        if thread.name.startswith("loading "):
            thread.join(60)
            assert not thread.is_alive()


def test_whoever_asks_never_waits(library):
    library.gates["slow"] = threading.Event()
    explorer = Explorer()
    explorer.classifier("held")
    asked = Loading(explorer)

    def ask():
        # Any pause that a person would notice, so many times, is longer than the test lasts.
        for _ in range(2000):
            with pytest.raises(StillLoadingError, match="Loading slow"):
                asked.require("slow")
            asked.require("held")

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(100)
    assert not asking.is_alive()
    # One thread loads it, however many ask.
    assert len(library.threads) == 2
    library.gates["slow"].set()
    arrived()
    asked.require("slow")


def test_a_thread_that_cannot_start_takes_no_place(library, monkeypatch):
    asked = Loading(Explorer())
    with monkeypatch.context() as patched:

        def fail(thread):
            raise RuntimeError("can't start new thread")

        patched.setattr(threading.Thread, "start", fail)
        for name in "abc":
            with pytest.raises(RuntimeError, match="can't start new thread"):
                asked.require(name)
    with pytest.raises(StillLoadingError, match="Loading a"):
        asked.require("a")
    arrived()
    asked.require("a")


def test_two_are_loaded_at_once_and_a_failure_is_told_once(library):
    library.gates = {name: threading.Event() for name in "abc"}
    asked = Loading(Explorer())
    for name in "aba":
        with pytest.raises(StillLoadingError, match=f"Loading {name}"):
            asked.require(name)
    with pytest.raises(SettingError, match=r"a and b .* c again later"):
        asked.require("c")
    for gate in library.gates.values():
        gate.set()
    arrived()
    asked.require("a")
    asked.require("b")
    # Another time it is tried again.
    for _ in range(2):
        with pytest.raises(StillLoadingError):
            asked.require("broken")
        arrived()
        with pytest.raises(WeightsError, match="damaged"):
            asked.require("broken")
    assert library.threads.count(threading.current_thread()) == 0
    assert len(library.threads) == 4
    assert asked._coming == {}


def test_a_network_that_was_let_go_of_before_it_was_asked_for_is_loaded_anew_beside_the_queue(library):
    explorer = Explorer(networks=2)
    asked = Loading(explorer)
    for name in "abc":
        with pytest.raises(StillLoadingError):
            asked.require(name)
        arrived()
    assert not explorer.holds("a")
    with pytest.raises(StillLoadingError):
        asked.require("a")
    arrived()
    asked.require("a")
    assert explorer.holds("a")
    assert threading.current_thread() not in library.threads


@pytest.mark.parametrize(("name", "most"), [("network", 3), ("broken", 0)])
def test_networks_that_nobody_asked_for_again_are_not_held(library, name, most):
    explorer = Explorer(networks=3)
    asked = Loading(explorer)
    for number in range(2 * loading._REMEMBERED):
        with pytest.raises(StillLoadingError):
            asked.require(f"{name} {number}")
        arrived()
    gc.collect()
    assert len(library.alive) == most
    assert len(asked._coming) <= loading._REMEMBERED + 1
