"""Several processes that share a collection or an evaluation, under torchrun and without it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch.distributed

import parchgrad as pg
from parchgrad.cli import main
from parchgrad.errors import ParchGradError
from parchgrad.evaluation.examples import EXAMPLES_FILE, Examples
from parchgrad.evaluation.rows import read_rows
from parchgrad.statistics.batches import LeftOut
from tests.support import (
    DATA,
    SURROUNDINGS,
    Noise,
    assert_same,
    cli,
    close,
    collect,
    comparable,
    order,
    run,
)

COUNT = 3
COLLECTIONS = ("given", "predicted", "left")
COMMAND = "evaluate --model shapes --data shapes --count 7 --batch-size 1 --layers all --scores perturbation --out"


def without_the_first_share():
    """Leave out every image that the first process would load."""
    return [LeftOut(f"number {i} is gone") if i // 7 % COUNT == 0 else DATA[i] for i in range(len(DATA))]


def share_everything(out, rank):
    """Collect statistics and evaluate, as one of several processes."""
    # Each collection starts a group of processes of its own.
    for name in COLLECTIONS:
        data, labels = (without_the_first_share(), "given") if name == "left" else (DATA, name)
        # Every process has the whole result.
        collect(data=data, labels=labels).save(f"{out}/{name}-{rank}")
    run(f"{out}/run", data=Noise(pause=0.02))
    with pytest.raises(SystemExit):
        main([*COMMAND.split(), f"{out}/command"])
    # The last, since it ends the process.
    collect(seed=rank)


def collect_and_die(out, rank):
    """Collect statistics with a checkpoint; the second process is killed on the way."""

    def told(stage, done, total):
        if rank == 1 and done >= 14:
            os.kill(os.getpid(), signal.SIGKILL)

    collect(f"{out}/checkpoint", checkpoint_every=1, on_progress=told)


def join_and_die(out, rank):
    """Do the same without torchrun."""
    torch.distributed.init_process_group("gloo")
    collect_and_die(out, rank)


def resume(out, rank):
    """Collect the same without being killed."""
    collect(f"{out}/checkpoint", checkpoint_every=1).save(f"{out}/resumed-{rank}")


PARTS = {part.__name__: part for part in (share_everything, collect_and_die, join_and_die, resume)}


def part_command(part, out):
    return ["-m", "tests.system.test_processes", part.__name__, str(out)]


def torchrun(part, out, processes):
    """Run a part in processes under torchrun, and return the exit code, standard output and standard error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += part_command(part, out)
    where = {**SURROUNDINGS, "env": {**SURROUNDINGS["env"], "GLOO_SOCKET_IFNAME": "lo"}}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A session of their own, so that none is left where one hangs.
    launched = subprocess.Popen(command, **where, **pipes, text=True, start_new_session=True)
    try:
        printed, said = launched.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(launched.pid, signal.SIGKILL)
        raise
    return launched.returncode, printed, said


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    out = tmp_path_factory.mktemp("shared")
    return out, torchrun(share_everything, out, COUNT)


@pytest.mark.parametrize("name", COLLECTIONS)
def test_a_shared_collection_equals_that_of_one_process(shared, name):
    out, (_, _, said) = shared
    if name == "left":
        alone = collect(data=[DATA[i] for i in range(len(DATA)) if i // 7 % COUNT])
    else:
        alone = collect(labels=name)
    for rank in range(COUNT):
        assert (out / f"{name}-{rank}").exists(), said
        found = pg.ChannelStatistics.load(out / f"{name}-{rank}")
        assert_same(found, alone, rtol=1e-10)
        assert name == "left" or found.sample.keys.equal(alone.sample.keys)


def test_processes_must_make_the_same_call(shared):
    _, (code, _, said) = shared
    assert code != 0
    assert re.search(r"process [23] .*seed was '0' and is '[12]'", said)


def written(folder):
    """List the settings and images of the rows that each process wrote."""
    lines = [(folder / f"rows-{rank}.jsonl").read_text().splitlines() for rank in range(COUNT)]
    return [[(row["setting"], row["index"]) for row in map(json.loads, own)] for own in lines]


def test_a_shared_run_has_the_rows_and_examples_of_one_process(shared, tmp_path):
    folder = shared[0] / "run"
    whole = run(tmp_path)
    close(sorted(comparable(read_rows(folder)), key=order), sorted(whole, key=order))
    assert [len(rows) for rows in written(folder)] == [9, 6, 6]
    names = [f"rows-{rank}.jsonl" for rank in range(COUNT)]
    locks = [f".{name}.lock" for name in names]
    assert sorted(file.name for file in folder.iterdir()) == sorted([*locks, *names, EXAMPLES_FILE, "run.json"])
    found, expected = Examples.load(folder / EXAMPLES_FILE), Examples.load(tmp_path / EXAMPLES_FILE)
    assert [example.index for example in found.choice.examples] == [
        example.index for example in expected.choice.examples
    ]
    for one, other in zip(found.maps, expected.maps, strict=True):
        np.testing.assert_allclose(one.astype(int), other.astype(int), atol=1)
    # Another number of processes finds everything done.
    before = written(folder)
    run(folder)
    assert written(folder) == before


def test_a_command_under_torchrun_is_shared_and_speaks_once(shared, tmp_path, capsys):
    out, (_, printed, _) = shared
    code, printed_alone, _ = cli(capsys, *COMMAND.split(), tmp_path)
    assert code == 0
    assert printed.count("View the results with") == printed_alone.count("View the results with") == 1
    rows, alone = (comparable(read_rows(folder / "shapes")) for folder in (out / "command", tmp_path))
    assert len(alone) == 7 * 6
    close(sorted(rows, key=order), sorted(alone, key=order))
    by_process = written(out / "command" / "shapes")
    assert [len(own) for own in by_process] == [3 * 6, 2 * 6, 2 * 6]
    assert [{index for _, index in own} for own in by_process] == [{0, 3, 6}, {1, 4}, {2, 5}]
    assert len(set().union(*by_process)) == 7 * 6


def test_a_process_that_dies_fails_the_run_and_resuming_works(tmp_path):
    code, _, said = torchrun(collect_and_die, tmp_path, 2)
    assert code != 0
    assert "Process 2 of 2 died" in said or "Signal 9 (SIGKILL)" in said
    assert (tmp_path / "checkpoint-2-of-2").exists()
    code, _, said = torchrun(resume, tmp_path, 2)
    assert code == 0, said
    assert_same(pg.ChannelStatistics.load(tmp_path / "resumed-0"), collect(), rtol=1e-10)


def test_without_a_launcher_the_survivor_names_the_lost_process(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    alike = {"GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    first, second = (
        subprocess.Popen(
            [sys.executable, *part_command(join_and_die, tmp_path)],
            cwd=SURROUNDINGS["cwd"],
            env={**SURROUNDINGS["env"], **alike, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    )
    assert second.wait(timeout=600) == -signal.SIGKILL
    _, said = first.communicate(timeout=600)
    second.stderr.close()
    assert first.returncode == 1
    assert "rank 0: Process 2 of 2 died" in said


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    try:
        PARTS[sys.argv[1]](sys.argv[2], rank)
    except ParchGradError as error:
        sys.exit(f"rank {rank}: {error}")
