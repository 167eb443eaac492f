"""A device in a simulation: real data and real training, on a virtual clock and a virtual link.

Training and evaluation are the board's own code on the very files that an offer names, so a round gives the same bits
as on a board; only the time that it takes comes from the hardware profile.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.planning.cost_prediction import predict
from fedprune.planning.profile import HardwareProfile
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.stored_array import StoredArray

_BLOBS = ("weights", "training", "inference")
"""Entries of an offer that refer to blobs."""


def pulls(offer: Mapping[str, Any], held: Collection[str]) -> dict[str, int]:
    """What a board needs for an offer: bytes on its way to it, by the digest of what it has then.

    Args:
        offer: The offer's entries.
        held: What the board holds already; weights that it can decode with that are as short as they come.
    """
    refs = [offer[k] for k in (*_BLOBS, "mask", "moved") if offer.get(k)]
    pulled, coded = {r["sha256"]: int(r["size"]) for r in refs}, offer.get("coded")
    if coded and offer.get("held", coded["sha256"]) in (*held, coded["sha256"]):
        pulled[offer["weights"]["sha256"]] = int(coded["size"])
    return pulled


@dataclass(frozen=True)
class StoredData:
    """Samples that are read when they are needed, and forgotten afterwards: a thousand devices' don't fit in memory."""

    samples: int
    fingerprint: str
    load: Callable[[], LocalData]

    @classmethod
    def of(cls, load: Callable[[], LocalData]) -> StoredData:
        """Look once at what a function reads.

        Raises:
            DataError: It can't be read.
        """
        data = load()
        return cls(data.samples, fingerprint(data), load)


@dataclass(frozen=True)
class VirtualDevice:
    """A board that exists as a profile and data."""

    name: str
    profile: HardwareProfile
    data: LocalData | StoredData

    @property
    def samples(self) -> int:
        """Training samples."""
        return self.data.samples

    @cached_property
    def fingerprint(self) -> str:
        """Digest of its samples and labels."""
        return self.data.fingerprint if isinstance(self.data, StoredData) else fingerprint(self.data)

    def load(self) -> LocalData:
        """Its samples.

        Raises:
            DataError: They can't be read.
        """
        return self.data.load() if isinstance(self.data, StoredData) else self.data

    def train_s(self, architecture: Architecture, widths: tuple[int, ...], recipe: Recipe) -> float:
        """Seconds that the planner expects the training of a round to take."""
        return predict(architecture, widths, self.profile, recipe, self.samples).train_s


def fingerprint(data: LocalData) -> str:
    """Digest of a device's samples and labels with their types and shapes."""
    digest = hashlib.sha256()
    for field in fields(data):
        array = getattr(data, field.name)
        if array is not None:  # a split that there is not
            digest.update(json.dumps([field.name, array.dtype.str, array.shape]).encode())
            for chunk in array.chunks() if isinstance(array, StoredArray) else (array,):
                digest.update(np.ascontiguousarray(chunk).data)
    return digest.hexdigest()
