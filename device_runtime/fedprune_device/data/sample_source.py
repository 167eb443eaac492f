"""Where a board's samples come from."""

from __future__ import annotations

from typing import Protocol

from fedprune_device.data.dataset import LocalData, Shape


class SampleSource(Protocol):
    """Samples that may become more or other ones: each round takes those that there are when it begins."""

    @property
    def samples(self) -> int:
        """Training samples now; the agent's loop asks for it, so that it must be known already."""

    def snapshot(self, shape: Shape | None = None) -> LocalData:
        """The samples of a round.

        Args:
            shape: One sample's shape as the model takes it; names and None stand for any size.

        Raises:
            DataError: There is nothing to train on.
            StorageError: The disk fails.
        """
