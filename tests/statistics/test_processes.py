import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import parchgrad as pg
from parchgrad.errors import StatisticsError
from parchgrad.statistics.batches import LeftOut
from parchgrad.statistics.collect import _check_agreement
from parchgrad.statistics.processes import Processes, is_first_process
from tests.conftest import small_network
from tests.statistics.test_accumulate import assert_same
from tests.statistics.test_checkpoint import DATA, collect

ROOT = Path(__file__).parents[2]


def without_every_second_batch():
    """All that the first of two processes takes is left out."""
    return [LeftOut(f"number {i} is gone") if i // 7 % 2 == 0 else DATA[i] for i in range(len(DATA))]


SCRIPT = """
import os, signal, sys
import torch
import parchgrad as pg
from parchgrad.errors import ParchGradError
from tests.conftest import small_network
from tests.statistics.test_checkpoint import DATA
from tests.statistics.test_processes import without_every_second_batch

rank, out, dying = int(os.environ["RANK"]), sys.argv[1], sys.argv[2]

def told(stage, done, total):
    if dying == "yes" and rank == 1 and done >= 14:
        os.kill(os.getpid(), signal.SIGKILL)

data = without_every_second_batch() if dying == "left" else DATA
try:
    found = pg.collect_statistics(
        small_network(), data, batch_size=7, labels=sys.argv[3], on_progress=told, checkpoint=out + ".checkpoint",
        checkpoint_every=1, seed=rank if dying == "seed" else 0,
    )
except ParchGradError as error:
    sys.exit(f"rank {rank}: {error}")
# Every process has the whole result.
found.save(f"{out}-{rank}")
"""


def launch(tmp_path, dying="no", labels="given", processes=2):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(script), str(tmp_path / "out"), dying, labels]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    # A session of their own, so that none is left where one hangs.
    run = subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        _, said = run.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        raise
    return run.returncode, said


@pytest.mark.slow
@pytest.mark.parametrize(("labels", "processes"), [("given", 2), ("predicted", 3)])
def test_processes_that_share_the_images_equal_one(tmp_path, labels, processes):
    code, said = launch(tmp_path, labels=labels, processes=processes)
    assert code == 0, said
    alone = collect(labels=labels)
    for rank in range(processes):
        found = pg.ChannelStatistics.load(tmp_path / f"out-{rank}")
        assert_same(found, alone, rtol=1e-10)
        assert torch.equal(found.sample.keys, alone.sample.keys)


@pytest.mark.slow
def test_a_process_that_dies_fails_the_run_and_resuming_works(tmp_path):
    code, said = launch(tmp_path, dying="yes")
    assert code != 0
    assert "Process 2 of 2 died" in said or "Signal 9 (SIGKILL)" in said
    assert not list(tmp_path.glob("out-[01]"))
    assert {path.name for path in tmp_path.glob("*.checkpoint")} >= {"out-2-of-2.checkpoint"}
    code, said = launch(tmp_path)
    assert code == 0, said
    assert_same(pg.ChannelStatistics.load(tmp_path / "out-0"), collect(), rtol=1e-10)


@pytest.mark.slow
def test_without_a_watchman_the_survivor_says_what_was_lost(tmp_path):
    joined = "import torch.distributed as dist\ndist.init_process_group('gloo')\n"
    (tmp_path / "run.py").write_text(joined + SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "out"), "yes", "given"]
    first, second = (
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    )
    assert second.wait(timeout=600) == -signal.SIGKILL
    _, said = first.communicate(timeout=600)
    second.stderr.close()
    assert first.returncode == 1
    assert "rank 0: Process 2 of 2 died" in said


@pytest.mark.slow
def test_a_process_of_which_all_is_left_out_takes_what_others_found(tmp_path):
    code, said = launch(tmp_path, dying="left")
    assert code == 0, said
    kept = [DATA[i] for i in range(len(DATA)) if i // 7 % 2]
    alone = pg.collect_statistics(small_network(), kept, batch_size=7)
    for rank in range(2):
        assert_same(pg.ChannelStatistics.load(tmp_path / f"out-{rank}"), alone, rtol=1e-10)


@pytest.mark.slow
def test_processes_must_be_called_alike(tmp_path):
    code, said = launch(tmp_path, dying="seed")
    assert code != 0
    assert re.search("process 2 .*seed was '0' and is '1'", said)


def test_a_process_on_its_own():
    alone = Processes()
    assert list(alone.gather({"a": torch.ones(2)})) == []
    assert alone.broadcast({"a": torch.ones(2)})["a"].tolist() == [1, 1]
    assert is_first_process()
    _check_agreement({"seed": "1"}, alone)


def test_the_agreement_names_what_differs():
    class Second(Processes):
        def broadcast(self, tensors):
            return {name: torch.tensor(list(b"other"), dtype=torch.uint8) for name in tensors}

    with pytest.raises(StatisticsError, match=r"process 2 .*: data was 'other' and is"):
        _check_agreement({"data": "mine"}, Second(rank=1, count=2))


def test_workers_load_the_same_images():
    assert_same(collect(workers=2, data=DATA), collect(), rtol=0)
