import json
import socket
import stat
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ConfigError, StorageError
from fedprune_device.api import http_server
from fedprune_device.api.address import LocalAddress
from fedprune_device.client import Board
from support.fakes.local_board import LocalBoard, ask, npy, parse_answers, read_to_end, request
from support.waiting import PATIENCE_S, until

pytestmark = pytest.mark.board

X = np.random.default_rng(1).standard_normal((5, 6)).astype(np.float32)
NPY = "application/x-npy"
GOOD = request("GET", "/v1/health")
ALLOWED = {200, 201, 400, 403, 404, 405, 409, 411, 413, 414, 415, 422, 431, 503, 505}


# The protocol


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET /v1/nothing HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET /v1/health?x=%ff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /v1/health HTTP/1.1\r\n\r\n", 403),
        (b"GET /v1/health HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
        (b"GET /v1/health HTTP/1.1\r\nHost: localhost\r\nOrigin: http://a\r\n\r\n", 403),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
        (b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", 411),
        (b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n", 413),
        (request("POST", "/v1/predict", b'{"x": [' + b"1," * 2**19 + b"1]}", Content_Type="application/json"), 413),
        (request("POST", "/v1/predict?top=0", b"abc", Content_Type=NPY), 422),
        (request("POST", f"/v1/samples/{'0' * 32}/label", b"[" * 4000, Content_Type="application/json"), 400),
        (request("POST", f"/v1/samples/{'0' * 32}/label", b'{"label":NaN}', Content_Type="application/json"), 400),
    ],
)
def test_what_is_no_request_of_this_interface_is_answered_with_its_status(
    open_board: LocalBoard, raw: bytes, status: int
) -> None:
    answers = parse_answers(open_board.exchange(raw))
    assert [s for s, _ in answers] == [status]
    assert answers[0][1]["error"]["what"]
    assert ask(open_board, GOOD)[0] == 200


def check(open_board: LocalBoard, raw: bytes) -> None:
    """Whatever is sent: whole answers with known statuses or none at all, no traceback, and then all is as before."""
    for status, body in parse_answers(open_board.exchange(raw)):
        assert status in ALLOWED
        assert "Traceback" not in str(body)
        assert (status < 300) == ("error" not in body)
    assert ask(open_board, GOOD)[0] == 200


WORDS = """GET POST /v1/predict /v1/samples ?label= HTTP/1.1 : Host Content-Length Content-Type X-Shape Expect
100-continue Connection close 0 6 99 -1 1,6 application/x-npy application/octet-stream image/png localhost %"""
TOKENS = [*WORDS.encode().split(), b" ", b": ", b"\r\n", b"\n", b"\0", b"\xff", npy(X), npy(X)[:20], X.tobytes()]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400) | st.lists(st.sampled_from(TOKENS), max_size=30).map(b"".join))
def test_any_bytes_are_answered_or_the_connection_is_closed(open_board: LocalBoard, raw: bytes) -> None:
    check(open_board, raw)
    check(open_board, raw + b"\r\n\r\n")


@pytest.mark.parametrize("cut", range(0, 320, 13))
def test_a_client_that_goes_in_the_middle_does_no_harm(open_board: LocalBoard, cut: int) -> None:
    raw = request("POST", "/v1/samples?label=1", npy(X[0]), Content_Type=NPY)
    with open_board.connect() as connection:
        connection.sendall(raw[:cut])
    assert ask(open_board, GOOD)[0] == 200


# Slow and hostile clients


def test_clients_that_say_nothing_do_not_keep_others_out(serving_board: LocalBoard) -> None:
    idle = [serving_board.connect() for _ in range(2 * http_server.MAX_CLIENTS)]
    try:
        idle[-1].sendall(GOOD[:10])
        for _ in range(5):
            assert serving_board.board.predict(X).round == 1
    finally:
        for connection in idle:
            connection.close()


def test_a_user_who_only_connects_keeps_no_other_user_out(
    serving_board: LocalBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    current_user, accepted_users = ["ann"], list[str]()

    def user(_: object) -> str:
        accepted_users.append(current_user[0])
        return current_user[0]

    def connect_as(who: str, number: int) -> list[socket.socket]:
        current_user[0] = who
        count = len(accepted_users) + number
        connections = [serving_board.connect() for _ in range(number)]
        until(lambda: len(accepted_users) == count)
        return connections

    monkeypatch.setattr(http_server, "_peer_user", user)
    raw = request("POST", "/v1/predict", npy(X), Content_Type=NPY)
    (slow,) = connect_as("ann", 1)
    slow.sendall(raw[:-1])
    hostile = connect_as("bob", 4 * http_server.MAX_CLIENTS)
    slow.sendall(raw[-1:])
    assert parse_answers(read_to_end(slow))[0][0] == 200, "bob's own places are what bob gets"
    hostile += connect_as("bob", 1)
    current_user[0] = "ann"
    assert serving_board.board.predict(X).round == 1, "who has the most places makes room"
    for connection in [slow, *hostile]:
        connection.close()


def test_a_client_that_sends_too_slowly_is_cut_off(serving_board: LocalBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "REQUEST_TIMEOUT_S", 0.2)
    for raw in (b"", GOOD[:-2], request("POST", "/v1/predict", npy(X), Content_Type=NPY)[:-1]):
        with serving_board.connect() as connection:
            connection.sendall(raw)
            assert read_to_end(connection) == b""


def test_clients_that_never_read_lose_their_places(local: LocalBoard) -> None:
    large = np.zeros(2**16, np.float32)  # as text more than a socket holds, and made at once even on a busy machine
    with local.serving():
        name = local.board.add(large)["id"]
    with ExitStack() as connections, local.serving(connections=2):
        greedy = [connections.enter_context(local.connect(timeout=PATIENCE_S)) for _ in range(2)]
        for connection in greedy:
            connection.sendall(request("GET", f"/v1/samples/{name}"))
        for connection in greedy:
            assert connection.recv(1) == b"H"
        assert ask(local, GOOD)[0] == 503, "all places are taken by answers that nobody reads"
        until(lambda: ask(local, GOOD)[0] == 200)
        lengths = [len(read_to_end(connection)) for connection in greedy]
        assert min(lengths) < len(json.dumps(large.tolist())), "where a place was lost; the other may not be due yet"


# Addresses


def test_only_user_and_group_may_use_the_socket(serving_board: LocalBoard) -> None:
    status = serving_board.socket.stat()
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o660
    assert [p.name for p in serving_board.root.glob("local.sock*")] == ["local.sock"]


def test_a_socket_that_a_killed_process_left_is_taken_over_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(path))
    dead.close()
    address = LocalAddress.parse(f"unix:{path}")
    bound = address.bind()
    with pytest.raises(StorageError, match="another program"):
        address.bind()
    address.release(bound)
    path.write_text("mine")
    with pytest.raises(StorageError, match="no socket"):
        address.bind()
    assert path.read_text() == "mine"


def test_a_socket_that_another_program_has_put_in_its_place_is_left_alone(tmp_path: Path) -> None:
    address = LocalAddress.parse(f"unix:{tmp_path / 's'}")
    first = address.bind()
    (tmp_path / "s").unlink()
    second = address.bind()
    address.release(first)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
    address.release(second)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("text", ["0.0.0.0:80", "[::]:80", "board.local:80", "", "unix:rel", "unix:/" + "a" * 200])
def test_what_is_no_address_of_this_machine_alone_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        LocalAddress.parse(text)


def test_a_port_of_this_machine_answers_too(local: LocalBoard) -> None:
    local.install(1)
    with local.serving("127.0.0.1:0"):
        assert Board(f"127.0.0.1:{local.server.port}").predict(X).round == 1
        with pytest.raises(StorageError, match="can't listen"):
            LocalAddress.parse(f"127.0.0.1:{local.server.port}").bind()
