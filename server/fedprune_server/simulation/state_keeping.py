"""Where a simulation's state is kept, and when: in a folder that is one process's own meanwhile, or nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedprune.coordination import State
from fedprune_server.simulation.save_interval import Rhythm
from fedprune_server.simulation.state import SimulationState, held


class Keeping:
    """Keeps a simulation's state.

    Args:
        folder: Where; None for nowhere.
        fingerprint: Of all that decides the run.
        rounds: After how many rounds the run ends.
    """

    def __init__(self, folder: Path | None, fingerprint: str, rounds: int) -> None:
        self._folder, self._fingerprint, self._rounds = folder, fingerprint, rounds
        self._rhythm = Rhythm()
        self._stamp: tuple[int, ...] | None = None

    def load(self) -> tuple[SimulationState, State] | None:
        """What was kept last, the coordinator's state with it; None where nothing was.

        Raises:
            StorageError: It is damaged, or of another simulation.
        """
        if self._folder is None:
            return None
        self._stamp = SimulationState.stamp(self._folder)
        return SimulationState.load(self._folder, self._fingerprint, self._rounds)

    @contextmanager
    def held(self) -> Iterator[bool]:
        """The folder is this process's own meanwhile.

        Yields:
            Whether something was kept there since `load`, by this process or another.

        Raises:
            StorageError: Another process has it, or the disk fails.
        """
        if self._folder is None:
            yield False
            return
        with held(self._folder):
            changed = SimulationState.stamp(self._folder) != self._stamp
            try:
                yield changed
            finally:
                self._stamp = ()  # what is in memory may be ahead of what was saved

    def due(self, *, ended: bool) -> bool:
        """Whether it is time to save, and to delete what is needed no more.

        Args:
            ended: Whether a round has just ended.
        """
        return ended if self._folder is None else self._rhythm.due(ended=ended)

    def save(self, run: SimulationState, state: State) -> None:
        """Save a run, and the coordinator's state with it.

        Raises:
            StorageError: The disk fails or is full.
        """
        folder = self._folder
        if folder is not None:
            self._rhythm.save(lambda: run.save(folder, state, self._fingerprint))
