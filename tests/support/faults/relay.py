"""A relay for one TCP port, which may be slow, and closed for a while."""

import socket
import threading
import time
from contextlib import suppress


class Relay:
    """Listens on a port of its own and passes on what comes.

    Args:
        target: The port on this machine to which it goes.
        bytes_s: What a connection carries in a second, each way; 0 for no limit.

    Attributes:
        target: The port; later connections go to another one if it has changed.
        most: Beyond so many bytes in all nothing passes; None for no end.
    """

    def __init__(self, target: int, bytes_s: float = 0.0) -> None:
        self.target, self._bytes_s = target, bytes_s
        self.most: int | None = None
        self._closed = False
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.connections = 0
        self.passed_bytes = 0
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End all connections, and let nobody through."""
        self._closed = True
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def mend(self) -> None:
        """Let connections through again."""
        self._closed = False

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._socket.accept()[0],), daemon=True).start()

    def _serve(self, there: socket.socket) -> None:
        with there, suppress(OSError):
            if self._closed:
                return
            with socket.create_connection(("127.0.0.1", self.target)) as here:
                self.connections += 1
                self._open += [there, here]
                back = threading.Thread(target=self._forward, args=(here, there), daemon=True)
                back.start()
                self._forward(there, here)
                back.join()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(4096):
                if self._bytes_s:
                    time.sleep(len(data) / self._bytes_s)
                while self.most is not None and self.passed_bytes >= self.most:
                    time.sleep(0.01)
                target.sendall(data)
                self.passed_bytes += len(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
