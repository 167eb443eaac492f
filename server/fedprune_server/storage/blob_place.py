"""Where a job's blobs are: in its state folder or, as its settings say, in a bucket; and how they move there."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedprune.blobs.blob_store import BlobStore
from fedprune_server.storage.s3.bucket import FOLDER
from fedprune_server.storage.s3.store import BucketStore

log = logging.getLogger("fedprune.server")

BLOBS = "blobs"

# Key of a job's settings: the number by which its bucket knows it.
NUMBER = "bucket"


def place_of(settings: Mapping[str, Any] | None) -> str:
    """The address of a job's blobs, by its settings."""
    return str((settings or {}).get("server", {}).get("blobs") or FOLDER)


def number_of(settings: Mapping[str, Any] | None) -> str | None:
    """The number by which a bucket knows a job; None if its blobs have never been in one."""
    number = (settings or {}).get(NUMBER)
    return None if number is None else str(number)


def bucket_of(folder: Path, settings: Mapping[str, Any] | None) -> BucketStore | None:
    """The bucket that has a job's blobs, for reading; None if they are in the folder. Raises what `opened` raises."""
    address = place_of(settings)
    if address == FOLDER:
        return None
    store = BucketStore(folder / BLOBS, address, keeping=False)
    store.check_owner(number_of(settings))
    return store


def reader(folder: Path, settings: Mapping[str, Any] | None) -> BlobStore:
    """A job's blobs, for reading: the folder is not changed. Raises what `bucket_of` raises."""
    return bucket_of(folder, settings) or BlobStore(folder / BLOBS, sweep=False)


def opened(folder: Path, address: str, cache_bytes: int, settings: Mapping[str, Any] | None) -> BlobStore:
    """The store of a server; `cache` is how many bytes of a bucket's blobs the folder may hold. Raises `ConfigError` if
    the bucket has another job's blobs, and `MissingExtraError` if boto3 isn't installed."""
    if address == FOLDER:
        return BlobStore(folder / BLOBS)
    store = BucketStore(folder / BLOBS, address, cache=cache_bytes)
    store.check_owner(number_of(settings))
    return store


def new_number() -> str:
    return secrets.token_hex(16)


def move_in(folder: Path, store: BlobStore, settings: Mapping[str, Any], needed: Iterable[str]) -> None:
    """Copy the blobs that a job needs to its store, from the folder (after a restore, or where they were kept until
    now) or from another bucket. Raises `StorageError` if a blob is damaged.
    """
    local_store, missing = BlobStore(folder / BLOBS), [d for d in sorted(needed) if not store.has(d)]
    copied = 0
    for digest in [d for d in missing if local_store.has(d)]:
        store.put(local_store.read(digest))
        copied += 1
    missing = [d for d in missing if not store.has(d)]
    address = place_of(settings)
    if missing and address != FOLDER and store.describe() != address:
        previous_store = BucketStore(folder / BLOBS, address, keeping=False)
        previous_store.check_owner(number_of(settings))
        for digest in [d for d in missing if previous_store.has(d)]:
            store.put(previous_store.read(digest))
            copied += 1
    if copied:
        log.info("%d blobs were brought to %s", copied, store.describe())
