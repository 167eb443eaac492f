"""Who may connect as an aggregator, and what one is told of members and their certificates."""

from __future__ import annotations

import re
import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.x509 import load_pem_x509_crl
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus
from websockets.sync.client import connect

from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import IdentityError
from fedprune.security.certificates import make_request, make_tls_key, save_tls_key
from fedprune.security.keys import SigningKey
from fedprune.security.private_file import write_public
from fedprune.security.tls import pinned_context
from fedprune_server.aggregators.connections import RegionConnections
from fedprune_server.aggregators.parent import Members, ParentLink, Register
from fedprune_server.aggregators.place import admit, adopt
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.store import APPROVED, REVOKED
from fedprune_server.transfer.http import contexts

pytestmark = pytest.mark.soak


@pytest.fixture
def identity(tmp_path: Path) -> Iterator[IdentityFolder]:
    with IdentityFolder.make(tmp_path / "server", "default") as made:
        yield made


@pytest.fixture
def connections(identity: IdentityFolder, tmp_path: Path) -> Iterator[RegionConnections]:
    context = contexts(identity, identity.tier(["127.0.0.1"]))
    with RegionConnections("127.0.0.1", 0, context, BlobStore(tmp_path / "landing")) as made:
        made.serve({"job": BlobStore(tmp_path / "blobs")}, lambda: None)
        yield made


def as_board(identity: IdentityFolder, folder: Path) -> ssl.SSLContext:
    """TLS of a board of the fleet."""
    key = make_tls_key()
    issued = identity.authority.issue_device("default", "ant", make_request(key, "ant"))
    save_tls_key(key, folder / "ant.key")
    write_public(folder / "ant.pem", issued.encode())
    authority, _, _ = identity.client()
    return pinned_context(authority, folder / "ant.pem", folder / "ant.key", identity.authority.now)


def test_a_server_of_the_fleet_may_connect(identity: IdentityFolder, connections: RegionConnections) -> None:
    with connect(f"wss://127.0.0.1:{connections.port}", ssl=identity.context()) as socket:
        assert socket.response is not None
        assert socket.response.status_code == 101


def test_a_board_is_refused_before_anything_is_read_of_it(
    identity: IdentityFolder, connections: RegionConnections, tmp_path: Path
) -> None:
    with pytest.raises(InvalidStatus) as caught:
        connect(f"wss://127.0.0.1:{connections.port}", ssl=as_board(identity, tmp_path))
    assert caught.value.response.status_code == 403
    assert list(connections.collect()) == []


def test_without_a_certificate_nobody_connects(identity: IdentityFolder, connections: RegionConnections) -> None:
    context = ssl.create_default_context(cafile=str(identity.client()[0]))
    with pytest.raises((OSError, ConnectionClosed, InvalidMessage)):
        connect(f"wss://127.0.0.1:{connections.port}", ssl=context)


@pytest.mark.parametrize(
    ("host", "own", "said"),
    [
        ("127.0.0.1", False, r"another authority than this aggregator's identity .*identity/ in this state folder"),
        ("localhost", True, r"doesn't name this host .*--aggregators HOST:PORT"),
    ],
)
def test_an_aggregator_says_why_it_distrusts_its_parent(
    identity: IdentityFolder,
    connections: RegionConnections,
    tmp_path: Path,
    host: str,
    own: bool,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with IdentityFolder.make(tmp_path / "other", "default") as other:
        context = (identity if own else other).context
        url = f"wss://{host}:{connections.port}"
        with ParentLink(url, "north", context, BlobStore(tmp_path / "north")) as link:
            with pytest.raises(IdentityError, match=said):
                link.start(patience_s=60)
            assert not link.connected
        caplog.clear()
        (tmp_path / "north" / "jobs.json").write_text('{"job": {}}')  # which an earlier start has left
        with ParentLink(url, "north", context, BlobStore(tmp_path / "north")) as link:
            link.start(patience_s=60)
        served = [r.message for r in caplog.records if "latest orders" in r.message]
        assert len(served) == 1
        assert re.search(said, served[0])


def test_members_of_the_parent_are_those_of_the_aggregator(identity: IdentityFolder) -> None:
    keys = {name: SigningKey.make().verifying.hex for name in ("ant", "bee", "cat")}
    admit(identity, Members({"ant": keys["ant"], "bee": keys["bee"]}, (), whole=True))
    assert identity.store.members() == {"ant": keys["ant"], "bee": keys["bee"]}
    admit(identity, Members({"ant": keys["cat"]}, ("bee",), whole=False))  # a new key for ant
    assert identity.store.members() == {"ant": keys["cat"]}
    rows = {(d.device, d.key): d.status for d in identity.store.devices()}
    assert rows == {("ant", keys["ant"]): REVOKED, ("bee", keys["bee"]): REVOKED, ("ant", keys["cat"]): APPROVED}
    admit(identity, Members({"bee": keys["bee"]}, (), whole=True))  # which the parent has approved again
    assert identity.store.members() == {"bee": keys["bee"]}


def test_certificates_that_the_parent_revokes_are_revoked_at_the_aggregator(
    identity: IdentityFolder, tmp_path: Path
) -> None:
    shutil.copytree(identity.path, tmp_path / "north" / "identity")
    key = make_tls_key()
    identity.authority.issue_device("default", "ant", make_request(key, "ant"))
    assert identity.authority.revoke_device("ant") == 1
    lines, _ = identity.authority.lines(0)
    with IdentityFolder(tmp_path / "north") as copy:
        assert copy.authority.crl_path.read_bytes() != identity.authority.crl_path.read_bytes()
        adopt(copy, Register(tuple(lines)))
        adopt(copy, Register(tuple(lines)))  # as after a reconnection
        assert len(revoked(copy)) == 1
        assert revoked(copy) == revoked(identity)


def revoked(identity: IdentityFolder) -> set[int]:
    found = load_pem_x509_crl(identity.authority.crl_path.read_bytes())
    return {entry.serial_number for entry in found}
