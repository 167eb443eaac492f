"""Reuse of leaves: those that stored blobs have already are copied instead of downloaded."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import suppress

from fedprune.blobs.blob_ref import leaf_digests
from fedprune.blobs.blob_store import BlobStore
from fedprune.blobs.partial_blob import PartialBlob
from fedprune.core.errors import StorageError

_LOG = logging.getLogger("fedprune.device")


def reuse_leaves(store: BlobStore, partial: PartialBlob) -> int:
    """Copy leaves that a blob lacks from stored blobs, instead of requesting them; returns their number.

    The next round's weights with frozen tensors differ from the last round's in a part only, and where both files have
    the same layout their leaves are equal. When a blob's leaf table comes, the tables of the stored blobs, 32 bytes for
    every 32 KiB, are searched for what it lacks. A copied leaf is hashed like one from the network, so that a donor may
    be damaged, or deleted meanwhile. Equal bytes that are shifted against the leaves' borders are not found.
    """
    missing = dict[bytes, list[int]]()
    for index, digest in enumerate(leaf_digests(partial.table or b"")):
        if not partial.present_leaves[index]:
            missing.setdefault(digest, []).append(index)
    count_before = partial.present_count
    for donor in store.names() if missing else ():
        for digest, leaf in _matching_leaves(store, donor, missing):
            if all(partial.write(index, leaf) for index in missing[digest]):  # all or none: their bytes are the same
                del missing[digest]
        if not missing:
            break
    if count := partial.present_count - count_before:
        _LOG.info("%d of %d leaves of blob %s were here", count, partial.ref.leaf_count, partial.ref.sha256[:12])
    return partial.present_count - count_before


def _matching_leaves(store: BlobStore, donor: str, missing: Collection[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Leaves of a stored blob that are missing elsewhere, with their digests."""
    with suppress(StorageError):  # deleted, or damaged
        for number, digest in enumerate(leaf_digests(store.table(donor))):
            if digest in missing:
                yield digest, store.read_leaves(donor, number, 1)
