"""Distribute one collection over several processes with torch.distributed."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch import distributed as dist

from parchgrad.errors import StatisticsError

__all__ = ["Processes", "is_first_process", "joined_processes"]

# The first to finish waits for the slowest.
_PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Processes:
    """The processes of a run and the rank of this one.

    Attributes:
        rank: rank of this process, from zero.
        count: number of processes.
        group: their process group; None for a single process.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    def gather(self, tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Send tensors to the first process, which receives those of the others in turn.

        Raises:
            StatisticsError: if a process is lost.
        """
        for sender in range(1, self.count):
            if self.rank == sender:
                self._send(tensors, 0)
            elif self.rank == 0:
                yield self._receive(sender)

    def broadcast(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Send the tensors of the first process to all others.

        Raises:
            StatisticsError: if a process is lost.
        """
        if self.rank == 0:
            for receiver in range(1, self.count):
                self._send(tensors, receiver)
            return tensors
        return self._receive(0)

    def _send(self, tensors: Mapping[str, Tensor], receiver: int) -> None:
        content = torch.frombuffer(bytearray(save({k: v.contiguous() for k, v in tensors.items()})), dtype=torch.uint8)
        with self._waiting_for(receiver):
            dist.send(torch.tensor([content.numel()], device="cpu"), receiver, self.group)
            dist.send(content, receiver, self.group)

    def _receive(self, sender: int) -> dict[str, Tensor]:
        size = torch.zeros(1, dtype=torch.int64, device="cpu")
        with self._waiting_for(sender):
            dist.recv(size, sender, self.group)
            content = torch.empty(int(size), dtype=torch.uint8, device="cpu")
            dist.recv(content, sender, self.group)
        return load(content.numpy().tobytes())

    @contextmanager
    def _waiting_for(self, other: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise StatisticsError(
                f"Process {other + 1} of {self.count} died, which ended the run. Check its output and restart all "
                "processes; with a checkpoint they resume from there."
            ) from error


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes started by torchrun or of an initialised process group, if any.

    They exchange CPU tensors over gloo, whatever the backend of the group.
    """
    launched = dist.is_available() and not dist.is_initialized() and dist.is_torchelastic_launched()
    if launched:
        _join_launched()
    try:
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            yield Processes()
            return
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        try:
            yield Processes(rank=dist.get_rank(), count=dist.get_world_size(), group=group)
        finally:
            dist.destroy_process_group(group)
    finally:
        if launched:
            dist.destroy_process_group()


def _join_launched() -> None:
    # Missing from builds of torch without distributed processes.
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(rendezvous("env://", timeout=_PATIENCE))
    # The store keeps the addresses of the groups before, which gloo would try for this one.
    turn = store.add(f"parchgrad/{rank}", 1)
    store = PrefixStore(f"parchgrad/{turn}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=_PATIENCE)


def is_first_process() -> bool:
    """Whether this is the first process of torchrun, or a single process."""
    return not dist.is_available() or not dist.is_torchelastic_launched() or os.environ.get("RANK", "0") == "0"
