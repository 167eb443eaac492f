"""The members of a fleet, as its server's database has them."""

from pathlib import Path

from fedprune_server.enrollment.store import IdentityStore
from fedprune_server.storage.database import Database
from fedprune_server.storage.storage import Storage

A, B = "11" * 32, "22" * 32


def open_identity_store(folder: Path) -> tuple[Database, IdentityStore]:
    database = Storage.open_in(folder).database
    return database, IdentityStore(database)


def test_members_are_held_once_and_read_again_when_any_server_has_changed_them(tmp_path: Path) -> None:
    (first, ours), (second, theirs) = open_identity_store(tmp_path), open_identity_store(tmp_path)
    with first, second:
        assert ours.members() == {}
        ours.approve("pi-1", A, 1)
        members = ours.members()
        assert members == {"pi-1": A}
        assert ours.members() is members
        theirs.revoke("pi-1", 2)
        theirs.approve("pi-2", B, 2)
        assert ours.members() == {"pi-2": B}
        assert members == {"pi-1": A}, "what was handed out has changed"


def test_a_member_is_unannounced_until_its_first_message(tmp_path: Path) -> None:
    database, store = open_identity_store(tmp_path)
    with database:
        store.approve("pi-1", A, 1)
        store.approve("pi-2", B, 1)
        assert store.unannounced_members() == {"pi-1": 1, "pi-2": 1}
        store.defer_epochs([(A, "fedprune/1/lab/pi-1", 7)])
        database.flush()
        assert store.unannounced_members() == {"pi-2": 1}
