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
from pathlib import Path

import pytest
import torch

import parchgrad as pg
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
    random_statistics,
    run,
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


SAVING = """
import sys, time
from pathlib import Path
from tests.support import random_statistics
from parchgrad._io.files import writing

first, second = (random_statistics({"conv": 400}, seed=seed) for seed in (1, 2))
first.save(Path(sys.argv[1], "whole.safetensors"))
print("saved", flush=True)
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    second.save(Path(sys.argv[1], "whole.safetensors"))
    first.save(Path(sys.argv[1], "whole.safetensors"))
with writing(Path(sys.argv[1], "half.txt")) as temporary:
    temporary.write_text("half")
    Path(sys.argv[1], "reached").touch()
    time.sleep(100)
"""


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it has not come to that"
        time.sleep(0.01)


def test_killed_while_writing_a_file_is_the_earlier_or_the_later_one(tmp_path):
    (tmp_path / "half.txt").write_text("earlier")
    with started(SAVING, tmp_path, 0.3):
        wait_for((tmp_path / "reached").exists)
    with started(SAVING, tmp_path, 100):
        time.sleep(0.2)
    held = pg.ChannelStatistics.load(tmp_path / "whole.safetensors")
    assert any(torch.equal(held["conv"].mean, random_statistics({"conv": 400}, seed=s)["conv"].mean) for s in (1, 2))
    assert (tmp_path / "half.txt").read_text() == "earlier"
    with pytest.raises(OutputError, match="already exists"):
        check_outputs([tmp_path / "half.txt"], force=False)


def killed(act, seconds):
    """Do something in a process of its own until it is killed, which says nothing to it; whether it was at it still."""
    child = os.fork()
    if not child:
        # Whatever happens in it, what stands after this function is not done twice.
        try:
            act()
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def again_and_again(write, folder):
    while True:
        write(folder)


def kill_all(place):
    """Kill evaluations, collections and writers of every kind at odd moments; run in a process that has no threads."""
    torch.set_num_threads(1)
    times, rows = [0.02, 0.05, 0.09, 0.14, 0.2], place / "run" / "rows-0.jsonl"
    started = [killed(lambda: run(place / "run", data=Noise(30)), seconds) for seconds in times]
    started += [killed(lambda: collect_slowly(place / "a.checkpoint"), seconds) for seconds in times]
    # On a machine with much to do none came as far as a first row.
    for seconds in (0.4, 0.8, 1.6, 3.2, 6.4, 12.8):
        if not (rows.exists() and b"\n" in rows.read_bytes()):
            killed(lambda: run(place / "run", data=Noise(30)), seconds)
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


def collect_slowly(path=None):
    return collect(path, checkpoint_every=1, on_progress=lambda *_: time.sleep(0.01))


def meaning(content):
    """A file's bytes, but for the order in which safetensors writes the names in its header."""
    size = int.from_bytes(content[:8], "little")
    return (json.loads(content[8 : 8 + size]), content[8 + size :]) if size < len(content) else content


def test_killed_at_any_moment_no_file_is_half_and_the_next_run_goes_on(tmp_path):
    told = python("-m", "tests.system.test_kills", tmp_path)
    assert told.returncode == 0, told.stderr
    assert int(told.stdout.split()[0]) >= 5, "most of them were at it"

    left = []
    for name in WRITERS:
        whole = contents(tmp_path / f"{name}-whole")
        visible = [path for path in (tmp_path / name).iterdir() if not path.name.startswith(".")]
        assert sorted(path.name for path in visible) == sorted(whole)
        for path in visible:
            held = path.read_bytes()
            assert held == b"earlier" or meaning(held) == meaning(whole[path.name]), path
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

    seen = []
    # On a machine with much to do every collection may have been killed before its first checkpoint.
    kept = tmp_path / "a.checkpoint"
    batches = int(read_tensors(kept)[1]["batches"]) if kept.exists() else 1
    resumed = collect(tmp_path / "a.checkpoint", checkpoint_every=1, on_progress=lambda *told: seen.append(told))
    assert seen[0][1] == min(60, 7 * batches), "it goes on from the checkpoint"
    assert_same(resumed, collect())


RESUMING = """
import sys, time
import torch
import parchgrad as pg
from tests.support import DATA, small_network

class Slow(type(DATA)):
    def __getitem__(self, index):
        time.sleep(0.01)
        return super().__getitem__(index)

data = Slow(*DATA.tensors)
found = pg.collect_statistics(
    small_network(), data, batch_size=3, checkpoint=sys.argv[1], checkpoint_every=1,
    on_progress=lambda *told: print(*told, flush=True),
)
found.save(sys.argv[2])
"""


def test_killed_again_and_again_it_ends_with_the_same_statistics(tmp_path):
    command = command_of(RESUMING, tmp_path / "run.checkpoint", tmp_path / "out.safetensors")
    starts = []
    for delay in (0.02, 0.05, 0.11, None):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **SURROUNDINGS)
        starts.append(int(process.stdout.readline().split()[1]))
        if len(starts) > 1:
            # The first line is what the checkpoint held, the next follows one of its own.
            process.stdout.readline()
        if delay is None:
            process.communicate()
        else:
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert not (tmp_path / "out.safetensors").exists()
    assert process.returncode == 0
    # Every start went on where the one before it was, or behind.
    assert starts == sorted(starts)
    assert starts[-1] > starts[0]
    found = pg.ChannelStatistics.load(tmp_path / "out.safetensors")
    assert int(found["0"].count) == 60
    assert_same(found, collect(batch_size=3))


EVALUATING = """
import sys
from tests.support import Noise, run
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
