"""Disks that are full, folders that may not be written, processes that are killed, and two runs at once."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import parchgrad as pg
from parchgrad._io import files
from parchgrad._io.files import check_outputs, locked, writing
from parchgrad._io.tensors import read_tensors
from parchgrad.errors import OutputError
from parchgrad.evaluation.examples import Choice, Example, Examples
from parchgrad.evaluation.rows import read_rows
from parchgrad.statistics.checkpoint import write_checkpoint
from parchgrad.visual import save_figure
from parchgrad.visual.animation import save_animation
from parchgrad.visual.sweeps import quantile_sweep
from parchgrad.workflows.photographs import explain_images
from parchgrad.workflows.report_page import make_report
from tests.conftest import random_statistics
from tests.evaluation.test_runs import Noise, close, comparable, run
from tests.statistics.test_accumulate import assert_same
from tests.statistics.test_checkpoint import collect

ROOT = Path(__file__).parents[2]


def make_writers(place):
    """Functions that write results into a folder, with the names of their files."""
    image, shapes = Image.new("RGB", (64, 64), "grey"), pg.load_model("shapes")
    edit = pg.Edit(selector=pg.GradientEnergy(quantile=0.5))
    (explanation,) = explain_images(shapes, [image], edit, target=1)
    sweeps = {"ParchGrad": quantile_sweep(shapes, image, edit, quantiles=(0.5, 0.1))}
    run(place, data=Noise(3))
    report = make_report([place])
    example = Example(index=0, image="a", label=0, target=0, predicted=0, values=(0.5,), gain=0.5)
    choice = Choice(score="aopc", leading="a", settings=("a",), best=(example,), worst=())
    arrays = np.zeros((4, 5, 3), np.uint8), np.zeros((1, 4, 5), np.uint8)
    examples = Examples(choice=choice, categories={0: "a"}, pictures=arrays[:1], maps=arrays[1:])
    statistics = random_statistics({"conv": 4})
    return {
        "statistics": (lambda folder: statistics.save(folder / "a.safetensors"), ["a.safetensors"]),
        "checkpoint": (
            lambda folder: write_checkpoint(folder / "a.checkpoint", {}, {"a": torch.ones(999)}),
            ["a.checkpoint"],
        ),
        "examples": (lambda folder: examples.save(folder / "a.safetensors"), ["a.safetensors"]),
        "figure": (lambda folder: save_figure(explanation.figure(), folder / "a.png"), ["a.png"]),
        "animation": (lambda folder: save_animation(sweeps, folder / "a.gif"), ["a.gif"]),
        "explanation": (lambda folder: explanation.save(folder, "a", force=True), ["a.png", "a.npy", "a.json"]),
        "report": (
            lambda folder: report.save(folder, force=True),
            ["report.html", "report.md", "report.csv"],
        ),
    }


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    return make_writers(tmp_path_factory.mktemp("reported"))


@pytest.fixture
def save(request, writers):
    return writers[request.param]


WRITERS = ("statistics", "checkpoint", "examples", "figure", "animation", "explanation", "report")


@contextmanager
def largest_file(size):
    """No file may grow beyond a number of bytes; Python ignores the signal, so that writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("save", WRITERS, indirect=True)
@pytest.mark.parametrize("size", [0, 50])
def test_a_full_disk_leaves_earlier_files_as_they_were(tmp_path, save, size):
    write, names = save
    for name in names:
        (tmp_path / name).write_text("earlier")
    earlier = contents(tmp_path)
    with largest_file(size), pytest.raises(OutputError, match=r"Cannot write .* \(.*File too large.*\)"):
        write(tmp_path)
    assert contents(tmp_path) == earlier
    write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert b"earlier" not in contents(tmp_path).values()


def test_a_report_that_finds_room_for_some_files_changes_none(tmp_path, writers):
    write, names = writers["report"]
    for name in names:
        (tmp_path / name).write_text("earlier")
    with largest_file(20_000), pytest.raises(OutputError, match=r"report.html' .*\(File too large\)"):
        write(tmp_path)
    assert contents(tmp_path) == dict.fromkeys(names, b"earlier")


def test_an_explanation_whose_last_file_finds_no_room_changes_none(tmp_path, writers, monkeypatch):
    write, names = writers["explanation"]
    for name in names:
        (tmp_path / name).write_text("earlier")
    synchronise, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synchronise(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OutputError, match=r"a.json' \(No space left on device\)"):
        write(tmp_path)
    assert contents(tmp_path) == dict.fromkeys(names, b"earlier")


@contextmanager
def mounted(folder, options):
    """A file system of its own, which a few lines below would not do without."""
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=False).returncode:
        pytest.skip("a file system can be mounted by root alone, and not everywhere")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_an_array_without_room_is_told_by_the_systems_error(tmp_path):
    with mounted(tmp_path, "size=40k"):
        full = pytest.raises(OutputError, match=r"a.npy' \(No space left on device\)")
        with full, files.writing(tmp_path / "a.npy") as temporary:
            files.save_array(np.zeros(20_000), temporary)
        assert contents(tmp_path) == {}


@pytest.mark.parametrize("save", WRITERS, indirect=True)
def test_no_room_is_said(tmp_path, save):
    write, names = save
    with mounted(tmp_path, "size=4k"):
        (tmp_path / names[0]).write_bytes(b"earlier" * 500)
        earlier = contents(tmp_path)
        with pytest.raises(OutputError, match=rf"{names[0]}.*No space left on device"):
            write(tmp_path)
        assert contents(tmp_path) == earlier


@pytest.mark.parametrize("save", WRITERS, indirect=True)
def test_a_folder_that_may_not_be_written_is_said(tmp_path, save):
    write, names = save
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(OutputError, match="Cannot write"):
            write(tmp_path)
        tmp_path.chmod(0o700)
        return
    with mounted(tmp_path, "ro"):
        with pytest.raises(OutputError, match="Cannot write"):
            write(tmp_path)
        with pytest.raises(OutputError, match=r"Cannot write .* below"):
            check_outputs([tmp_path / "new" / names[0]], force=False)


def test_rows_that_found_no_room_are_had_again(tmp_path):
    whole = run(tmp_path / "whole")
    rows = tmp_path / "full" / "rows-0.jsonl"
    with (
        largest_file((tmp_path / "whole" / "rows-0.jsonl").stat().st_size // 2),
        pytest.raises(OutputError, match=r"rows-0.jsonl' \(File too large\)"),
    ):
        run(tmp_path / "full")
    kept = rows.read_bytes()
    assert kept.count(b"\n") > 2
    assert not kept.endswith(b"\n")
    close(run(tmp_path / "full"), whole)
    assert rows.read_bytes().startswith(kept[: kept.rindex(b"\n")])
    assert sorted(path.name for path in rows.parent.iterdir()) == [
        ".rows-0.jsonl.lock",
        "examples.safetensors",
        "rows-0.jsonl",
        "run.json",
    ]


SURROUNDINGS = {
    "cwd": ROOT,
    "env": {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])},
}


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
from tests.conftest import random_statistics
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


@pytest.mark.slow
def test_killed_at_any_moment_no_file_is_half_and_the_next_run_goes_on(tmp_path):
    script = "import sys, pathlib; from tests.system.test_faults import kill_all; kill_all(pathlib.Path(sys.argv[1]))"
    told = subprocess.run(command_of(script, tmp_path), **SURROUNDINGS, capture_output=True, text=True, check=False)
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


EVALUATING = """
import sys
from tests.evaluation.test_runs import Noise, run
run(sys.argv[1], data=Noise(40, pause=0.05), on_progress=lambda *told: print(told, flush=True))
"""

COLLECTING = """
import sys, time
from tests.statistics.test_checkpoint import collect
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


def test_a_lock_stays_where_it_is(tmp_path):
    with locked(tmp_path / "a"):
        # Who had opened it before it was removed would hold a lock of no name, and another one of the next.
        held = (tmp_path / ".a.lock").stat().st_ino
    with locked(tmp_path / "a"):
        assert (tmp_path / ".a.lock").stat().st_ino == held
        with pytest.raises(OutputError, match=r"lock file '.*\.a\.lock'"), locked(tmp_path / "a"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == [".a.lock"]


@pytest.mark.parametrize("force", [False, True])
def test_names_that_cannot_be_files(tmp_path, force):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    wrong = [(tmp_path, "is a folder")]
    wrong += [] if force else [(tmp_path / "link", "already exists"), (tmp_path / "loop", "already exists")]
    for path, words in wrong:
        with pytest.raises(OutputError, match=words):
            check_outputs([path], force=force)
    check_outputs([tmp_path / "new" / "a.txt"], force=force)
    with pytest.raises(OutputError, match="File name too long"), writing(tmp_path / ("x" * 300)):
        pass
    with pytest.raises(OutputError, match="not a regular file"), writing(Path("/dev/null")):
        pass


@pytest.mark.parametrize("place", [(files.Path, "touch"), (files.os, "fsync"), (files.Path, "replace")])
@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EDQUOT, "Free some space"),
        (errno.EROFS, "Check its permissions"),
        (errno.EIO, "Check its permissions"),
    ],
)
def test_any_error_of_the_system_is_an_output_error(tmp_path, monkeypatch, place, number, remedy):
    (tmp_path / "a.txt").write_text("earlier")

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*place, fail)
    words = rf"Cannot write .* \({os.strerror(number)}\)\. {remedy}"
    with pytest.raises(OutputError, match=words), writing(tmp_path / "a.txt") as temporary:
        temporary.write_text("later")
    assert contents(tmp_path) == {"a.txt": b"earlier"}
