"""Atomic files of an identity: secrets that only their owner may read, and public files that everybody may."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fedprune.core.atomic_file import atomic_write, write_atomically
from fedprune.core.disk import make_private_folder, open_own_file, storage_errors
from fedprune.core.errors import IdentityError, StorageError, path_remedy

# Bytes of a file with a secret: a key in PEM has some 200, a password less.
MAX_SECRET_BYTES = 16 * 1024


def write_private(path: Path, data: bytes) -> None:
    """Write a secret atomically with mode 0600; a missing folder is made with mode 0700."""
    with storage_errors(f"can't write {path}"):
        make_private_folder(path.parent)
    write_atomically(path, data, private=True)


def write_public(path: Path, data: bytes) -> None:
    """Write a public file atomically with mode 0644 under any umask: root may write it for a service's user."""
    with atomic_write(path) as file:
        file.write(data)
        os.fchmod(file.fileno(), 0o644)


def share_owner(path: Path, reference: Path) -> None:
    """Give a file that root made to the owner of another file, whose user is to read it.

    That user may write to the folder, and could put a link to any file of root there: only a regular file of root with
    a single link is given away.
    """
    if os.geteuid() != 0:
        return
    with storage_errors(f"can't write {path}"):
        owner = reference.lstat()
        descriptor = open_own_file(path, os.O_RDONLY)
        try:
            status = os.fstat(descriptor)
            if status.st_nlink != 1 or status.st_uid != 0:
                raise StorageError(f"{path} was replaced while it was written")
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
        finally:
            os.close(descriptor)


def read_private(path: Path, what: str) -> bytes:
    """Read a secret that only this user or root can have read or written; root reads any user's.

    Raises `IdentityError` if it is missing, another user's, open to other users, or larger than `MAX_SECRET_BYTES`, and
    `StorageError` if it is a link or no regular file, or can't be read.
    """
    try:
        with storage_errors(f"can't read {path}", missing=True):
            descriptor = open_own_file(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise IdentityError(f"{what} is missing: there is no {path}", hint=path_remedy(error)) from error
    try:
        status = os.fstat(descriptor)
        # The service's user may read what root has installed for it, but nothing that a third user could replace.
        if os.geteuid() != 0 and status.st_uid not in (os.geteuid(), 0):
            raise IdentityError(
                f"{what} {path} belongs to another user",
                expected=f"user {os.geteuid()}, who reads it, or root",
                got=f"user {status.st_uid}",
                hint="Its owner may have changed it: give it back to its user if you know that nothing was changed.",
            )
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o077:
            raise IdentityError(
                f"{what} {path} is open to other users",
                expected="mode 0600",
                got=f"0{mode:o}",
                hint="chmod 600 it, and replace it if another user may have read it.",
            )
        if status.st_size > MAX_SECRET_BYTES:
            raise IdentityError(f"{what} {path}", expected=f"at most {MAX_SECRET_BYTES} bytes", got=status.st_size)
        with storage_errors(f"can't read {path}"):
            return os.read(descriptor, MAX_SECRET_BYTES)
    finally:
        os.close(descriptor)
