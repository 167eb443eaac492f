"""Real data, read from `FEDPRUNE_DATA`."""

from __future__ import annotations

import os
from functools import cache

from fedprune.core.errors import DataError
from fedprune_server.simulation.datasets.samples import Samples
from fedprune_server.simulation.datasets.source import DATA_FOLDER_VARIABLE, read_samples


@cache
def samples(name: str) -> Samples:
    """A data set by its name, such as `cifar10`."""
    if not os.environ.get(DATA_FOLDER_VARIABLE):
        raise DataError(
            f"{DATA_FOLDER_VARIABLE} is not set", expected=f"a folder with {name}.npz (docs/reproduce-a-paper.md)"
        )
    return read_samples(name)
