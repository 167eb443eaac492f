"""What a feed looks up beside jobs: what couldn't be read is looked at again."""

from __future__ import annotations

from typing import Any

import pytest

from fedprune.errors import StorageError
from fedprune_server.console.surroundings import ReleaseWatch


class Busy:
    """Rollouts of which there are none, behind a disk that fails once."""

    fails = 1

    def version(self) -> int:
        return 7

    def latest(self) -> None:
        self.fails -= 1
        if self.fails == 0:
            raise StorageError("busy")


def test_rollouts_that_could_not_be_read_are_looked_at_again() -> None:
    store: Any = Busy()
    watch = ReleaseWatch(store)
    with pytest.raises(StorageError):
        watch.look()
    assert watch.look() == ()
    assert watch.look() is None
