"""What a server asks a device to train: numbers, a recipe, and references to all the blobs that it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedprune.blobs.blob_ref import BlobRef
from fedprune.wire import validation as check
from fedprune.wire.blob_url import check_blob_url
from fedprune.wire.checked_message import CheckedMessage
from fedprune.wire.validation import Check

_MOST_PRECISIONS = 8
_MOST_BLOCKS = 8
_MOST_SLABS = 32
_CODING = ("codec", "weights_codec", "coded", "held", "moved", "moved_from")


@dataclass(frozen=True)
class Offer(CheckedMessage):
    """What a device is asked to train.

    Attributes:
        job: The job.
        round: The round.
        attempt: Number of this offer to this device in this round.
        seed: The job's seed.
        architecture: Digest of the architecture.
        selection: Digest of the device's selection.
        widths: Kept channels per group.
        classes: Number of classes.
        weights: The submodel's weights.
        training: The training graph of standard operators, which every board runs.
        inference: The inference graph, whose external data the weights are.
        recipe: The recipe, as `fedprune.training.recipe.Recipe.to_offer` gives it.
        mask: Which elements are active (`ElementMask.to_tensors`): of masked tensors `weights` has the active
            values alone, and so has the update. None where all are.
        ranking: Digest of the order of channels that the selection is the beginning of. Selections of other widths
            with the same digest are nested. None where nothing is known of it.
        lowered: By precision, the graphs with which the board can serve at it (`fedprune.runtime.precision.packed`).
            None where there are none.
        blocked: By channels of a block, training graphs for boards that compute so many at once
            (`fedprune.runtime.blocks`), at these widths alone. A board pulls the one that it can use instead of
            `training`. None where there are none.
        slabs: What `weights` can be made of instead of being pulled (`fedprune.codec.width_deltas`): the narrowest
            submodel's file, and what each wider one adds to it, up to this one. Other devices pull the same blobs. None
            where there are none.
        codec: How the update is to be encoded (`fedprune.codec.Codec`); None for a plain tensor file.
        weights_codec: How weights come where they come encoded; a board keeps those that it has until the next offer.
        coded: The weights so encoded: a board that has what they are the difference to may pull this instead.
        held: sha256 of what they are the difference to; None for the difference to 0.
        moved: Where channels lie that a device was sent last (`fedprune.codec.remap`); None where they lie as
            they did, or where nothing is known of that.
        moved_from: Digest of the selection that those were sent in.
        blobs_at: A web server that has these blobs, too (`fedprune.wire.blob_url`); None for MQTT alone.
    """

    job: str
    round: int
    attempt: int
    seed: int
    architecture: str
    selection: str
    widths: tuple[int, ...]
    classes: int
    weights: BlobRef
    training: BlobRef
    inference: BlobRef
    recipe: dict[str, Any]
    mask: BlobRef | None = None
    ranking: str | None = None
    lowered: dict[str, BlobRef] | None = None
    blocked: dict[str, BlobRef] | None = None
    slabs: tuple[BlobRef, ...] | None = None
    codec: str | None = None
    weights_codec: str | None = None
    coded: BlobRef | None = None
    held: str | None = None
    moved: BlobRef | None = None
    moved_from: str | None = None
    blobs_at: str | None = None

    kind: ClassVar[str] = "offer"
    newer: ClassVar[frozenset[str]] = frozenset(
        {"mask", "ranking", "lowered", "blocked", "slabs", "blobs_at", *_CODING}
    )
    checks: ClassVar[Mapping[str, Check]] = {
        "job": check.job,
        "round": check.whole(),
        "attempt": check.whole(),
        "seed": check.whole(),
        "architecture": check.digest,
        "selection": check.digest,
        "widths": check.wholes(65_536, 1, 2**24),
        "classes": check.whole(1, 2**24),
        "weights": check.blob,
        "training": check.blob,
        "inference": check.blob,
        "recipe": check.plain,
        "mask": check.optional(check.blob),
        "ranking": check.optional(check.digest),
        "lowered": check.optional(check.blobs(_MOST_PRECISIONS)),
        "blocked": check.optional(check.blobs(_MOST_BLOCKS)),
        "slabs": check.optional(check.blob_list(_MOST_SLABS)),
        "codec": check.optional(check.text(256)),
        "weights_codec": check.optional(check.text(256)),
        "coded": check.optional(check.blob),
        "held": check.optional(check.digest),
        "moved": check.optional(check.blob),
        "moved_from": check.optional(check.digest),
        "blobs_at": check.optional(check_blob_url),
    }

    @property
    def graphs(self) -> tuple[BlobRef, ...]:
        """The graphs that are used: a device leaves in `blocked` what it can use, at most one."""
        more = (*(self.blocked or {}).values(), *(self.lowered or {}).values())
        return (self.training, self.inference, *more)

    def blobs(self) -> tuple[BlobRef, ...]:
        """What must be there for it, graphs first."""
        more = [blob for blob in (self.mask, self.moved) if blob is not None]
        return (*self.graphs, self.weights, *more)

    def shorter(self, has: Callable[[str], bool]) -> tuple[BlobRef, ...]:
        """What must be pulled for it where weights that are lacking can be decoded instead.

        Args:
            has: Whether a blob is there, by its digest.
        """
        if self.coded is None or has(self.weights.sha256) or not (self.held is None or has(self.held)):
            return self.blobs()
        return tuple(self.coded if r == self.weights else r for r in self.blobs())
