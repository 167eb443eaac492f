"""Secrets that root makes in another user's folder."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedprune.core.errors import StorageError
from fedprune.security import private_file
from fedprune.security.private_file import share_owner


@pytest.fixture
def chown_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What root gave away; no user is needed for that."""
    owners: list[tuple[int, int]] = []
    fstat = os.fstat

    def as_roots(descriptor: int) -> SimpleNamespace:
        state = fstat(descriptor)
        return SimpleNamespace(st_mode=state.st_mode, st_nlink=state.st_nlink, st_uid=0)

    fake_calls = {
        "geteuid": lambda: 0,
        "fstat": as_roots,
        "fchown": lambda _, user, group: owners.append((user, group)),
    }
    monkeypatch.setattr(private_file, "os", SimpleNamespace(**(vars(os) | fake_calls)))
    return owners


def test_a_file_of_roots_gets_the_owner_of_the_other(tmp_path: Path, chown_calls: list[tuple[int, int]]) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    new.write_bytes(b"secret")
    old.touch()
    share_owner(new, old)
    assert chown_calls == [(old.stat().st_uid, old.stat().st_gid)]


@pytest.mark.parametrize("kind", ["link", "second name", "folder"])
def test_what_the_folders_user_put_in_its_place_is_not_given_away(
    kind: str, tmp_path: Path, chown_calls: list[tuple[int, int]]
) -> None:
    new, old, target = tmp_path / "new", tmp_path / "old", tmp_path / "target"
    old.touch()
    target.write_bytes(b"root's")
    if kind == "link":
        new.symlink_to(target)
    elif kind == "second name":
        new.hardlink_to(target)
    else:
        new.mkdir()
    with pytest.raises(StorageError):
        share_owner(new, old)
    assert chown_calls == []
