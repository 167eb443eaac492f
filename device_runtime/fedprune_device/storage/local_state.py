"""What a board keeps of its own between rounds: the moving average of its weights, personal tensors, the part that its
last update left out, and the optimiser's state.

A store (`state_store`) has two records at most: the newest, and the one that the newest was made from. A round that is
repeated (a power cut, a lost update, another attempt) begins with the same record both times and gives the same bits.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core import tensorfile
from fedprune.core.errors import BundleError, StorageError
from fedprune.model.element_mask import mask_from_bits, mask_to_bits
from fedprune.model.selection import ElementMask, Tensors
from fedprune.wire.messages import Offer
from fedprune_device.storage.state_store import StateStore

_LOG = logging.getLogger("fedprune.device")

_FORMAT = "fedprune.own/1"
_HEAD_TENSOR, _DIGEST_TENSOR = "record", "sha256"
_FIELDS = (
    "job", "seed", "architecture", "selection", "ranking", "widths", "round", "optimizer", "steps", "received_share",
)  # fmt: skip
_TENSOR_KINDS = ("average", "personal", "residual", "moments")


@dataclass(frozen=True, eq=False)
class LocalState:
    """The state after a round, in the coordinates of a selection.

    `ranking` is the digest of the order of channels that the selection begins, None where that is unknown; `widths` are
    kept channels per group. `average` is empty without one; `mask` tells which of its elements are active.
    `residual` is what the encoded update left out of its tensors. `moments` is the state of `optimizer`, by the
    names of `fedprune.model.step_contract`, after `steps` steps since it was zero. `received_share`
    is that of the received weights in the model that serves, where validation samples have chosen it.
    """

    job: str
    seed: int
    architecture: str
    selection: str
    ranking: str | None
    widths: tuple[int, ...]
    round: int
    average: Tensors = field(default_factory=dict)
    personal: Tensors = field(default_factory=dict)
    mask: ElementMask = field(default_factory=dict)
    residual: Tensors = field(default_factory=dict)
    moments: Tensors = field(default_factory=dict)
    optimizer: str = ""
    steps: int = 0
    received_share: float | None = None

    @classmethod
    def of(cls, offer: Offer, average: Tensors, personal: Tensors, mask: ElementMask, **further: Any) -> LocalState:
        """The state after an offer's round; `further` are attributes by their names."""
        run = offer.job, offer.seed, offer.architecture
        return cls(*run, offer.selection, offer.ranking, offer.widths, offer.round, average, personal, mask, **further)

    def precedes(self, offer: Offer) -> bool:
        """Whether it was left by an earlier round of the same run."""
        run, offered_run = ((o.job, o.seed, o.architecture) for o in (self, offer))
        return run == offered_run and self.round < offer.round

    def with_personal(self, offer: Offer, tensors: Mapping[str, npt.NDArray[np.float32]]) -> Tensors:
        """Received tensors with the board's personal ones in the place of theirs, where they still fit."""
        if self.selection != offer.selection:
            return dict(tensors)
        fitting = {n: v for n, v in self.personal.items() if n in tensors and v.shape == tensors[n].shape}
        return {**tensors, **fitting}

    def to_bytes(self) -> bytes:
        arrays: dict[str, npt.NDArray[Any]]
        arrays = {f"{p}/{n}": v for p in _TENSOR_KINDS for n, v in getattr(self, p).items()}
        arrays |= {f"mask/{n}": v for n, v in mask_to_bits(self.mask).items() if n in self.average}
        head = {n: getattr(self, n) for n in _FIELDS} | {"format": _FORMAT}
        text = json.dumps(head, sort_keys=True).encode()
        digest = np.frombuffer(_digest(text, arrays), np.uint8)
        return tensorfile.encode({_HEAD_TENSOR: np.frombuffer(text, np.uint8), _DIGEST_TENSOR: digest, **arrays})

    @classmethod
    def from_bytes(cls, data: bytes) -> LocalState:
        try:
            arrays = tensorfile.decode(data)
            text, digest = arrays.pop(_HEAD_TENSOR).tobytes(), arrays.pop(_DIGEST_TENSOR).tobytes()
            if _digest(text, arrays) != digest:
                raise ValueError("the digest is another")
            head = json.loads(text)
            if head.pop("format") != _FORMAT:
                raise ValueError("another format")
            tensors_by_part: dict[str, dict[str, npt.NDArray[Any]]] = {k: {} for k in (*_TENSOR_KINDS, "mask")}
            for name, value in arrays.items():
                kind, _, tensor = name.partition("/")
                tensors_by_part[kind][tensor] = value
            shapes = {n: v.shape for n, v in tensors_by_part["average"].items()}
            mask = mask_from_bits(tensors_by_part["mask"], shapes)
            head["widths"] = tuple(head["widths"])
            return cls(**{**head, **{p: tensors_by_part[p] for p in _TENSOR_KINDS}, "mask": mask})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, BundleError) as error:
            raise StorageError(f"what the board keeps of its own is damaged ({error})") from error


def _digest(text: bytes, arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    digest = hashlib.sha256(text)
    for name, value in arrays.items():
        digest.update(json.dumps([name, value.dtype.str, value.shape]).encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.digest()


class RoundState:
    """The local state that an offer's round begins with (`base`), and the store of the state that the round leaves."""

    def __init__(self, states: StateStore, offer: Offer) -> None:
        self._states = states
        self._slot: str | None = None
        self.base: LocalState | None = None
        for slot, data in sorted(states.read().items()):
            try:
                state = LocalState.from_bytes(data)
            except StorageError as error:
                _LOG.warning("%s: going on without it", error)
                continue
            if state.precedes(offer) and (self.base is None or state.round > self.base.round):
                self._slot, self.base = slot, state

    def release(self) -> None:
        """Forget what the round began with; it stays in the store."""
        self.base = None

    def stage(self, state: LocalState) -> None:
        self._states.stage(state.to_bytes())

    def commit(self) -> None:
        """Make the staged state current, and keep the state that the round began with."""
        self._states.commit(self._slot)
