import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

from parchgrad.errors import StatisticsError
from parchgrad.statistics.collect import _check_agreement
from parchgrad.statistics.processes import Processes, is_first_process
from tests.support import DATA, assert_same, collect, small_network


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


class Threads(Processes):
    """Threads instead of processes, which exchange tensors through queues."""

    def _send(self, tensors, receiver):
        self.group[self.rank, receiver].put(dict(tensors))

    def _receive(self, sender):
        return self.group[sender, self.rank].get(timeout=60)


@pytest.mark.parametrize("labels", ["given", "predicted"])
def test_two_shares_equal_the_whole(monkeypatch, labels):
    local, models = threading.local(), [small_network() for _ in range(2)]
    queues = {pair: queue.Queue() for pair in ((0, 1), (1, 0))}
    joined = "parchgrad.statistics.collect.joined_processes"
    monkeypatch.setattr(joined, lambda: nullcontext(Threads(local.rank, 2, queues)))

    def share(rank):
        local.rank = rank
        return collect(model=models[rank], labels=labels)

    with ThreadPoolExecutor(2) as pool:
        shares = list(pool.map(share, range(2)))
    monkeypatch.undo()
    for found in shares:
        assert_same(found, collect(labels=labels), rtol=1e-10)
