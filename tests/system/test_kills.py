"""Processes that are killed, and two runs at once: no file is half written, and the next run resumes.

`kill_all` runs in a process of its own, this file as a script.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from parchgrad._io.files import check_outputs
from parchgrad._io.tensors import read_tensors
from parchgrad.errors import OutputError
from parchgrad.evaluation.rows import read_rows
from tests.support import (
    SURROUNDINGS,
    Noise,
    assert_same,
    close,
    collect,
    comparable,
    contents,
    python,
    run,
    wait_for,
)
from tests.system.writers import WRITERS, make_writers


def command_of(script, *arguments):
    return [sys.executable, "-c", script, *map(str, arguments)]


@contextmanager
def started(script, *arguments):
    """A process that says when it has come so far; killed at the end of the block at the latest."""
    with subprocess.Popen(command_of(script, *arguments), stdout=subprocess.PIPE, **SURROUNDINGS) as process:
        try:
            assert process.stdout.readline(), "it has ended too early"
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


def killed(act, seconds=0.0, until=lambda: True):
    """Act in a process of its own, kill it that long after a condition holds, and return whether it was still at it."""
    child = os.fork()
    if not child:
        # Whatever happens in it, what stands after this function is not done twice.
        try:
            act()
        finally:
            os._exit(1)
    wait_for(until)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def again_and_again(write, folder):
    while True:
        write(folder)


def evaluate_slowly(place):
    return run(place / "run", data=Noise(30, pause=0.01))


def collect_slowly(place):
    return collect(place / "a.checkpoint", checkpoint_every=1, on_progress=lambda *_: time.sleep(0.02))


def rows_in(place):
    file = place / "run" / "rows-0.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def batches_in(place):
    file = place / "a.checkpoint"
    return int(read_tensors(file)[1]["batches"]) if file.exists() else 0


def kill_all(place):
    """Kill evaluations, collections and writers of every kind at odd moments; run in a process that has no threads."""
    torch.set_num_threads(1)
    started = []
    for act, done in ((evaluate_slowly, rows_in), (collect_slowly, batches_in)):
        # At the start, and again and again after some progress.
        started += [killed(partial(act, place), seconds) for seconds in (0.02, 0.05, 0.09)]
        for seconds in (0, 0.01, 0.03):
            before = done(place)
            started.append(killed(partial(act, place), seconds, until=lambda d=done, b=before: d(place) > b))
            if not started[-1]:
                break
    print(f"{sum(started)} runs killed", flush=True)
    for name, (write, names) in make_writers(place / "reported").items():
        folder = place / name
        folder.mkdir()
        for file in names:
            (folder / file).write_bytes(b"earlier")
        (place / f"{name}-whole").mkdir()
        # The first time of all, Matplotlib looks fonts up.
        for _ in range(2):
            start = time.monotonic()
            write(place / f"{name}-whole")
        taken = time.monotonic() - start
        for part in (0.3, 0.8, 1.5):
            assert killed(lambda write=write, folder=folder: again_and_again(write, folder), part * taken)


def meaning(content):
    """A file's bytes, but for the order in which safetensors writes the names in its header."""
    size = int.from_bytes(content[:8], "little")
    return (json.loads(content[8 : 8 + size]), content[8 + size :]) if size < len(content) else content


def test_killed_at_any_moment_no_file_is_half_and_the_next_run_goes_on(tmp_path):
    told = python("-m", "tests.system.test_kills", tmp_path)
    assert told.returncode == 0, told.stderr
    assert int(told.stdout.split()[0]) >= 8, "most of them were at it"

    left = []
    for name in WRITERS:
        whole = contents(tmp_path / f"{name}-whole")
        visible = [path for path in (tmp_path / name).iterdir() if not path.name.startswith(".")]
        assert sorted(path.name for path in visible) == sorted(whole)
        for path in visible:
            held = path.read_bytes()
            assert held == b"earlier" or meaning(held) == meaning(whole[path.name]), path
            with pytest.raises(OutputError, match="already exists"):
                check_outputs([path], force=False)
        hidden = [path for path in (tmp_path / name).iterdir() if path not in visible]
        assert len(hidden) <= 3 * len(whole), "each that was killed leaves one folder for each file at most"
        left += hidden
        assert all(path.name.startswith(".parchgrad-") for path in hidden)
    assert len(left) > len(WRITERS), "most were killed while they wrote"

    held = (tmp_path / "run" / "rows-0.jsonl").read_bytes()
    before = len(read_rows(tmp_path / "run"))
    rows = run(tmp_path / "run", data=Noise(30))
    assert 0 < before <= len(rows) == 90
    assert (tmp_path / "run" / "rows-0.jsonl").read_bytes().startswith(held[: held.rindex(b"\n") + 1])
    close(rows, run(tmp_path / "unbroken", data=Noise(30)))

    batches, seen = batches_in(tmp_path), []
    assert batches > 0
    resumed = collect(tmp_path / "a.checkpoint", checkpoint_every=1, on_progress=lambda *told: seen.append(told))
    assert seen[0][1] == min(60, 7 * batches), "it goes on from the checkpoint"
    assert_same(resumed, collect())


EVALUATING = """
import sys
from tests.support import Noise, run, wait_for
run(sys.argv[1], data=Noise(40, pause=0.05), on_progress=lambda *told: print(told, flush=True))
"""

COLLECTING = """
import sys, time
from tests.support import collect
def told(*progress):
    print(progress, flush=True)
    time.sleep(100)
collect(sys.argv[1], on_progress=told)
"""


def test_a_run_that_goes_on_is_not_started_again(tmp_path):
    with started(EVALUATING, tmp_path / "run"):
        before = (tmp_path / "run" / "run.json").read_bytes()
        with pytest.raises(OutputError, match=r"'.*rows-0\.jsonl'.*lock file"):
            run(tmp_path / "run", data=Noise(40))
        assert (tmp_path / "run" / "run.json").read_bytes() == before
    # The lock of a process that was killed is nobody's.
    assert (tmp_path / "run" / ".rows-0.jsonl.lock").exists()
    assert len(read_rows(tmp_path / "run")) < 120
    rows = run(tmp_path / "run", data=Noise(40))
    assert len((tmp_path / "run" / "rows-0.jsonl").read_text().splitlines()) == len(rows) == 120
    close(rows, comparable(read_rows(tmp_path / "run")))


def test_a_collection_that_goes_on_is_not_started_again(tmp_path):
    path = tmp_path / "run.checkpoint"
    with (
        started(COLLECTING, path),
        pytest.raises(OutputError, match=r"'.*run\.checkpoint'.*lock file"),
    ):
        collect(path)
    assert_same(collect(path), collect())
    assert sorted(file.name for file in tmp_path.iterdir()) == [".run.checkpoint.lock", "run.checkpoint"]


if __name__ == "__main__":
    kill_all(Path(sys.argv[1]))
