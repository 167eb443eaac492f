"""The folder of a bundle: what may be written to it, and how a new bundle takes the place of an old one.

The new bundle is written into `.bundle.partial` in the folder itself: that is on the same disk wherever the folder is
mounted or linked to, and what else is in the folder stays where it is. Once the new bundle is whole and durable, one
rename to `.bundle.complete` makes it the bundle of the folder: from then on readers take it from there
(`fedprune.runtime.bundle.files_folder`). Its files then take their places one by one, and the folder with them goes. An
export that is cut off before that rename has changed nothing; one that is cut off after it is finished by the next.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

import numpy as np

from fedprune.core.atomic_file import write_whole
from fedprune.core.disk import locked, storage_errors, sync_folder
from fedprune.core.errors import BundleError, StorageError, remedy, shown
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.runtime import tensorrt_config
from fedprune.runtime.bundle import (
    BASE,
    COMPLETE,
    FILES,
    MANIFEST,
    Bundle,
    files_folder,
    manifest,
    open_bundle,
)
from fedprune.runtime.precision_files import files_of

# Where a bundle is written; the holder of the lock may delete it.
PARTIAL = ".bundle.partial"
_LOCK = ".bundle.lock"
# In it every file has a second name, which is moved to its place: that needs no room, and the first name stays.
_PLACES = "places"

# The export's report of the bundle.
REPORTS = ("report.json", "report.md", "report.html")


def is_bundle(folder: Path) -> bool:
    """Whether a folder claims to be a bundle."""
    return (files_folder(folder) / MANIFEST).exists()


def check_folder(folder: Path, target: str) -> None:
    """Refuse to write a bundle among other things, or in the place of another board's.

    What an export that was cut off has left in the folder is no other thing.

    Raises:
        BundleError: The folder or one above it is a file, or it holds something else than a bundle of this target.
        StorageError: The folder can't be read, made or written to.
    """
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not place.is_dir():
        raise BundleError(f"{place} is not a folder", hint="Give another --out.")
    with storage_errors(f"can't read {folder}"):
        if (
            folder.is_dir()
            and not is_bundle(folder)
            and {p.name for p in folder.iterdir()} - {_LOCK, PARTIAL, COMPLETE}
        ):
            raise BundleError(f"{folder} is not empty and holds no bundle", hint="Empty it, or give another --out.")
    if not os.access(place, os.W_OK | os.X_OK):  # better known before hours of training than after
        refused = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        raise StorageError(f"can't write a bundle to {folder}: {refused.strerror}", hint=remedy(refused))
    there = _target(files_folder(folder) / MANIFEST)
    if there not in ("", target):
        raise BundleError(
            f"{folder} holds the bundle of another board",
            expected=f"one of {target}",
            got=f"one of {shown(there)}",
            hint="Give each board its own --out; or name all in one --target, which makes a folder each. To replace "
            "it, delete the folder.",
        )


def put_bundle(folder: Path, files: Mapping[str, bytes], target: str) -> None:
    """Make these files the bundle of a folder; after a crash at any moment it holds the old one or the new one, whole.

    Files of other names stay as they are. Errors are those of `write_bundle`.
    """
    made = not folder.exists()
    try:
        with storage_errors(f"can't write a bundle to {folder}"):
            if made:
                folder.mkdir(parents=True, exist_ok=True)
                sync_folder(folder.parent)
            elif not folder.is_dir():
                raise BundleError(f"{folder} is not a folder", hint="Give another --out.")
            with _alone(folder):
                check_folder(folder, target)  # under the lock: no other export can end in between
                _place(folder)
                _sweep(folder)
                _check_places(folder, files)
                _write(folder, files)
                _place(folder)
                with suppress(OSError):  # the next export deletes what is left
                    _sweep(folder)
    except BaseException:
        if made:
            with suppress(OSError):  # it goes if nothing is in it
                folder.rmdir()
        raise


def write_bundle(
    folder: Path,
    files: Mapping[str, bytes],
    selection: Selection,
    recipe: Recipe,
    target: str,
    class_names: tuple[str, ...] = (),
    base: Path | None = None,
) -> Bundle:
    """Write a bundle with its manifest, which lists `files`, and read it back.

    After a crash at any moment the folder holds the old bundle or the new one, whole. The folder is made, or must be
    empty or hold a bundle of the same target, which is replaced. `base` is the file of its frozen base, where `files`
    doesn't hold it.

    Raises:
        BundleError: The folder holds something else, or the files don't belong together.
        BusyError: Another export writes to the folder.
        StorageError: The folder can't be made or written to.
    """
    classes = selection.architecture.classes
    if class_names and len(class_names) != classes:
        raise BundleError("class names", expected=f"{classes} names", got=len(class_names))
    if base is not None:  # as a mapping: boards have no memory for a copy
        with storage_errors(f"can't read {base}"):
            files = {**files, BASE: cast("bytes", np.memmap(base, np.uint8, "r").data)}
    written = manifest(files, selection, recipe, target, class_names).encode()
    put_bundle(folder, {**files, MANIFEST: written}, target)
    return open_bundle(folder)


def read_files(bundle: Bundle) -> dict[str, bytes]:
    """The files of a bundle by name, without the manifest and the frozen base: what it consists of, and the export's
    reports."""
    engine = () if bundle.engine is None else (tensorrt_config.NAME,)
    lowered = (name for precision in bundle.precisions for name in files_of(precision))
    names = (*FILES, *engine, *lowered)
    reports = (name for name in REPORTS if bundle.path(name).is_file())
    with storage_errors(f"can't read {bundle.folder}"):
        return {name: bundle.path(name).read_bytes() for name in (*names, *reports)}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, and leave no file of it."""
    lock = folder / _LOCK
    with locked(lock, f"another export writes to {folder}", "Wait until it is done, or give another --out."):
        try:
            yield
        finally:
            with suppress(OSError):  # the next export deletes it
                lock.unlink(missing_ok=True)


def _check_places(folder: Path, files: Mapping[str, bytes]) -> None:
    """Nothing but a file can be replaced by a file."""
    for name in files:
        if (folder / name).is_dir():
            raise BundleError(f"{folder / name} is a folder", expected="a file of a bundle", hint="Give another --out.")


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a bundle next to the present one, and make it the one that counts."""
    partial = folder / PARTIAL
    try:
        places = partial / _PLACES
        places.mkdir(parents=True)
        for name, raw in files.items():
            write_whole(partial / name, raw)
            try:
                os.link(partial / name, places / name)
            except OSError:  # not every disk has hard links
                write_whole(places / name, raw)
        sync_folder(places)
        partial.rename(folder / COMPLETE)
    except BaseException:
        with suppress(OSError):  # the next export deletes what is left
            shutil.rmtree(partial)
        raise


def _place(folder: Path) -> None:
    """Put the files of a bundle that is complete into their places; it is the folder's bundle all the while."""
    complete = folder / COMPLETE
    if not (complete / MANIFEST).exists():
        return
    try:
        sync_folder(folder)
        for path in sorted((complete / _PLACES).iterdir(), key=lambda p: (p.name == MANIFEST, p.name)):
            path.replace(folder / path.name)
        sync_folder(folder)
    except OSError as error:
        raise StorageError(
            f"can't put the new bundle of {folder} into its place: {error.strerror}",
            hint=f"It is whole, and read from {complete} until the same export is run again and can.",
        ) from error


def _sweep(folder: Path) -> None:
    """Delete what isn't in its place: of a bundle that is, or of exports that were cut off."""
    partial, complete = folder / PARTIAL, folder / COMPLETE
    if partial.exists():
        shutil.rmtree(partial)
    if complete.exists():
        complete.rename(partial)  # it goes in one piece: a reader must never find a part of it
        sync_folder(folder)
        shutil.rmtree(partial)


def _target(path: Path) -> str:
    """The target that a manifest names; empty if it can't be read."""
    try:
        found = json.loads(path.read_bytes())["target"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return found if isinstance(found, str) else ""
