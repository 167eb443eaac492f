"""Virtual devices whose work is done ahead, several at a time, and handed over when its time comes.

A simulation asks for one device's outcome after the other, in the order of the virtual clock. What an offer asks for
depends on nothing that happens meanwhile, so a bench may work out all trainings that are under way together. Until an
outcome is asked for, nothing has happened: what the board keeps stays as it was, and its files lie aside.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from fedprune.blobs.blob_store import BlobStore
from fedprune_server.simulation.fleet.virtual_device import Bench, Outcome, VirtualDevice, Work

Done = tuple[Outcome, str | None]
"""An outcome, and the digest of what the board keeps from then on."""


class PreparedBench(Bench):
    """A bench that works ahead.

    Args:
        store: Where offers' blobs lie and updates are put.
        folder: A folder for scratch files.
        together: How many offers it is told of at once.
    """

    def __init__(self, store: BlobStore, folder: Path, together: int) -> None:
        super().__init__(store, folder)
        self.together = together
        self._held = BlobStore(folder / "held", durable=False)
        self._ready: dict[tuple[str, int, str], Done | Exception] = {}

    @abstractmethod
    def ahead(self, work: Sequence[Work]) -> Sequence[Done | Exception]:
        """Do all of this work; one piece's error is its own."""

    def prepare(self, work: Sequence[Work]) -> None:
        """Work out all offers; see `Bench.prepare`."""
        if self.together < 2:
            return
        for item, result in zip(work, self.ahead(work), strict=True):
            if not isinstance(result, Exception):
                # The simulation deletes blobs that nothing refers to, and nothing refers to these yet.
                for digest in filter(None, (result[0].weights.sha256, result[1])):
                    self._held.put(self._store.read(digest))
            self._ready[_key(*item)] = result

    def forget_but(self, under_way: Collection[tuple[str, int, str]]) -> None:
        """Let go of what will never be asked for; see `Bench.forget_but`."""
        for key in self._ready.keys() - under_way:
            del self._ready[key]
        self._tidy()

    def holds(self, device: VirtualDevice, offer: dict[str, Any], number: int) -> bool:
        """Whether an outcome waits to be handed over."""
        return _key(device, offer, number) in self._ready

    def carry_out(self, device: VirtualDevice, offer: dict[str, Any], number: int) -> Outcome:
        """Hand over what was prepared, or do what an offer asks of a device; see `Bench.carry_out`."""
        ready = self._ready.pop(_key(device, offer, number), None)
        if ready is None:
            return super().carry_out(device, offer, number)
        if isinstance(ready, Exception):
            raise ready
        outcome, board = ready
        for digest in filter(None, (outcome.weights.sha256, board)):
            self._store.put(self._held.read(digest))
        if board is not None:
            self.boards[device.name] = board
        self._tidy()
        return outcome

    def _tidy(self) -> None:
        waiting = [r for r in self._ready.values() if not isinstance(r, Exception)]
        needed = {digest for outcome, board in waiting for digest in (outcome.weights.sha256, board)}
        for name in self._held.names():
            if name not in needed:
                self._held.delete(name)


def _key(device: VirtualDevice, offer: dict[str, Any], number: int) -> tuple[str, int, str]:
    return device.name, number, offer["weights"]["sha256"]
