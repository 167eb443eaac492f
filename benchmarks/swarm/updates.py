"""What devices hand in: the weights that they were offered, noise that is keyed by device and round, and a mark.

Every device adds 1 to a coordinate of its own. So the global model shows of each single device how often its update
was counted, and whoever knows the seeds can say what that model must be.
"""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from fedprune.blobs.blob_ref import BlobRef, leaf_table
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import BundleError
from fedprune.core.rng import keyed_generator

NOISE = 0.01
MARK = np.float32(1)
_KEPT = 64


def device_name(index: int) -> str:
    """What the fleet's device of this number is called."""
    return f"board-{index:05}"


def begin_of_data(raw: bytes) -> int:
    """Where the numbers of a tensor file begin."""
    return 8 + int.from_bytes(raw[:8], "little")


def flat(raw: bytes) -> npt.NDArray[np.float32]:
    """All numbers of a tensor file of float32 tensors, one after the other."""
    return np.frombuffer(raw, np.float32, offset=begin_of_data(raw))


def trained(base: npt.NDArray[np.float32], index: int, round_: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """What a device makes of the weights that it was offered.

    Raises:
        BundleError: The model has fewer numbers than the fleet has devices.
    """
    if index >= base.size:
        raise BundleError("model for a swarm", expected=f"more than {index} numbers", got=base.size)
    noise = keyed_generator(seed, "swarm", index, round_).standard_normal(base.size, np.float32)
    out: npt.NDArray[np.float32] = base + np.float32(NOISE) * noise
    out[index] += MARK
    return out


def update_file(weights: bytes, index: int, round_: int, seed: int = 0) -> bytes:
    """A device's update as a tensor file: the tensors of the weights that it was offered, trained."""
    return weights[: begin_of_data(weights)] + trained(flat(weights), index, round_, seed).tobytes()


def mean(
    weights: bytes, parts: Iterable[tuple[int, int]], round_: int, seed: int = 0
) -> tuple[npt.NDArray[np.float64], int]:
    """The global model that a round must lead to, and all samples, by numpy alone: the mean of updates, weighted by
    samples. `weights` is the tensor file that all were offered; `parts` are number and samples of devices whose updates
    count."""
    base = flat(weights)
    total, samples = np.zeros(base.size), 0
    for index, count in parts:
        total += np.float64(count) * trained(base, index, round_, seed)
        samples += count
    return total / samples, samples


class Remade(BlobStore):
    """Updates that are made again when they are wanted: ten thousand of them would be a gigabyte."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._recipes: dict[str, tuple[bytes, int, int]] = {}
        self._files: OrderedDict[str, bytes] = OrderedDict()

    def make(self, weights: bytes, index: int, round_: int) -> BlobRef:
        """Make an update, and remember how."""
        raw = update_file(weights, index, round_, self._seed)
        ref = BlobRef.of(raw)
        self._recipes[ref.sha256] = (weights, index, round_)
        self._keep(ref.sha256, raw)
        return ref

    def forget(self, sha256: str) -> None:
        """It is accepted: nobody wants it any more."""
        self._recipes.pop(sha256, None)
        self._files.pop(sha256, None)

    def has(self, sha256: str) -> bool:
        """Whether the update is known."""
        return sha256 in self._recipes

    def table(self, sha256: str) -> bytes:
        """Its leaf table."""
        return leaf_table(self._file(sha256))

    def open(self, sha256: str) -> io.BytesIO:
        """Its bytes, to be read in pieces."""
        return io.BytesIO(self._file(sha256))

    def _file(self, sha256: str) -> bytes:
        raw = self._files.get(sha256)
        if raw is None:
            raw = update_file(*self._recipes[sha256], self._seed)
            assert hashlib.sha256(raw).hexdigest() == sha256
            self._keep(sha256, raw)
        return raw

    def _keep(self, sha256: str, raw: bytes) -> None:
        self._files[sha256] = raw
        if len(self._files) > _KEPT:
            self._files.popitem(last=False)
