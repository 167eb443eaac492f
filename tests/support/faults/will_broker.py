"""A broker that never publishes wills: a relay in front of a real one that takes them out of connections."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

_WILL_BITS = 0x3C


class WillBroker:
    """Listens on a port of its own.

    Args:
        broker: The broker's port.
    """

    def __init__(self, broker: int) -> None:
        self._broker = broker
        self.wills: list[bool] = []
        """Whether each connection had one, as it came."""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()
        self.cut()

    def cut(self) -> None:
        """End all connections."""
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=self._socket.accept()[:1], daemon=True).start()

    def _serve(self, board: socket.socket) -> None:
        with board, suppress(OSError, IndexError):
            connect = b""
            while len(connect) < 2 or len(connect) < _length(connect):
                data = board.recv(4096)
                if not data:
                    return
                connect += data
            self.wills.append(has_will(connect))
            with socket.create_connection(("127.0.0.1", self._broker)) as broker:
                self._open += [board, broker]
                broker.sendall(without_will(connect))
                back = threading.Thread(target=_pass, args=(broker, board), daemon=True)
                back.start()
                _pass(board, broker)
                back.join()


def _pass(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)
    with suppress(OSError):
        source.shutdown(socket.SHUT_RDWR)


def has_will(connect: bytes) -> bool:
    """Whether a CONNECT packet of MQTT 3.1.1 has a will."""
    return bool(connect[_body(connect) + 7] & 0x04)


def without_will(connect: bytes) -> bytes:
    """The same CONNECT packet, without its will."""
    if not has_will(connect):
        return connect
    at, end = _body(connect), _length(connect)
    head = connect[at : at + 7] + bytes((connect[at + 7] & ~_WILL_BITS,)) + connect[at + 8 : at + 10]
    fields, at = [], at + 10
    while at < end:
        size = 2 + int.from_bytes(connect[at : at + 2], "big")
        fields.append(connect[at : at + size])
        at += size
    body = head + b"".join([fields[0], *fields[3:]])
    size, length = len(body), b""
    while True:
        size, low = divmod(size, 128)
        length += bytes((low | (0x80 if size else 0),))
        if not size:
            break
    return connect[:1] + length + body + connect[end:]


def _body(packet: bytes) -> int:
    """Where a packet's length ends."""
    at = 1
    while packet[at] & 0x80:
        at += 1
    return at + 1


def _length(packet: bytes) -> int:
    """Bytes of the whole packet, as far as its length is there."""
    size = sum((byte & 0x7F) << 7 * i for i, byte in enumerate(packet[1 : _body(packet)]))
    return _body(packet) + size
