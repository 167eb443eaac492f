"""Blobs from a web server that behaves, and from one that doesn't: what is kept is right, and one line says why."""

import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fedprune.blobs.blob_ref import LEAF_BYTES, BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.security.authority import Authority
from fedprune.security.certificates import make_request, make_tls_key, save_tls_key
from fedprune.security.tls import pinned_context
from fedprune.security.trusted_time import BUILD_TIME
from fedprune.wire.blob_sender import BlobSender
from fedprune.wire.chunk import Chunk
from fedprune.wire.link import tls_context
from fedprune.wire.transfer import Pull
from fedprune.wire.urls import BlobUrl
from fedprune_device.network import http_transfer
from fedprune_device.network.http_download import HttpFetch
from support.fakes.web_server import Handler, WebPlace
from support.waiting import attempts, until

pytestmark = pytest.mark.board

BLOB = np.random.default_rng(0).bytes(20 * LEAF_BYTES + 100)
REF = BlobRef.of(BLOB)
SMALL = BlobRef.of(b"a graph")
EMPTY = BlobRef.of(b"")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebPlace]:
    with WebPlace(filled_store(tmp_path / "web")) as place:
        yield place


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "board", durable=False)


def filled_store(root: Path) -> BlobStore:
    store = BlobStore(root, durable=False)
    assert [store.put(b) for b in (BLOB, b"a graph", b"")] == [REF, SMALL, EMPTY]
    return store


def run_fetch(store: BlobStore, url: str, *refs: BlobRef, tls: Callable[[], ssl.SSLContext] = tls_context) -> HttpFetch:
    fetch = HttpFetch(store, BlobUrl.parse(url), refs or (REF,), tls)
    for _ in attempts("the end of a fetch", pause_s=0.002):
        if not fetch.is_alive:
            break
        if fetch.is_stalled:
            fetch.stop("it stalls")
    fetch.join(60)
    return fetch


def test_leaves_that_another_blob_here_has_are_not_fetched(web: WebPlace, store: BlobStore) -> None:
    store.put(BLOB[: 12 * LEAF_BYTES] + b"another end")
    fetch = run_fetch(store, web.url)
    assert fetch.failure == ""
    assert store.read(REF.sha256) == BLOB
    assert fetch.received_bytes == len(BLOB) - 12 * LEAF_BYTES
    assert fetch.done == fetch.total


def begin(store: BlobStore, web: WebPlace, *leaves: int) -> None:
    """Let some leaves of the blob be there already."""
    begun = store.partial(REF)
    begun.set_table(BlobStore(web.root).table(REF.sha256))
    for index in leaves:
        begun.write(index, BLOB[index * LEAF_BYTES : (index + 1) * LEAF_BYTES])
    begun.close()


def rest_over_mqtt(store: BlobStore, web: WebPlace) -> int:
    """Pull what is missing as MQTT does, from the store behind the web server; leaves that it took."""
    pull = Pull(REF, store.partial(REF))
    server = BlobSender(BlobStore(web.root, durable=False))
    wants, leaves = pull.start(0.0), 0
    while wants:
        want = wants.pop(0)
        leaves += want.count * (want.part == "data")
        for raw in server.answer(want):  # type: ignore[union-attr]
            wants += pull.on_chunk(Chunk.parse(raw), 0.0)
    assert pull.is_done
    assert store.read(REF.sha256) == BLOB
    return leaves


def test_blobs_come_whole_over_one_connection(store: BlobStore, web: WebPlace) -> None:
    fetch = run_fetch(store, web.url, REF, SMALL, EMPTY)
    assert fetch.failure == ""
    assert [store.read(r.sha256) for r in (REF, SMALL, EMPTY)] == [BLOB, b"a graph", b""]
    assert (fetch.done, fetch.total, fetch.received_bytes) == (22, 22, len(BLOB) + len(b"a graph"))
    name = f"/{REF.sha256[:2]}/{REF.sha256}"
    assert web.asked == [(f"{name}.leaves", None), (name, None), (f"/{SMALL.sha256[:2]}/{SMALL.sha256}", None)]
    assert not list((store.root / "partial").iterdir())


def test_only_what_is_missing_is_asked_for(store: BlobStore, web: WebPlace) -> None:
    begin(store, web, 0, 1, 2, 9, 20)
    fetch = run_fetch(store, web.url)
    assert fetch.failure == ""
    assert store.read(REF.sha256) == BLOB
    assert [r for _, r in web.asked] == [
        f"bytes={3 * LEAF_BYTES}-{9 * LEAF_BYTES - 1}",
        f"bytes={10 * LEAF_BYTES}-{20 * LEAF_BYTES - 1}",
    ]
    assert fetch.received_bytes == 16 * LEAF_BYTES


def test_who_knows_no_ranges_gives_all_of_it(store: BlobStore, web: WebPlace) -> None:
    begin(store, web, 3)
    web.behave = lambda handler, data: not handler.give(data, ranges=False)
    assert run_fetch(store, web.url).failure == ""
    assert store.read(REF.sha256) == BLOB
    assert len(web.asked) == 1


def test_a_cut_connection_is_resumed_where_it_ended(store: BlobStore, web: WebPlace) -> None:
    def cut(handler: Handler, data: bytes) -> bool:
        if len(data) < LEAF_BYTES or web.asked[-1][1] is not None:
            return False
        handler.give(data, until=9 * LEAF_BYTES + 5)
        return True

    web.behave = cut
    assert run_fetch(store, web.url).failure == ""
    assert store.read(REF.sha256) == BLOB
    assert web.asked[-1][1] == f"bytes={8 * LEAF_BYTES}-{len(BLOB) - 1}"  # leaves are taken eight at a time


@pytest.mark.parametrize(("batches", "is_enough"), [(4, True), (9, False)])
def test_a_connection_that_is_cut_again_and_again_is_resumed_some_times_and_then_left(
    store: BlobStore, web: WebPlace, batches: int, is_enough: bool
) -> None:
    blob = np.random.default_rng(1).bytes(8 * batches * LEAF_BYTES)  # leaves are taken eight at a time
    ref = BlobStore(web.root, durable=False).put(blob)
    web.behave = lambda h, data: not h.path.endswith(".leaves") and not h.give(data, until=8 * LEAF_BYTES + 5)
    assert (run_fetch(store, web.url, ref).failure == "") is store.has(ref.sha256) is is_enough


BAD: dict[str, tuple[Callable[[Handler, bytes], object], str]] = {
    "redirected": (lambda h, data: h.say(302, b"", Location="http://127.0.0.1:1/x"), "redirects .* not followed"),
    "for ever": (lambda h, data: h.say(200, b"", **{"Content-Length": str(2**60)}), f"'{2**60}' bytes, and not"),
    "too short": (lambda h, data: h.say(200, data[:-1]), "bytes, and not"),
    "a part": (lambda h, data: h.say(206, data, **{"Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}"}), "206"),
    "wrong": (lambda h, data: h.give(bytes([data[0] ^ 1]) + data[1:]), "leaf table .* another|leaf 0 of blob"),
    "wrong later": (lambda h, data: h.give(data[:-1] + bytes([data[-1] ^ 1])), "leaf table .* another|leaf 20 of blob"),
    "no HTTP": (lambda h, data: h.drip(b"MQTT here\r\n\r\n", 0), "MQTT here"),
    "cut off": (lambda h, data: h.give(data, until=10), "IncompleteRead"),
}


@pytest.mark.parametrize("of", ["leaf table", "blob"])
@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_ends_it_and_only_right_leaves_are_kept(
    store: BlobStore, web: WebPlace, name: str, of: str
) -> None:
    answer, why = BAD[name]
    web.behave = lambda h, data: h.path.endswith(".leaves") is (of == "leaf table") and not answer(h, data)
    fetch = run_fetch(store, web.url)
    assert fetch.failure
    assert re.search(why, fetch.failure), fetch.failure
    assert "\n" not in fetch.failure
    assert not store.has(REF.sha256)
    partial = store.partial(REF)
    assert partial.present_count == fetch.done
    partial.close()
    web.behave = lambda h, data: False
    assert rest_over_mqtt(store, web) == REF.leaf_count - partial.present_count
    assert run_fetch(store, web.url).failure == ""


def test_a_range_that_was_not_asked_for_is_not_believed(store: BlobStore, web: WebPlace) -> None:
    begin(store, web, 0)
    web.behave = lambda h, data: (
        not h.give(data, **{"Content-Range": f"bytes 0-{len(data) - 1 - LEAF_BYTES}/{len(data)}"})
    )
    assert "it gives 'bytes 0-" in run_fetch(store, web.url).failure
    assert store.partial(REF).present_count == 1


def test_who_drips_is_left(store: BlobStore, web: WebPlace) -> None:
    now, dripped = 0.0, 0

    def drip(handler: Handler, data: bytes) -> bool:
        nonlocal dripped
        if handler.path.endswith(".leaves"):
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: 8 * LEAF_BYTES])
        while not web.closing.is_set():  # a byte now and then: no socket's time-out ever ends
            handler.wfile.write(data[8 * LEAF_BYTES : 8 * LEAF_BYTES + 1])
            dripped += 1
            time.sleep(0.02)
        return True

    web.behave = drip
    fetch = HttpFetch(store, BlobUrl.parse(web.url), [REF], tls_context, lambda: now)
    until(lambda: fetch.received_bytes >= 8 * LEAF_BYTES and dripped >= 5)
    assert not fetch.is_stalled
    now += http_transfer.STALL_TIMEOUT_S + 1
    assert fetch.is_stalled
    fetch.stop("it stalls")
    fetch.join(60)
    assert fetch.failure == "it stalls"
    assert store.partial(REF).present_count == 8


def test_it_ends_at_once_when_it_is_stopped(store: BlobStore, web: WebPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_transfer, "SILENCE_TIMEOUT_S", 600.0)  # nothing else ends it
    web.behave = lambda h, data: not h.drip(b"", 600)
    fetch = HttpFetch(store, BlobUrl.parse(web.url), [REF], tls_context)
    while not web.asked:
        time.sleep(0.002)
    fetch.stop()
    assert not fetch.is_alive
    fetch.join(60)
    assert "fedprune-web" not in {thread.name for thread in threading.enumerate()}
    assert fetch.failure == ""


def test_where_nobody_listens_it_says_so(store: BlobStore, web: WebPlace) -> None:
    url = web.url
    web.__exit__()
    assert run_fetch(store, url).failure == "connection refused"


class TestTls:
    @pytest.fixture
    def authority(self, tmp_path: Path) -> Authority:
        return Authority.make(tmp_path / "authority", "lab", clock=lambda: float(BUILD_TIME))

    def place(self, tmp_path: Path, authority: Authority, host: str = "127.0.0.1") -> WebPlace:
        key = make_tls_key()
        save_tls_key(key, tmp_path / "web.key")
        (tmp_path / "web.pem").write_text(authority.issue_broker([host], make_request(key, "web")))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "web.pem", tmp_path / "web.key")
        return WebPlace(filled_store(tmp_path / "web"), context)

    def trust(self, tmp_path: Path) -> Callable[[], ssl.SSLContext]:
        return lambda: pinned_context(tmp_path / "authority" / "authority.pem", None, None, lambda: BUILD_TIME)

    def test_blobs_come_over_tls(self, store: BlobStore, tmp_path: Path, authority: Authority) -> None:
        with self.place(tmp_path, authority) as web:
            assert run_fetch(store, web.url, REF, SMALL, tls=self.trust(tmp_path)).failure == ""
        assert store.read(REF.sha256) == BLOB

    @pytest.mark.parametrize(("host", "is_trusted"), [("127.0.0.1", False), ("models.example", True)])
    def test_a_certificate_of_another_authority_or_for_another_host_gets_no_request(
        self, store: BlobStore, tmp_path: Path, authority: Authority, host: str, is_trusted: bool
    ) -> None:
        with self.place(tmp_path, authority, host) as web:
            tls = self.trust(tmp_path) if is_trusted else tls_context
            assert run_fetch(store, web.url, tls=tls).failure.startswith("TLS failed")
            assert web.asked == []
