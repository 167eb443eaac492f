"""Writing to the disk: whole or not at all, durably, and in errors of ours."""

import errno
import fcntl
import os

import pytest

from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import file_lock, make_private_folder, read_file
from fedprune.core.errors import BusyError, StorageError, StorageFullError

pytestmark = pytest.mark.board


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, StorageFullError), (errno.EIO, StorageError)])
def test_a_disk_that_fails_leaves_the_old_content_and_no_rest(tmp_path, monkeypatch, call, number, kind):
    path = tmp_path / "state.json"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*(("os.fsync", fail) if call == "fsync" else ("pathlib.Path.replace", fail)))
    with pytest.raises(kind, match=r"state\.json"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_on_a_file_that_its_holder_has_deleted_is_none(tmp_path, monkeypatch):
    path, lock = tmp_path / "lock", fcntl.flock

    def late(descriptor, how):
        path.unlink()
        lock(descriptor, how)

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", late)
        with pytest.raises(BusyError, match="somebody holds it"), file_lock(path, "somebody holds it", "Wait."):
            pass
    with file_lock(path, "somebody holds it", "Wait."):
        assert path.exists()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "zeros", "folder", "long"])
def test_what_is_no_file_of_a_known_size_is_not_read(tmp_path, kind):
    path = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(bytes(11))
    with pytest.raises(OSError, match=r"regular|directory|11 bytes") as caught:
        read_file(path, 10)
    assert caught.value.strerror


def test_a_file_is_read_up_to_its_limit(tmp_path):
    (tmp_path / "file").write_bytes(bytes(10))
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "link", 10) == bytes(10)
    assert read_file("/proc/self/status")  # its size is reported as 0


def test_a_private_folder_and_those_that_it_needs_are_for_this_user_alone(tmp_path):
    before = os.umask(0)
    try:
        make_private_folder(tmp_path / "a" / "b")
        make_private_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert [p.stat().st_mode & 0o777 for p in (tmp_path / "a", tmp_path / "a" / "b")] == [0o700] * 2
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        make_private_folder(tmp_path / "file")
