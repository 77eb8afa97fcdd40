"""What `make gpu` runs on a GPU, on the CPU: the checks of a device, and the measurements in miniature."""

import json
import math
import sys
from functools import partial

import pytest
import torch
from benchmarks import device_checks, gpu

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in device_checks.CHECKS
        for dtype in device_checks.TOLERANCES
        # The CPU is slow at float16.
        if dtype != torch.float16 or name.startswith(("convolution", "engine"))
    ],
    ids=str,
)
# The networks name operations that are not balanced.
@pytest.mark.filterwarnings("ignore::parchgrad.errors.ModelWarning")
def test_the_cpu_passes_the_checks_of_a_device(name, dtype):
    found = device_checks.check(name, CPU, dtype)
    assert found.passed, found
    assert found.repeats
    # In a lower precision something must differ, or nothing was compared.
    assert found.error > 0


def test_a_device_that_computes_something_else_does_not_pass(monkeypatch):
    def compute(numbers):
        wrong = 0.02 if numbers.dtype == torch.float32 else 0.0
        return [numbers.of(torch.tensor([3.0, 4.0])), numbers.of(torch.tensor([3.0, 4.0])) * (1 + wrong)]

    monkeypatch.setattr(device_checks, "CHECKS", {"wrong": compute})
    found = device_checks.check("wrong", CPU, torch.float32)
    assert found.error == pytest.approx(0.02, rel=1e-5)
    assert not found.passed
    monkeypatch.setattr(device_checks, "CHECKS", {"void": lambda numbers: [torch.ones(1), math.nan * torch.ones(1)]})
    assert not device_checks.check("void", CPU, torch.float32).passed
    one, other = torch.tensor([0.0, 5.0]), torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert device_checks.distance(one, other) == pytest.approx(math.sqrt(10) / 5)
    assert device_checks.distance(one, one.double()[:1]) == math.inf


class Clock:
    """A clock that only moves when something runs."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def run(self, seconds):
        self.now += seconds


def test_calls_that_do_not_fit_are_left_out(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(gpu, "time", clock)
    calls = {
        gpu.BASE: (partial(clock.run, 0.01), 1),
        "twice": (partial(clock.run, 0.02), 2),
        "forever": (partial(clock.run, 60), 6000),
    }
    found = gpu.measure(calls, CPU, 0.4)
    assert found[gpu.BASE].ratio == pytest.approx(1)
    assert found["twice"].ratio == pytest.approx(2)
    # Three calls of each took 0.09 of 0.4 seconds, and a round takes 0.03.
    assert found["twice"].rounds == 10
    assert found["forever"].reason == "no time"
    assert found["forever"].rounds == 0
    assert clock.now <= 0.4

    def full():
        raise torch.cuda.OutOfMemoryError("full")

    found = gpu.measure({gpu.BASE: (full, 1), "next": (full, 1)}, CPU, 1)
    assert [one.reason for one in found.values()] == ["no memory", "no memory"]


def test_the_measurements_are_written_as_a_page_and_a_file(tmp_path, monkeypatch, capsys):
    checks = {name: device_checks.CHECKS[name] for name in ("convolution, kept channels", "engine, hard masks")}
    monkeypatch.setattr(gpu, "CHECKS", checks)
    monkeypatch.setattr(gpu, "COLLECTING", 0.1)
    options = ["--networks", "efficientnet_b0", "--batches", "1", "--minutes", "1e-9", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--quick", *options])
    gpu.main()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [one["passed"] for one in found["checks"]] == [True, True]
    assert found["collection"]["efficientnet_b0"]["images"] == 4
    (ways,) = found["speed"].values()
    assert {way["reason"] for way in ways.values()} == {"no time"}
    assert ways["default"]["seconds"] is None
    page = (tmp_path / "gpu.md").read_text()
    assert "efficientnet_b0 x 1" in page
    assert page in capsys.readouterr().out


def test_the_page_shows_memory_and_what_was_wrong():
    checks = [
        device_checks.Outcome(name="maps", dtype="float16", error=0.5, tolerance=0.01, repeats=False),
        device_checks.Outcome(name="maps", dtype="float32", error=1e-6, tolerance=0.001, repeats=True),
    ]
    case = {
        gpu.BASE: gpu.Figures(seconds=0.25, ratio=1.0, rounds=9, megabytes=800.0),
        "default": gpu.Figures(seconds=0.3, ratio=1.2, rounds=9, megabytes=1000.4),
        "slow": gpu.Figures(reason="no memory"),
    }
    page = gpu.markdown({"device": "some device"}, checks, {}, {"net x 32": case})
    assert "| maps | 5.0e-01 **too far** other bits | 1.0e-06 |" in page
    assert "| net x 32 | 1.00 | 1.20 | no memory | 250.0 | 9 |" in page
    assert "| net x 32 | 800 | 1,000 | no memory |" in page
