"""A board whose offers name a web server: what that gives is not asked for over MQTT, and what it doesn't give is."""

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.wire.messages import BlobRequest, Cancelled, Offer, Refusal, UpdateAnnouncement
from fedprune_device.data.dataset import LocalData
from support.fakes.agent_harness import Bench, expected_tensors, same
from support.fakes.web_server import Handler, WebPlace

pytestmark = [pytest.mark.board, pytest.mark.usefixtures("stall_after")]


class Board(Bench):
    """An agent, its server, and a web server that has the server's blobs."""

    def __init__(self, root: Path, graphs: Path, weights: Tensors, data: LocalData, web: WebPlace) -> None:
        super().__init__(root, graphs, weights, data, web.root)
        self.web = web

    def offer(self, number: int, recipe: Recipe | None = None, **fields: Any) -> Offer:
        return self.server.offer(number, recipe, **{"blobs_at": self.web.url, **fields})

    @property
    def wants(self) -> list[BlobRequest]:
        return [m for m in self.server.seen if isinstance(m, BlobRequest)]


@pytest.fixture
def board(tmp_path: Path, graphs: Path, weights: Tensors, data: LocalData) -> Iterator[Board]:
    with WebPlace(BlobStore(tmp_path / "server", durable=False)) as web:
        yield Board(tmp_path, graphs, weights, data, web)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_all_comes_from_the_web(
    board: Board, graphs: Path, weights: Tensors, data: LocalData, caplog: pytest.LogCaptureFixture
) -> None:
    offer = board.offer(1)
    board.server.plan = [offer]
    board.run()
    assert same(board.server.result(1), expected_tensors(graphs, weights, data, 1))
    assert board.wants == []
    assert warnings(caplog) == []
    sizes = {r.sha256: r.size for r in offer.blobs()}
    assert sum(sizes.values()) <= board.web.sent < 1.01 * sum(sizes.values()) + 1000  # and leaf tables


def test_what_the_web_server_lacks_comes_over_mqtt_and_the_next_offer_asks_it_again(
    board: Board, graphs: Path, weights: Tensors, data: LocalData, caplog: pytest.LogCaptureFixture
) -> None:
    halves = {name: 0.5 * value for name, value in weights.items()}
    second = board.server.blobs.put(tensorfile.encode(halves))
    board.server.plan = [board.offer(1), board.offer(2, weights=second)]
    board.web.answers = 0

    def later(message: Any) -> None:
        if isinstance(message, UpdateAnnouncement):
            board.web.answers = -1

    board.server.react = later
    board.run()
    assert same(board.server.result(1), expected_tensors(graphs, weights, data, 1))
    assert same(board.server.result(2), expected_tensors(graphs, halves, data, 2))
    assert board.wants
    assert second.sha256 not in {w.sha256 for w in board.wants}
    assert len(warnings(caplog)) == 1
    assert "answers 404" in warnings(caplog)[0]
    assert board.web.url in warnings(caplog)[0]


def hangs(board: Board) -> Callable[[Handler, bytes], bool]:
    return lambda handler, data: not handler.drip(b"HTTP/1.1 200 OK\r\n", 600)


@pytest.mark.parametrize("stall_after", [0.3], indirect=True)
def test_a_web_server_that_hangs_is_given_up(board: Board, caplog: pytest.LogCaptureFixture) -> None:
    board.server.plan = [board.offer(1)]
    board.web.behave = hangs(board)
    board.run()
    assert len(warnings(caplog)) == 1
    assert "nothing more has moved" in warnings(caplog)[0]
    assert not any(isinstance(m, Refusal) for m in board.server.seen)


def test_a_cancelled_offer_is_fetched_no_more(board: Board, caplog: pytest.LogCaptureFixture) -> None:
    first, second = board.offer(1), board.server.offer(1, attempt=1)
    board.server.plan = [first]
    board.web.behave = hangs(board)

    def watch() -> None:
        if board.web.asked and board.server.plan == [first]:
            board.server.plan = [second]
            board.server.say(Cancelled("job", 1, 0, "a test"))
            board.server.say(second)

    board.server.watch = watch
    board.run()
    assert warnings(caplog) == []
    assert len(board.web.asked) == 1


def test_the_web_goes_on_while_there_is_no_broker(board: Board) -> None:
    board.server.plan = [board.offer(1)]
    dropped = threading.Event()

    def behave(handler: Handler, data: bytes) -> bool:
        if not dropped.is_set():
            board.server.link.drop()
            dropped.set()
            threading.Timer(0.3, board.server.link.restore).start()
        return False

    board.web.behave = behave
    board.run()
    assert dropped.is_set()
    assert board.wants == []


def test_wrong_bytes_are_not_believed(
    board: Board, graphs: Path, weights: Tensors, data: LocalData, caplog: pytest.LogCaptureFixture
) -> None:
    board.server.plan = [board.offer(1)]
    board.web.behave = lambda handler, data: not handler.give(bytes(len(data)))
    board.run()
    assert same(board.server.result(1), expected_tensors(graphs, weights, data, 1))
    assert len(warnings(caplog)) == 1
