"""A job's bucket looked over: whether it has all that the job needs, whole, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from fedprune.blobs.blob_ref import leaf_table, table_file
from fedprune.core import tensorfile
from fedprune.core.errors import StorageError
from fedprune.core.text import amount
from fedprune.output.tables import Advance
from fedprune_server.maintenance.finding import Finding, Repair, Severity
from fedprune_server.maintenance.inventory import Inventory, Lying
from fedprune_server.storage.s3.layout import BLOBS, MODEL, OWNER, digest_of
from fedprune_server.storage.s3.store import BucketStore

_BACKUP = "`--repair` looks for it in the state folder and, with `--from BACKUP`, there."


def check_bucket(
    store: BucketStore, there: Lying, needs: Inventory, advance: Advance, *, running: bool
) -> Iterator[Finding]:
    """Look a bucket over, and the folder that has a part of it; `advance` is told the bytes that were read."""
    yield from _about(store, needs)
    objects = store.objects()
    for digest in sorted(needs.references - objects.keys()):
        yield Finding(
            Severity.WRONG, f"blob {digest} is missing from {store.bucket.url}", _BACKUP, Repair.FETCH, (), digest
        )
    for row in needs.state.history:
        model = str(row["model"])
        if model in needs.models - needs.references and model not in objects:
            what = (
                f"the model after round {row['round']} ({model}) isn't in {store.bucket.url}, though `keep` asks for it"
            )
            advice = "It was let go of if `keep` was smaller then; else a backup may have it."
            yield Finding(Severity.NOTE, what, advice, Repair.FETCH, (), model)
    doubled: list[str] = []
    for digest, keys in sorted(objects.items()):
        good = 0
        for key in sorted(keys):
            whole = _whole(store, key, digest, advance)
            if whole and good:
                doubled.append(key)
            good += bool(whole)
            if whole is False:
                yield _damaged(store, key, digest, needed=digest in needs.needed)
    yield from _left_over(store, objects, doubled, needs, running=running)
    yield from _folder(there)


def still_missing(store: BucketStore, digest: str) -> bool:
    return not any(True for _ in store.bucket.list(f"{BLOBS}{digest}."))


def _about(store: BucketStore, needs: Inventory) -> Iterator[Finding]:
    model = store.model()
    if model is None or tensorfile.digest(model) != needs.settings.get("model"):
        what = "is missing" if model is None else "is damaged"
        advice = (
            f"A server that is started on the folder goes by its own; delete {OWNER} and {MODEL} to have it write both."
        )
        yield Finding(Severity.NOTE, f"{store.bucket.url}/{MODEL} {what}", advice)
    strange = [key for key, _ in store.bucket.list() if key not in (OWNER, MODEL) and digest_of(key) is None]
    if strange:
        what = f"{len(strange)} objects that no server wrote, such as {store.bucket.url}/{strange[0][:100]}"
        yield Finding(Severity.NOTE, what)


def _whole(store: BucketStore, key: str, digest: str, advance: Advance) -> bool | None:
    """Whether an object is what its name says; None for one that is gone."""
    data = store.bucket.get(key, store.max_size)
    if data is None:
        return None
    advance(len(data))
    return hashlib.sha256(data).hexdigest() == digest


def _damaged(store: BucketStore, key: str, digest: str, *, needed: bool) -> Finding:
    what = f"object {store.bucket.url}/{key} is damaged"
    if needed:
        return Finding(Severity.WRONG, what, _BACKUP, Repair.SET_ASIDE, (), digest, (key,))
    what, advice = f"{what}, and not needed", "`--repair` sees to it."
    return Finding(Severity.WRONG, what, advice, Repair.DELETE, (), digest, (key,))


def _left_over(
    store: BucketStore, objects: dict[str, dict[str, int]], doubled: list[str], needs: Inventory, *, running: bool
) -> Iterator[Finding]:
    orphans = [] if running or needs.archive else sorted(objects.keys() - needs.needed)
    sizes = {key: size for found in objects.values() for key, size in found.items()}
    orphaned = {key: None for digest in orphans for key in objects[digest]}
    for keys, what in (
        (orphaned, "what nothing refers to"),
        ([] if running else [k for k in doubled if k not in orphaned], "blobs that are there twice"),
    ):
        if keys:
            size = sum(sizes[key] for key in keys)
            said = f"{what}: {len(keys)} objects in {store.bucket.url}, {amount(size, 'bytes')}"
            yield Finding(
                Severity.NOTE, said, "They do no harm; `--repair` deletes them.", Repair.DELETE, (), "", tuple(keys)
            )


def _folder(there: Lying) -> Iterator[Finding]:
    """What the folder has is only a copy."""
    for digest, path in there.blobs.items():
        table = there.tables.get(digest)
        try:
            data = path.read_bytes()
            found = None if table is None else table.read_bytes()
        except OSError:  # let go of meanwhile
            continue
        files = (path,) if table is None else (path, table)
        if hashlib.sha256(data).hexdigest() != digest:
            what = f"{path}, a copy of what the bucket has, is damaged: it is fetched again"
            yield Finding(Severity.NOTE, what, "", Repair.DELETE, files, digest)
        elif table is not None and found not in (table_file(leaf_table(data)), leaf_table(data)):
            yield Finding(
                Severity.NOTE, f"leaf table {table} is damaged: it is made again", "", Repair.DELETE, (table,), digest
            )


def mend(store: BucketStore, finding: Finding, folder: Path) -> Iterator[str]:
    """Repair objects as a finding says, moving damaged ones that the job needs to `folder`; yields what was done."""
    for key in finding.keys:
        if finding.repair is Repair.SET_ASIDE:
            data = store.bucket.get(key, store.max_size)
            if data is None:
                raise StorageError(f"{store.bucket.url}/{key} is gone", hint="Check again.")
            folder.mkdir(mode=0o700, exist_ok=True)
            store.write_file(folder / key.removeprefix(BLOBS), data)
            yield f"laid {key} in {folder}"
        store.forget(key)
        store.bucket.delete(key)
    if finding.keys:
        yield f"deleted {len(finding.keys)} objects, such as {store.bucket.url}/{finding.keys[0]}"
