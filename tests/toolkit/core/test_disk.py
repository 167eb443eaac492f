"""Writing to the disk: whole or not at all, durably, and in errors of ours."""

import ast
import contextlib
import errno
import fcntl
import os

import pytest

from fedprune.core.atomic_file import link_or_copy, write_atomically
from fedprune.core.disk import file_lock, make_private_folder, open_own_file, read_file, storage_errors
from fedprune.core.errors import BusyError, StorageError, StorageFullError
from fedprune.security.private_file import write_public
from support.paths import ROOT

pytestmark = pytest.mark.board


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, StorageFullError), (errno.EIO, StorageError)])
def test_a_disk_that_fails_leaves_the_old_content_and_no_rest(tmp_path, monkeypatch, call, number, kind):
    path, linked = tmp_path / "state.json", tmp_path / "linked" / "state.json"
    linked.parent.mkdir()
    write_atomically(path, b"old")
    for _ in range(2):  # the second time there is nothing to rename
        link_or_copy(path, linked)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*(("os.fsync", fail) if call == "fsync" else ("pathlib.Path.replace", fail)))
    with pytest.raises(kind, match=r"state\.json"):
        write_atomically(path, b"new")
    with pytest.raises(kind, match=r"state\.json"):
        link_or_copy(path, linked)
    assert path.read_bytes() == linked.read_bytes() == b"old"
    assert {*tmp_path.rglob("*")} == {path, linked.parent, linked}


def test_room_on_the_disk_is_asked_for_only_where_it_helps():
    hints = set()
    for number in (errno.ENOSPC, errno.EFBIG):
        with pytest.raises(StorageFullError) as caught, storage_errors("can't write it"):
            raise OSError(number, os.strerror(number))
        hints.add(caught.value.hint)
    assert len(hints) == 2


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


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "leftover"])
@pytest.mark.parametrize("writer", ["write", "copy", "public", "lock", "open"])
def test_root_writes_through_no_link_in_a_folder_of_another_user(tmp_path, monkeypatch, writer, kind):
    victim, path = tmp_path / "victim", tmp_path / "folder" / "file"
    path.parent.mkdir()
    victim.write_bytes(b"root's")
    laid = path if writer in ("lock", "open") else path.with_name(".file.partial")
    if kind == "pipe":
        os.mkfifo(laid)
    elif kind == "leftover":
        laid.write_bytes(b"of a killed process")
    else:
        laid.symlink_to(victim if kind == "link" else tmp_path / "new")
    if writer == "copy":
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
        link_or_copy(victim, path)
    elif writer in ("write", "public"):
        (write_atomically if writer == "write" else write_public)(path, b"ours")
    else:
        refused = contextlib.nullcontext() if kind == "leftover" else pytest.raises(StorageError, match=r"regular|link")
        with refused, file_lock(path, "", "") if writer == "lock" else storage_errors("can't open it"):
            os.write(open_own_file(path, os.O_RDWR | os.O_CREAT), b"ours")
    assert (victim.read_bytes(), (tmp_path / "new").exists()) == (b"root's", False)
    if laid != path:
        assert path.read_bytes() == (b"root's" if writer == "copy" else b"ours")
        assert list(path.parent.iterdir()) == [path]
        assert not path.is_symlink()


# Writers that open by path, and why no other user can lay a link there.
_OTHER_WRITERS = {
    "a file or folder that the operator names": {
        "cli", "simulation", "kit", "image", "fedprune_device/api/address.py", "fedprune_server/monitoring/health.py",
    },
    "a folder that it has just made": {
        "checks", "precision", "hardware", "fedprune_device/engines/build_process.py",
    },
    "a device of the system": {
        "fedprune/core/cli.py", "fedprune_device/engines/__main__.py", "fedprune_server/executor/ray_driver.py",
    },
    "not a file": {"s3", "fedprune_device/storage/state_store.py", "fedprune_device/data/spooled_arrays.py"},
}  # fmt: skip


def _opens_by_path(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    constants = [n.value for n in ast.walk(call) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    flags = {n.attr for n in ast.walk(call) if isinstance(n, ast.Attribute)}
    writes = flags & {"O_WRONLY", "O_RDWR", "O_CREAT"} and not flags & {"O_EXCL", "O_NOFOLLOW"}
    by_mode = any(len(c) < 4 and set(c) <= set("rwaxbt+") and set(c) & set("wa+") for c in constants)
    if name == "open":
        return bool(writes or by_mode)
    is_safe = any(keyword.arg == "follow_symlinks" for keyword in call.keywords)
    return not is_safe and name in ("write_text", "write_bytes", "touch", "chmod", "chown", "copyfile", "copy2")


def test_every_writer_in_a_state_folder_opens_files_of_its_own():
    exceptions = set().union(*_OTHER_WRITERS.values())
    places = {
        f"{path.relative_to(root)}:{node.lineno}"
        for root in (ROOT / name for name in ("toolkit", "export", "server", "device_runtime"))
        for path in root.rglob("*.py")
        if not exceptions & {*path.relative_to(root).parts, str(path.relative_to(root))}
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and _opens_by_path(node)
    }
    assert places == set()
