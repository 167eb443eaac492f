"""A device of a simulation: a hardware profile, and samples that are in memory or read on use.

Data, training and evaluation are a board's own, on the files that an offer names, so a round gives the same bits as on
a board; only the time that it takes comes from the hardware profile.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination.events import DeviceBorn
from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.planning.cost_prediction import predict_costs
from fedprune.planning.prediction import Prediction
from fedprune.planning.profile import HardwareProfile
from fedprune.updates import CODECS
from fedprune_device.data.dataset import SPLITS, LocalData
from fedprune_device.data.stored_array import StoredArray


@dataclass(frozen=True)
class StoredData:
    """Samples that are read on use: those of a thousand devices don't fit in memory."""

    samples: int
    fingerprint: str
    load: Callable[[], LocalData]

    @classmethod
    def of(cls, load: Callable[[], LocalData]) -> StoredData:
        """Read the samples once, for their number and fingerprint. Raises `DataError` if it can't be read."""
        data = load()
        return cls(data.samples, samples_digest(data), load)


@dataclass(frozen=True)
class Outcome:
    """A device's announcement after its training."""

    weights: BlobRef
    samples: int
    steps: int
    metrics: dict[str, float]


# What a hostile board announces instead of its outcome, by the offer; weights are in the store, and are put there.
Tamper = Callable[[Outcome, Mapping[str, Any], BlobStore], Outcome]


@dataclass(frozen=True)
class VirtualDevice:
    """A board that exists as a profile and data. In studies of attacks it may `tamper` with its updates."""

    name: str
    profile: HardwareProfile
    data: LocalData | StoredData
    tamper: Tamper | None = None

    @property
    def samples(self) -> int:
        return self.data.samples

    @cached_property
    def fingerprint(self) -> str:
        return self.data.fingerprint if isinstance(self.data, StoredData) else samples_digest(self.data)

    def birth(self, session: int, profile: dict[str, Any], *, is_last_of_batch: bool = True) -> DeviceBorn:
        """Its announcement, with its profile as JSON, which boards of a kind share."""
        return DeviceBorn(self.name, session, profile, self.samples, None, CODECS, is_last_of_batch)

    def load(self) -> LocalData:
        """Its samples. Raises `DataError` if they can't be read."""
        return self.data.load() if isinstance(self.data, StoredData) else self.data

    def predict(self, architecture: Architecture, widths: tuple[int, ...], recipe: Recipe) -> Prediction:
        """What the planner expects a round to take."""
        return predict_costs(architecture, widths, self.profile, recipe, self.samples)


def profiles_by_kind(devices: Iterable[VirtualDevice]) -> dict[int, dict[str, Any]]:
    """The profiles as JSON, by the identity of the objects that devices share: copies would fill the memory."""
    return {key: profile.to_dict() for key, profile in {id(d.profile): d.profile for d in devices}.items()}


def samples_digest(data: LocalData) -> str:
    """Digest of a device's samples and labels with their types and shapes."""
    digest = hashlib.sha256()
    for name in (f"{kind}_{split}" for split in SPLITS for kind in "xy"):
        array = getattr(data, name)
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        for chunk in array.chunks() if isinstance(array, StoredArray) else (array,):
            digest.update(np.ascontiguousarray(chunk).data)
    return digest.hexdigest()
