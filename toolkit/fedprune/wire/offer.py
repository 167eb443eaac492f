"""A server's offer of a round to a device: numbers, a recipe, and references to all the blobs that it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fedprune.blobs.blob_ref import BlobRef
from fedprune.wire.checked_message import CheckedMessage, newer
from fedprune.wire.fields import (
    Blob,
    Count,
    Digest,
    FreeObject,
    Items,
    Job,
    Name,
    Round,
    WebAddress,
    text,
    whole,
)

_MOST_PRECISIONS = 8
_MOST_BLOCKS = 8
_MOST_SLABS = 32


@dataclass(frozen=True)
class Offer(CheckedMessage, kind="offer"):
    """An offer of a round to a device."""

    job: Job
    round: Round
    attempt: Count
    """Number of this offer to this device in this round."""
    seed: Count
    """The job's seed."""
    architecture: Digest
    """Digest of the architecture."""
    selection: Digest
    """Digest of the device's selection."""
    widths: Annotated[tuple[Annotated[int, whole(1, 2**24)], ...], Items(65536, "numbers")]
    """Kept channels per group."""
    classes: Annotated[int, whole(1, 2**24)]
    """Number of classes."""
    weights: Blob
    """The submodel's weights."""
    training: Blob
    """The training graph of standard operators, which every board runs."""
    inference: Blob
    """The inference graph, whose external data the weights are."""
    recipe: FreeObject
    """The recipe, as `fedprune.model.recipe.Recipe.to_offer` gives it."""
    mask: Blob | None = newer()
    """Which elements are active (`ElementMask.to_tensors`): of masked tensors `weights` has the active values alone,
    and so has the update. None where all are."""
    ranking: Digest | None = newer()
    """Digest of the order of channels that the selection is the beginning of. Selections of other widths with the same
    digest are nested. None where nothing is known of it."""
    lowered: Annotated[dict[Name, Blob], Items(_MOST_PRECISIONS, "blobs")] | None = newer()
    """By precision, the graphs with which the board can serve at it (`fedprune.runtime.precision.packed`). None where
    there are none."""
    blocked: Annotated[dict[Name, Blob], Items(_MOST_BLOCKS, "blobs")] | None = newer()
    """By channels of a block, training graphs for boards that compute so many at once (`fedprune.runtime.blocks`), at
    these widths alone. A board pulls the one that it can use instead of `training`. None where there are none."""
    slabs: Annotated[tuple[Blob, ...], Items(_MOST_SLABS, "blobs", least=1)] | None = newer()
    """What `weights` can be made of instead of being pulled (`fedprune.updates.width_deltas`): the narrowest submodel's
    file, and what each wider one adds to it, up to this one. Other devices pull the same blobs. None where there are
    none."""
    codec: Annotated[str, text(256)] | None = newer()
    """How the update is to be encoded (`fedprune.updates.Codec`); None for a plain tensor file."""
    weights_codec: Annotated[str, text(256)] | None = newer()
    """How weights come where they come encoded; a board keeps those that it has until the next offer."""
    coded: Blob | None = newer()
    """The weights so encoded: a board that has what they are the difference to may pull this instead."""
    held: Digest | None = newer()
    """sha256 of what they are the difference to; None for the difference to 0."""
    moved: Blob | None = newer()
    """Where channels lie that a device was sent last (`fedprune.updates.remap`); None where they lie as they did, or
    where nothing is known of that."""
    moved_from: Digest | None = newer()
    """Digest of the selection that those were sent in."""
    blobs_at: WebAddress | None = newer()
    """A web server that has these blobs, too (`fedprune.wire.blob_url`); None for MQTT alone."""

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
        """What must be pulled where weights that are lacking can be decoded instead; `has` tells whether a blob is
        here, by its digest."""
        if self.coded is None or has(self.weights.sha256) or not (self.held is None or has(self.held)):
            return self.blobs()
        return tuple(self.coded if r == self.weights else r for r in self.blobs())
