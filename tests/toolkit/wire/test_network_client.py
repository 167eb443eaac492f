"""Packets that arrive many at a time, or cut anywhere, are the messages that were sent."""

import os
import resource
import socket
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from paho.mqtt.enums import CallbackAPIVersion

from fedprune.wire.link import BrokerLink
from fedprune.wire.network_client import NetworkClient
from fedprune.wire.queues import ConnectionUp

pytestmark = pytest.mark.board

_CONNACK, _SUBACK_HEAD = bytes((0x20, 2, 0, 0)), bytes((0x90, 3))
MESSAGES = [("t/short", b"x" * n) for n in (1, 0, 130, 16_380)] + [("t/long", bytes(range(256)) * 800)] * 2


def publish_packet(topic: str, payload: bytes) -> bytes:
    """A PUBLISH of QoS 0 as MQTT 3.1.1 writes it (section 3.3)."""
    body = len(topic).to_bytes(2, "big") + topic.encode() + payload
    size, length = len(body), bytearray()
    while True:
        size, digit = size >> 7, size & 127
        length.append(digit | (128 if size else 0))
        if not size:
            return bytes((0x30,)) + bytes(length) + body


def serve_once(listener: socket.socket, step: int, done: threading.Event) -> None:
    """Accept one client and one subscription, then send all messages, `step` bytes at a time."""
    connection, _ = listener.accept()
    with connection:
        connection.recv(4096)
        connection.sendall(_CONNACK)
        stream = _SUBACK_HEAD + connection.recv(4096)[2:4] + b"\0" + b"".join(publish_packet(*m) for m in MESSAGES)
        for start in range(0, len(stream), step):
            connection.sendall(stream[start : start + step])
        done.wait(60)


def read_messages(step: int) -> None:
    """A link reads what a broker sends `step` bytes at a time."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        broker = threading.Thread(target=serve_once, args=(listener, step, done), daemon=True)
        broker.start()
        with closing(BrokerLink(f"mqtt://127.0.0.1:{listener.getsockname()[1]}", "reader", qos=0)) as link:
            link.subscribe(["t/#"])
            link.start()
            assert link.get(30) == ConnectionUp()
            assert [link.get(30) for _ in MESSAGES] == MESSAGES
            done.set()
        broker.join(60)


@pytest.mark.parametrize("step", [7_919, 2**20])
def test_packets_cut_anywhere_are_read_whole_and_in_order(step: int) -> None:
    read_messages(step)


def test_a_process_with_more_open_files_than_select_takes_is_connected() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft if soft == resource.RLIM_INFINITY else max(soft, 2_048)
    if hard != resource.RLIM_INFINITY and wanted > hard:
        pytest.skip("this system lets a process open fewer files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    try:
        with ExitStack() as files, Path(os.devnull).open("rb") as file:
            for _ in range(1_100):
                files.callback(os.close, os.dup(file.fileno()))
            read_messages(2**20)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class OvertakenClient(NetworkClient):
    """A client whose loop writes the first message before its publisher has told paho that there is one."""

    overtakes = False

    def _call_socket_register_write(self) -> None:
        if self.overtakes:
            self.overtakes = False
            self.run_once(0)
        super()._call_socket_register_write()


def test_a_message_wakes_the_loop_although_an_earlier_one_was_written_before_it_was_told() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        closing(OvertakenClient(CallbackAPIVersion.VERSION2, reconnect_on_failure=False)) as client,
    ):
        client.connect("127.0.0.1", listener.getsockname()[1])
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(10)
            connection.sendall(_CONNACK)
            while not client.is_connected():
                client.run_once(10)
            connection.recv(4096)
            client.overtakes = True
            client.publish("t", b"first")
            assert connection.recv(4096) == publish_packet("t", b"first")
            client.run_once(0)  # it reads that it was woken
            loop = threading.Thread(target=client.run_once, args=(30,), daemon=True)
            loop.start()
            time.sleep(0.1)  # it waits by now; otherwise it needs nobody to wake it
            client.publish("t", b"second")
            assert connection.recv(4096) == publish_packet("t", b"second")
            loop.join(60)
