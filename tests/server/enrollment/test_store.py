"""The identity's database, and what it takes in of another server's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprune_server.enrollment.store import APPROVED, DEVICE_ROW, EPOCH_ROW, REVOKED, WAITING, IdentityStore, SharedRow

OLD, NEW = "aa" * 32, "bb" * 32


@pytest.fixture
def store(tmp_path: Path) -> Iterator[IdentityStore]:
    made = IdentityStore(tmp_path / "identity.db")
    yield made
    made.close()


def row(key: str, status: str) -> SharedRow:
    return DEVICE_ROW, f"pi-1 {key}", ["pi-1", key, status, 1, 2]


def statuses(store: IdentityStore) -> dict[str, str]:
    return {device.key: device.status for device in store.devices()}


def test_an_approval_from_before_a_board_was_replaced_shuts_nobody_out(store: IdentityStore) -> None:
    store.approve("pi-1", OLD, 1)
    store.revoke("pi-1", 2)
    store.approve("pi-1", NEW, 3)
    store.merge([row(OLD, APPROVED)])
    assert statuses(store) == {OLD: REVOKED, NEW: APPROVED}


def test_a_board_that_was_replaced_elsewhere_is_replaced_here(store: IdentityStore) -> None:
    store.approve("pi-1", OLD, 1)
    store.merge([row(OLD, REVOKED), row(NEW, APPROVED)])
    assert statuses(store) == {OLD: REVOKED, NEW: APPROVED}


def test_keys_that_waited_and_epochs_of_revoked_keys_do_not_come_back(store: IdentityStore) -> None:
    store.approve("pi-1", NEW, 3)
    store.merge([row(OLD, WAITING), row("cc" * 32, REVOKED), (EPOCH_ROW, f"{'cc' * 32} s", ["cc" * 32, "s", 5])])
    assert statuses(store) == {NEW: APPROVED, "cc" * 32: REVOKED}
    assert store.heard("cc" * 32) == {}
