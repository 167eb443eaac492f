"""The folder of a bundle: what may be written to it, and how a new bundle replaces an old one.

The new bundle is written into `.bundle.partial` in the folder itself, which is on the same disk wherever the folder is
mounted or linked to. Other files of the folder stay where they are. Once the new bundle is whole and durable, one
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

from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import file_lock, flush_folder, storage_errors
from fedprune.core.errors import BundleError, StorageError, path_remedy, value_text
from fedprune.model.features import CUSTOM_LOSS
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.runtime import tensorrt_config
from fedprune.runtime.bundle import (
    BASE,
    COMPLETE_FOLDER,
    FILES,
    MANIFEST,
    Bundle,
    files_folder,
    manifest_text,
    open_bundle,
)
from fedprune.runtime.precision_files import files_of

# Subfolder in which a new bundle is written; whoever holds the lock may delete it.
PARTIAL_FOLDER = ".bundle.partial"
_LOCK_FILE = ".bundle.lock"
# Subfolder with a second name (hard link) of every file, which is moved into place. That needs no room on the disk, and
# the new bundle stays readable under the first names all the while.
_LINKS_FOLDER = "places"

# The export's report of the bundle.
REPORTS = ("report.json", "report.md", "report.html")


def is_bundle(folder: Path) -> bool:
    """Whether a folder claims to be a bundle."""
    return (files_folder(folder) / MANIFEST).exists()


def check_bundle_folder(folder: Path, target: str) -> None:
    """Refuse to write a bundle among other files, or over the bundle of another board. Leftovers of an export that was
    cut off don't count as other files. Raises `BundleError` if the folder or one above it is a file, or it holds
    something else than a bundle of this target; `StorageError` if the folder can't be read, made or written to."""
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise BundleError(f"{nearest} is not a folder", hint="Give another --out.")
    with storage_errors(f"can't read {folder}"):
        if (
            folder.is_dir()
            and not is_bundle(folder)
            and {p.name for p in folder.iterdir()} - {_LOCK_FILE, PARTIAL_FOLDER, COMPLETE_FOLDER}
        ):
            raise BundleError(f"{folder} is not empty and holds no bundle", hint="Empty it, or give another --out.")
    if not os.access(nearest, os.W_OK | os.X_OK):  # better refused before hours of training than after
        denial = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        raise StorageError(f"can't write a bundle to {folder}: {denial.strerror}", hint=path_remedy(denial))
    present_target = _manifest_target(files_folder(folder) / MANIFEST)
    if present_target not in ("", target):
        raise BundleError(
            f"{folder} holds the bundle of another board",
            expected=f"one of {target}",
            got=f"one of {value_text(present_target)}",
            hint="Give another --out, or delete the folder to replace the bundle. Several boards in one --target get a "
            "folder each.",
        )


def put_bundle(folder: Path, files: Mapping[str, bytes], target: str) -> None:
    """Make these files the bundle of a folder; after a crash it holds the whole old bundle or the whole new one. Files
    of other names stay as they are. Errors are those of `write_bundle`."""
    is_new = not folder.exists()
    try:
        with storage_errors(f"can't write a bundle to {folder}"):
            if is_new:
                folder.mkdir(parents=True, exist_ok=True)
                flush_folder(folder.parent)
            elif not folder.is_dir():
                raise BundleError(f"{folder} is not a folder", hint="Give another --out.")
            with _exclusive_access(folder):
                check_bundle_folder(folder, target)  # under the lock: no other export can end in between
                _move_into_place(folder)
                _remove_leftovers(folder)
                # Refuse a folder in the place of a file, which a rename can't replace.
                for name in files:
                    if (folder / name).is_dir():
                        raise BundleError(
                            f"{folder / name} is a folder", expected="a file of a bundle", hint="Give another --out."
                        )
                _write_complete(folder, files)
                _move_into_place(folder)
                with suppress(OSError):  # the next export deletes what is left
                    _remove_leftovers(folder)
    except BaseException:
        if is_new:
            with suppress(OSError):  # fails if the folder isn't empty, and then it must stay
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

    After a crash at any moment the folder holds the whole old bundle or the whole new one. The folder may be missing,
    empty, or hold a bundle of the same target, which is replaced. `base` is the file of the frozen base, if `files`
    lacks it. Raises `BundleError` if the folder holds something else, or the files don't belong together; `BusyError`
    if another export writes to the folder; `StorageError`.
    """
    classes = selection.architecture.classes
    # A loss of one's own may read classes off any of the outputs.
    if class_names and len(class_names) != classes and recipe.loss != CUSTOM_LOSS:
        raise BundleError("class names", expected=f"{classes} names", got=len(class_names))
    if base is not None:  # as a mapping: boards have no memory for a copy
        with storage_errors(f"can't read {base}"):
            files = {**files, BASE: cast("bytes", np.memmap(base, np.uint8, "r").data)}
    manifest_bytes = manifest_text(files, selection, recipe, target, class_names).encode()
    put_bundle(folder, {**files, MANIFEST: manifest_bytes}, target)
    return open_bundle(folder)


def read_files(bundle: Bundle) -> dict[str, bytes]:
    """The files of a bundle by name, and the export's reports, without the manifest and the frozen base."""
    engine = () if bundle.engine is None else (tensorrt_config.ENGINE_PLAN_FILE,)
    precision_files = (name for precision in bundle.precisions for name in files_of(precision))
    names = (*FILES, *engine, *precision_files)
    reports = (name for name in REPORTS if bundle.path(name).is_file())
    with storage_errors(f"can't read {bundle.folder}"):
        return {name: bundle.path(name).read_bytes() for name in (*names, *reports)}


@contextmanager
def _exclusive_access(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, and delete its file afterwards: users copy these folders."""
    lock = folder / _LOCK_FILE
    with file_lock(lock, f"another export writes to {folder}", "Wait until it is done, or give another --out."):
        try:
            yield
        finally:
            with suppress(OSError):  # the next export deletes it
                lock.unlink(missing_ok=True)


def _write_complete(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a bundle next to the present one, and make it the valid one with one rename."""
    partial = folder / PARTIAL_FOLDER
    try:
        links = partial / _LINKS_FOLDER
        links.mkdir(parents=True)
        for name, raw in files.items():
            write_atomically(partial / name, raw)
            try:
                os.link(partial / name, links / name)
            except OSError:  # not every disk has hard links
                write_atomically(links / name, raw)
        flush_folder(links)
        partial.rename(folder / COMPLETE_FOLDER)
    except BaseException:
        with suppress(OSError):  # the next export deletes what is left
            shutil.rmtree(partial)
        raise


def _move_into_place(folder: Path) -> None:
    """Move the files of a complete bundle into place; readers see that bundle all the while."""
    complete = folder / COMPLETE_FOLDER
    if not (complete / MANIFEST).exists():
        return
    try:
        flush_folder(folder)
        # The manifest last: without it the folder is no bundle, and with it every file has to be there.
        for path in sorted((complete / _LINKS_FOLDER).iterdir(), key=lambda p: (p.name == MANIFEST, p.name)):
            path.replace(folder / path.name)
        flush_folder(folder)
    except OSError as error:
        raise StorageError(
            f"can't put the new bundle of {folder} into its place: {error.strerror}",
            hint=f"It is whole, and read from {complete} until the same export is run again and can.",
        ) from error


def _remove_leftovers(folder: Path) -> None:
    """Delete the subfolders of a bundle that is in place, and of exports that were cut off."""
    partial, complete = folder / PARTIAL_FOLDER, folder / COMPLETE_FOLDER
    if partial.exists():
        shutil.rmtree(partial)
    if complete.exists():
        # Renamed first, since deleting takes many steps: a reader must never find a part of it.
        complete.rename(partial)
        flush_folder(folder)
        shutil.rmtree(partial)


def _manifest_target(path: Path) -> str:
    """The target that a manifest names; empty if it can't be read."""
    try:
        target = json.loads(path.read_bytes())["target"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return target if isinstance(target, str) else ""
