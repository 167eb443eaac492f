"""Checks a job's blobs, in its folder or its bucket: what is missing, damaged or left over."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedprune.blobs.blob_ref import TABLE_SUFFIX, leaf_table, table_file
from fedprune.core import tensorfile
from fedprune.core.disk import storage_errors
from fedprune.core.text import amount, quantity
from fedprune.core.validation import is_digest
from fedprune.output.tables import AdvanceBar, ignore_progress
from fedprune_server.maintenance.finding import Finding, Repair, Severity
from fedprune_server.maintenance.job_needs import JobNeeds
from fedprune_server.storage.s3.bucket import MODEL_KEY, OWNER_KEY, digest_of
from fedprune_server.storage.s3.store import BucketStore

_RESTORE_ADVICE = "Restore a backup; or, if one has the blob: fedprune-server check --repair --from BACKUP."
_REFETCH_ADVICE = "`--repair` looks for it in the state folder and, with `--from BACKUP`, there."
_REPAIR_ADVICE = "`--repair` mends it."


@dataclass(frozen=True)
class BlobFiles:
    """The files of a folder of blobs.

    Attributes:
        blobs: Blobs by digest.
        tables: Leaf tables (the hashes of a blob's pieces), by their blob's digest.
        partial: Files of blobs that have not arrived completely.
        temporary: Files of writers, some of which may be dead.
        foreign: Files that no server wrote.
    """

    blobs: Mapping[str, Path]
    tables: Mapping[str, Path]
    partial: tuple[Path, ...]
    temporary: tuple[Path, ...]
    foreign: tuple[Path, ...]


def find_blob_files(root: Path) -> BlobFiles:
    """List the files of a folder of blobs, without `BlobStore`, which would make missing folders and delete files."""
    blobs, tables = dict[str, Path](), dict[str, Path]()
    partial, temporary, foreign = list[Path](), list[Path](), list[Path]()
    with storage_errors(f"can't read {root}"):
        paths = [path for path in sorted(root.rglob("*")) if not path.is_dir()]
    for path in paths:
        parent_name, name = path.parent.name, path.name.removesuffix(TABLE_SUFFIX)
        if path.parent.parent == root and is_digest(name) and name[:2] == parent_name:
            (tables if path.name != name else blobs)[name] = path
        elif path.parent == root / "partial":
            partial.append(path)
        elif path.parent == root / "tmp":
            temporary.append(path)
        else:
            foreign.append(path)
    return BlobFiles(blobs, tables, tuple(partial), tuple(temporary), tuple(foreign))


def check_blob_folder(files: BlobFiles, needs: JobNeeds, advance: AdvanceBar) -> Iterator[Finding]:
    """Check the blobs of a folder; `advance` is called with the bytes that were read."""
    yield from _missing_blobs(files.blobs, needs, "", _RESTORE_ADVICE)
    for digest, path in files.blobs.items():
        yield from check_blob_file(digest, path, files.tables.get(digest), advance, needed=digest in needs.needed)


def check_blob_file(
    digest: str, path: Path, table: Path | None, advance: AdvanceBar, *, needed: bool, cached: bool = False
) -> Iterator[Finding]:
    """Check a blob and its leaf table. A damaged copy of a bucket's blob is only noted: the server fetches it again."""
    data = _read_if_present(path)
    if data is None:  # deleted since the folder was listed
        if needed:
            yield Finding(Severity.WRONG, f"blob {digest} is missing", _RESTORE_ADVICE, Repair.FETCH, blob=digest)
        return
    advance(len(data))
    if hashlib.sha256(data).hexdigest() != digest:
        files = (path,) if table is None else (path, table)
        if cached:
            what = f"{path}, a copy of what the bucket has, is damaged: it is fetched again"
            yield Finding(Severity.NOTE, what, "", Repair.DELETE, files, digest)
        else:
            yield _damage_finding(f"blob {path}", digest, _RESTORE_ADVICE, files, needed=needed)
    elif table is not None and _read_if_present(table) not in (None, table_file(leaf_table(data))):
        what = f"leaf table {table} is damaged: it is made again"
        yield Finding(Severity.NOTE, what, "", Repair.DELETE, (table,), digest)


def left_over_files(files: BlobFiles, needs: JobNeeds, *, running: bool, cache: bool) -> Iterator[Finding]:
    """Findings on files that the job doesn't need; a cache may hold any blob of its bucket."""
    # A running server writes files that no saved state refers to yet.
    if not running:
        orphans = [] if cache else sorted(files.blobs.keys() - needs.needed)
        orphaned_files = [files.blobs[d] for d in orphans] + [files.tables[d] for d in orphans if d in files.tables]
        lost_partial = [p for p in files.partial if p.name.removesuffix(TABLE_SUFFIX) not in needs.expected_updates]
        for paths, what in (
            (orphaned_files, "what nothing refers to (blobs and their leaf tables)"),
            ([files.tables[d] for d in sorted(files.tables.keys() - files.blobs.keys())], "leaf tables without a blob"),
            (lost_partial, "parts of blobs that no board sends any more"),
            (files.temporary, "temporary files"),
        ):
            if paths:
                title = f"{what}: {quantity(len(paths), 'file')}"
                yield _left_over_finding(title, sum(map(size_of_file, paths)), paths)
    if files.foreign:
        count = quantity(len(files.foreign), "file")
        yield Finding(Severity.NOTE, f"{count} that no server wrote, such as {files.foreign[0]}")


def check_bucket(
    store: BucketStore, cached_files: BlobFiles, needs: JobNeeds, advance: AdvanceBar, *, running: bool
) -> Iterator[Finding]:
    """Check the blobs of a bucket, and the folder that has copies of some of them."""
    url = store.bucket.url
    model = store.first_model()
    if model is None or tensorfile.sha256_hex(model) != needs.settings.get("model"):
        what = "is missing" if model is None else "is damaged"
        advice = (
            f"A server that is started on the folder goes by its own; delete {OWNER_KEY} and {MODEL_KEY} to have it "
        )
        yield Finding(Severity.NOTE, f"{url}/{MODEL_KEY} {what}", f"{advice}write both.")
    blob_keys = {key for key, _ in store.bucket.list()} - {OWNER_KEY, MODEL_KEY}
    foreign_keys = sorted(key for key in blob_keys if digest_of(key) is None)
    if foreign_keys:
        what = f"{len(foreign_keys)} objects that no server wrote, such as {url}/{foreign_keys[0][:100]}"
        yield Finding(Severity.NOTE, what)
    # Two servers may have uploaded one blob under two keys: one good copy is enough, and the others are left over.
    objects = store.objects()
    yield from _missing_blobs(objects, needs, url, _REFETCH_ADVICE)
    duplicate_keys: list[str] = []
    for digest, copies in sorted(objects.items()):
        good_copies = 0
        for key in sorted(copies):
            data = store.bucket.get(key, store.max_size)
            if data is None:  # deleted meanwhile
                continue
            advance(len(data))
            if hashlib.sha256(data).hexdigest() != digest:
                needed = digest in needs.needed
                yield _damage_finding(f"object {url}/{key}", digest, _REFETCH_ADVICE, keys=(key,), needed=needed)
                continue
            if good_copies:
                duplicate_keys.append(key)
            good_copies += 1
    sizes = {key: size for copies in objects.values() for key, size in copies.items()}
    orphans = [] if running else sorted(objects.keys() - needs.needed)
    orphaned_keys = [key for digest in orphans for key in objects[digest]]
    removable_duplicates = [] if running else [key for key in duplicate_keys if key not in orphaned_keys]
    for keys, what in ((orphaned_keys, "what nothing refers to"), (removable_duplicates, "blobs that are there twice")):
        if keys:
            title, size = f"{what}: {len(keys)} objects in {url}", sum(sizes[key] for key in keys)
            yield _left_over_finding(title, size, keys=keys)
    for digest, path in cached_files.blobs.items():
        table = cached_files.tables.get(digest)
        yield from check_blob_file(digest, path, table, ignore_progress, needed=False, cached=True)


def size_of_file(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _missing_blobs(stored: Container[str], needs: JobNeeds, bucket: str, advice: str) -> Iterator[Finding]:
    for digest in sorted(d for d in needs.references if d not in stored):
        what = f"blob {digest} is missing{f' from {bucket}' if bucket else ''}"
        yield Finding(Severity.WRONG, what, advice, Repair.FETCH, blob=digest)
    for row in needs.state.history:
        model = str(row["model"])
        if model in needs.models - needs.references and model not in stored:
            place = f"in {bucket}" if bucket else "there"
            yield Finding(
                Severity.NOTE,
                f"the model after round {row['round']} ({model}) isn't {place}, though it is to be kept",
                "The server deleted it if `keep` was smaller then, or models were judged by another metric; else a "
                "backup may have it.",
                Repair.FETCH,
                blob=model,
            )


def _damage_finding(
    name: str, digest: str, advice: str, paths: tuple[Path, ...] = (), keys: tuple[str, ...] = (), *, needed: bool
) -> Finding:
    if needed:
        return Finding(Severity.WRONG, f"{name} is damaged", advice, Repair.SET_ASIDE, paths, digest, keys)
    what = f"{name} is damaged, and not needed"
    return Finding(Severity.WRONG, what, _REPAIR_ADVICE, Repair.DELETE, paths, digest, keys)


def _left_over_finding(what: str, size: int, paths: Sequence[Path] = (), keys: Sequence[str] = ()) -> Finding:
    advice = "They do no harm; `--repair` deletes them."
    what = f"{what}, {amount(size, 'bytes')}"
    return Finding(Severity.NOTE, what, advice, Repair.DELETE, tuple(paths), keys=tuple(keys))


def _read_if_present(path: Path) -> bytes | None:
    try:
        with storage_errors(f"can't read {path}", missing=True):
            return path.read_bytes()
    except FileNotFoundError:
        return None
