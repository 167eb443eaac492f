"""The files in a folder of blobs, sorted by what they are: blobs, their tables, incomplete files, foreign files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedprune.blobs.blob_ref import TABLE_SUFFIX
from fedprune.core.disk import storage_errors
from fedprune.core.validation import is_digest


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
