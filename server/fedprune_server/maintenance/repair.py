"""Repairs what a check has found, as far as nothing is lost that the job needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from fedprune.blobs.blob_store import BlobStore
from fedprune.core.disk import flush_folder, storage_errors
from fedprune.core.errors import StorageError
from fedprune.core.text import quantity
from fedprune_server.maintenance.finding import Finding, Repair
from fedprune_server.storage.blob_place import BLOBS_FOLDER, open_bucket
from fedprune_server.storage.s3.bucket import BLOBS_PREFIX as OBJECTS
from fedprune_server.storage.s3.store import BucketStore
from fedprune_server.storage.storage import Storage

# Folder next to `blobs` for files that were set aside: somebody may recover from a damaged one what no backup has.
DAMAGED_FOLDER = "damaged"


def repair(folder: Path, findings: Iterable[Finding], backup: Path | None) -> Iterator[str]:
    """Delete what is not needed, set damaged blobs aside, and fetch what a backup has; yields what was done.

    The caller holds the folder's lock, so that no server runs on it.
    """
    bucket = open_bucket(folder, Storage.read_settings(folder))
    # The folder has copies of a bucket's blobs, which may be undamaged.
    source_folders = ([] if bucket is None else [folder]) + ([] if backup is None else [backup])
    sources = [BlobStore(path / BLOBS_FOLDER) for path in source_folders if (path / BLOBS_FOLDER).is_dir()]
    for finding in findings:
        if bucket is not None:
            yield from _repair_objects(bucket, finding, folder / DAMAGED_FOLDER)
        if finding.repair is Repair.DELETE and finding.paths:
            for path in finding.paths:
                with storage_errors(f"can't delete {path}"):
                    path.unlink(missing_ok=True)
            yield f"deleted {quantity(len(finding.paths), 'file')}, such as {finding.paths[0]}"
        if finding.repair is Repair.SET_ASIDE:
            for path in finding.paths:
                yield f"moved {path} to {_set_aside(folder, path)}"
        if finding.repair in (Repair.SET_ASIDE, Repair.FETCH):
            # A path is <store>/<two digits>/<sha256>: the blob goes back into the store where it was damaged.
            root = finding.paths[0].parent.parent if finding.paths else folder / BLOBS_FOLDER
            target = BlobStore(root) if bucket is None or finding.paths else bucket
            for source in sources:
                with suppress(StorageError):  # this source lacks it, or has a damaged one, too
                    target.put(source.read(finding.blob))
                    yield f"took blob {finding.blob} from {source.root}"


def _set_aside(folder: Path, path: Path) -> Path:
    target = folder / DAMAGED_FOLDER / path.name
    with storage_errors(f"can't move {path}"):
        target.parent.mkdir(mode=0o700, exist_ok=True)
        path.replace(target)
        # The new name before the old one's absence: after a power cut the file is in one folder at least.
        flush_folder(target.parent)
        flush_folder(path.parent)
    return target


def _repair_objects(store: BucketStore, finding: Finding, damaged_folder: Path) -> Iterator[str]:
    """Delete a finding's objects from the bucket, those that the job needs after a copy to `damaged_folder`; yields
    what was done. Only findings to delete or to set aside have keys."""
    for key in finding.keys:
        if finding.repair is Repair.SET_ASIDE:
            data = store.bucket.get(key, store.max_size)
            if data is None:
                raise StorageError(f"{store.bucket.url}/{key} is gone", hint="Check again.")
            damaged_folder.mkdir(mode=0o700, exist_ok=True)
            store.write_file(damaged_folder / key.removeprefix(OBJECTS), data)
            yield f"laid {key} in {damaged_folder}"
        store.forget(key)
        store.bucket.delete([key])
    if finding.keys:
        yield f"deleted {len(finding.keys)} objects, such as {store.bucket.url}/{finding.keys[0]}"
