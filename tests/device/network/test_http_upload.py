"""Updates uploaded to a web server that behaves, and to one that doesn't: then one line says why, and MQTT does it."""

import base64
import hashlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.blobs.blob_ref import LEAF_BYTES, BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.model.selection import Tensors
from fedprune.wire.link import tls_context
from fedprune.wire.messages import (
    PUT_ABILITY,
    Accepted,
    BlobNotFound,
    Cancelled,
    UpdateAnnouncement,
    UploadRequest,
    UploadResult,
)
from fedprune.wire.urls import UploadUrl
from fedprune_device.data.dataset import LocalData
from fedprune_device.network.update_sender import HttpUpload
from support.fakes.agent_fleet import TOPICS
from support.fakes.agent_harness import Bench, expected_tensors, same
from support.fakes.web_server import Handler, WebPlace
from support.waiting import until

pytestmark = pytest.mark.board

UPDATE = np.random.default_rng(2).bytes(40 * LEAF_BYTES + 9)
REF = BlobRef.of(UPDATE)
SIGNED = "/bucket/blobs/x.0123?X-Amz-Signature=secret%2F1&X-Amz-Expires=60"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebPlace]:
    with WebPlace(BlobStore(tmp_path / "web", durable=False)) as place:
        yield place


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    store = BlobStore(tmp_path / "board", durable=False)
    assert store.put(UPDATE) == REF
    return store


def run_upload(store: BlobStore, url: str, tls: Callable[[], ssl.SSLContext] = tls_context) -> HttpUpload:
    upload = HttpUpload(store, UploadUrl.parse(url), REF, tls)
    until(upload.is_over)
    upload.join(60)
    return upload


def test_it_is_sent_whole_with_length_and_digest(store: BlobStore, web: WebPlace) -> None:
    assert run_upload(store, web.url + SIGNED).failure == ""
    assert web.bodies == [UPDATE]
    ((path, head),) = web.uploads
    assert path == SIGNED
    assert head["Content-Length"] == str(len(UPDATE))
    assert base64.b64decode(head["x-amz-checksum-sha256"]) == hashlib.sha256(UPDATE).digest()
    assert "Transfer-Encoding" not in head


@pytest.mark.parametrize("status", [307, 403])
def test_any_other_answer_is_a_failure_without_the_address_s_secret(
    store: BlobStore, web: WebPlace, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(handler: Handler) -> bool:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.say(status, b"<Error><Code>SignatureDoesNotMatch</Code>", Location="http://127.0.0.1:1/")
        return True

    web.take = refuse
    upload = run_upload(store, web.url + SIGNED)
    assert upload.failure == f"it answers {status}" + (" (SignatureDoesNotMatch)" if status >= 400 else "")
    (record,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert record == (
        f"the update can't be uploaded to {web.url}/bucket/blobs/x.0123: {upload.failure}; it goes over MQTT"
    )
    assert len(web.uploads) == 1


def test_who_hangs_up_or_listens_nowhere_or_says_nonsense_is_a_failure(store: BlobStore, web: WebPlace) -> None:
    def hang_up(handler: Handler) -> bool:
        handler.connection.shutdown(socket.SHUT_RDWR)
        return True

    def nonsense(handler: Handler) -> bool:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.wfile.write(b"what?\r\n\r\n")
        return True

    for take in (hang_up, nonsense):
        web.take = take
        assert run_upload(store, web.url + SIGNED).failure
    assert "refused" in run_upload(store, "http://127.0.0.1:1/x").failure
    assert run_upload(store, web.url.replace("http:", "https:") + SIGNED).failure  # no TLS there
    store.delete(REF.sha256)
    assert run_upload(store, web.url + SIGNED).failure


@pytest.mark.parametrize("stall_after", [0.3], indirect=True)
def test_who_takes_nothing_is_left(store: BlobStore, web: WebPlace, stall_after: None) -> None:
    web.take = lambda handler: not handler.drip(b"", 600)
    failure = run_upload(store, web.url + SIGNED).failure
    assert "nothing more has moved" in failure or failure == "no answer"


def test_an_address_is_never_shown_whole() -> None:
    url = UploadUrl.parse(f"https://Models.example:444{SIGNED}")
    request = UploadRequest("ab" * 32, f"https://models.example:444{SIGNED}")
    assert (url.host, url.port, url.tls, url.target) == ("models.example", 444, True, SIGNED)
    assert f"{url}{url.query}" == request.url
    assert str(url) == "https://models.example:444/bucket/blobs/x.0123"
    for text in (str(url), repr(url), str(request), repr(request)):
        assert "secret" not in text


class Board(Bench):
    """An agent, its server, and a web server to which the server lets it upload."""

    def __init__(self, root: Path, graphs: Path, weights: Tensors, data: LocalData, web: WebPlace) -> None:
        super().__init__(root, graphs, weights, data)
        self.web = web
        self.number = 0
        self.server.accepts = False
        self.server.react, self.server.clock = self.react, self.clock
        self.on_request: Callable[[UploadRequest], None] = self.server.say

    def clock(self) -> float:
        """A second for each wait in vain: no message that is on its way is late, however slow the machine."""
        return float(self.server.idle)

    def run(self, until_finished: bool = True, limit: float = 60.0, **settings: Any) -> None:
        super().run(until_finished, limit, clock=self.clock, **settings)

    def react(self, message: Any) -> None:
        if isinstance(message, UpdateAnnouncement) and not self.server.accepts:
            self.number += 1
            self.update = message
            digest = message.weights.sha256
            self.on_request(UploadRequest(digest, f"{self.web.url}/{digest}?secret", self.number))
        elif isinstance(message, UploadResult) and message.reason is None:
            assert self.server.blobs.put(self.web.bodies[-1]) == self.update.weights
            self.server.updates[self.update.round] = self.update
            self.server.say(Accepted("job", self.update.round, self.update.attempt, message.sha256))
        elif isinstance(message, UploadResult):
            self.server.accepts = True
            self.server.receive(TOPICS.up("d", "job"), self.update.to_bytes())
            self.server.accepts = False

    @property
    def results(self) -> list[str | None]:
        return [m.reason for m in self.server.of(UploadResult)]


@pytest.fixture
def board(tmp_path: Path, graphs: Path, weights: Tensors, data: LocalData, web: WebPlace) -> Board:
    web_board = Board(tmp_path, graphs, weights, data, web)
    web_board.server.plan = [web_board.server.offer(1), web_board.server.offer(2)]
    return web_board


def test_a_board_uploads_where_the_server_wants_it(
    board: Board, graphs: Path, weights: Tensors, data: LocalData, stall_after: None, caplog: pytest.LogCaptureFixture
) -> None:
    board.run()
    for number in (1, 2):
        assert same(board.server.result(number), expected_tensors(graphs, weights, data, number))
    assert board.results == [None, None]
    assert len(board.web.uploads) == 2
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert "secret" not in caplog.text
    assert all(PUT_ABILITY in birth.abilities for birth in board.server.seen if birth.kind == "birth")


def test_what_fails_goes_over_mqtt_and_the_next_update_is_uploaded_again(
    board: Board, graphs: Path, weights: Tensors, data: LocalData, stall_after: None, caplog: pytest.LogCaptureFixture
) -> None:
    def once(handler: Handler) -> bool:
        if len(board.web.uploads) > 1:
            return False
        handler.rfile.read(100)
        handler.connection.shutdown(socket.SHUT_RDWR)
        return True

    board.web.take = once
    board.run()
    for number in (1, 2):
        assert same(board.server.result(number), expected_tensors(graphs, weights, data, number))
    assert [bool(reason) for reason in board.results] == [True, False]
    assert len([r.getMessage() for r in caplog.records if "can't be uploaded" in r.getMessage()]) == 1
    assert "secret" not in caplog.text


def test_the_same_request_twice_is_one_upload_and_another_meanwhile_is_none(board: Board, stall_after: None) -> None:
    def often(request: UploadRequest) -> None:
        for message in (request, request, UploadRequest(request.sha256, request.url, 1000 + board.number)):
            board.server.say(message)

    board.on_request = often
    board.web.take = lambda handler: time.sleep(0.2) or False  # type: ignore[func-returns-value]
    board.run()
    assert len(board.web.uploads) == 2
    assert board.results == [None, None]


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same address", "another address"])
def test_a_board_uploads_once_to_an_address_however_often_it_is_asked(
    board: Board, stall_after: None, elsewhere: bool
) -> None:
    """A server that is busy asks again, for it hasn't read yet that the update is uploaded."""
    plain, announced, late = board.react, list[UpdateAnnouncement](), list[UploadResult]()

    def react(message: Any) -> None:
        if isinstance(message, UpdateAnnouncement):
            if message not in announced:
                announced.append(message)
                plain(message)
        elif isinstance(message, UploadResult) and not late:
            late.append(message)
            url = f"{board.web.url}/{message.sha256}?secret{'-2' if elsewhere else ''}"
            board.server.say(UploadRequest(message.sha256, url, 7000))
        else:
            plain(message)

    board.server.react = react
    board.run()
    assert board.results == [None, None, None]  # the first twice
    assert len(board.web.uploads) == (3 if elsewhere else 2)
    assert sorted(board.server.updates) == [1, 2]


def test_what_is_no_update_of_it_is_not_uploaded(board: Board, stall_after: None) -> None:
    other_digest = "ab" * 32
    board.on_request = lambda request: [
        board.server.say(m) for m in (UploadRequest(other_digest, request.url), request)
    ]  # type: ignore[assignment,func-returns-value]
    board.run()
    assert BlobNotFound(other_digest) in board.server.of(BlobNotFound)
    assert sorted(board.server.updates) == [1, 2]
    uploaded_digests = {hashlib.sha256(body).hexdigest() for body in board.web.bodies}
    # A slow server asks for an update again that it has accepted meanwhile, and is told that it isn't here any more.
    assert uploaded_digests == {update.weights.sha256 for update in board.server.updates.values()}


def test_an_upload_ends_with_its_offer(board: Board, stall_after: None, caplog: pytest.LogCaptureFixture) -> None:
    first, second_attempt = board.server.offer(1), board.server.offer(1, attempt=1, seed=8)
    board.server.plan = [first]
    cut = threading.Event()

    def hang(handler: Handler) -> bool:
        if len(board.web.uploads) > 1:
            return False
        while handler.rfile.read1(1000):  # type: ignore[attr-defined]
            time.sleep(0.001)
        handler.close_connection = True
        cut.set()
        return True

    def watch() -> None:
        if board.web.uploads and board.server.plan == [first]:
            board.server.plan = [second_attempt]
            board.server.say(Cancelled("job", 1, 0, "a test"))
            board.server.say(second_attempt)

    board.web.take = hang
    board.server.watch = watch
    board.run()
    assert cut.wait(10)
    assert board.results == [None]
    assert "can't be uploaded" not in caplog.text
