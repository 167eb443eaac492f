"""Opens the store of a job's blobs (in its state folder, or the bucket of its settings), and copies blobs into it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedprune.blobs.blob_store import BlobStore
from fedprune_server.storage.s3.bucket import IN_FOLDER
from fedprune_server.storage.s3.store import BucketStore

log = logging.getLogger("fedprune.server")

BLOBS_FOLDER = "blobs"

# Key of a job's settings that holds the number by which its bucket knows the job: two jobs may have one name.
NUMBER_KEY = "bucket"


def blobs_address(settings: Mapping[str, Any] | None) -> str:
    """The address of a job's blobs, from its settings."""
    return str((settings or {}).get("server", {}).get("blobs") or IN_FOLDER)


def bucket_number(settings: Mapping[str, Any] | None) -> str | None:
    """The number by which a bucket knows a job; None if its blobs have never been in one."""
    number = (settings or {}).get(NUMBER_KEY)
    return None if number is None else str(number)


def open_bucket(folder: Path, settings: Mapping[str, Any] | None) -> BucketStore | None:
    """The bucket that has a job's blobs, for reading; None if they are in the folder. Raises as `open_blobs`."""
    address = blobs_address(settings)
    if address == IN_FOLDER:
        return None
    store = BucketStore(folder / BLOBS_FOLDER, address, caching=False)
    store.check_owner(bucket_number(settings))
    return store


def open_blobs_reader(folder: Path, settings: Mapping[str, Any] | None) -> BlobStore:
    """A job's blobs, for reading: the folder is not changed. Raises what `open_bucket` raises."""
    return open_bucket(folder, settings) or BlobStore(folder / BLOBS_FOLDER, sweep=False)


def open_blobs(folder: Path, address: str, cache_bytes: int, settings: Mapping[str, Any] | None) -> BlobStore:
    """The store of a server's job; the folder caches a bucket's blobs up to `cache_bytes`. Raises `ConfigError` if the
    bucket has another job's blobs, and `MissingExtraError` if boto3 isn't installed."""
    if address == IN_FOLDER:
        return BlobStore(folder / BLOBS_FOLDER)
    store = BucketStore(folder / BLOBS_FOLDER, address, cache=cache_bytes)
    store.check_owner(bucket_number(settings))
    return store


def copy_needed_blobs(folder: Path, store: BlobStore, settings: Mapping[str, Any], needed: Iterable[str]) -> None:
    """Copy the blobs that a job needs into its store: from the folder (after a restore, or where they have been until
    now), or from the bucket of the stored settings. Raises `StorageError` if a blob is damaged.
    """
    local_store = BlobStore(folder / BLOBS_FOLDER)
    missing = [digest for digest in sorted(needed) if not store.has(digest)]
    copied = 0
    for digest in [digest for digest in missing if local_store.has(digest)]:
        store.put(local_store.read(digest))
        copied += 1
    missing = [digest for digest in missing if not store.has(digest)]
    address = blobs_address(settings)
    if missing and address != IN_FOLDER and store.describe() != address:
        previous_store = BucketStore(folder / BLOBS_FOLDER, address, caching=False)
        previous_store.check_owner(bucket_number(settings))
        for digest in [digest for digest in missing if previous_store.has(digest)]:
            store.put(previous_store.read(digest))
            copied += 1
    if copied:
        log.info("%d blobs were brought to %s", copied, store.describe())
