"""Random generators keyed by their purpose, so that no order of events changes what they draw."""

from __future__ import annotations

import hashlib

import numpy as np


def keyed_generator(seed: int, *key: object) -> np.random.Generator:
    """A Philox generator that depends on nothing but `seed` and `key`, on every platform.

    The key names the purpose of the numbers, such as (round, device, "batches"); each part is taken as text.
    """
    # A separator that no name contains, so that ("a", "bc") and ("ab", "c") are different keys.
    digest = hashlib.sha256("\x1f".join([str(seed), *map(str, key)]).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
