"""A board's local interface without an agent: a linear model in a state folder, its set of samples, and a server."""

import io
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core import tensorfile
from fedprune_device.api.address import LocalAddress
from fedprune_device.api.endpoints import Endpoints
from fedprune_device.api.http_server import LocalServer
from fedprune_device.api.live_model import LiveModel
from fedprune_device.client import Board
from fedprune_device.data.image_decoding import Pixels
from fedprune_device.data.reservoir import SampleLimits
from fedprune_device.data.sample_store import SampleStore
from fedprune_device.data.splits import SplitShares
from fedprune_device.serving.model_slots import ModelSlots, ServingRecord

NAMES = ("ant", "bee", "cat")


def weights_of(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"w": rng.standard_normal((3, 6)).astype(np.float32), "b": rng.standard_normal(3).astype(np.float32)}


def softmax(z: Any) -> Any:
    shares = np.exp(z - z.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


class LocalBoard:
    """What a test talks to. `root/state` is the state folder, `root/local.sock` the socket."""

    def __init__(self, root: Path, graphs: Path) -> None:
        self.root, self.graph = root, graphs / "inference.onnx"
        self.slots = ModelSlots(root / "state" / "serving")
        self.slots.prepare()
        self.socket = root / "local.sock"
        self.address = f"unix:{self.socket}"
        self.board = Board(self.address, timeout=10.0, tries=1)
        self.model: LiveModel
        self.samples: SampleStore | None = None
        self.server: LocalServer

    def install(self, number: int, **fields: Any) -> dict[str, Any]:
        """Let a model serve whose round and seed are the number."""
        weights = weights_of(number)
        raw = tensorfile.encode(weights)
        self.slots.stage(self.graph, raw)
        graph = tensorfile.sha256_hex(self.graph.read_bytes())
        files = {"inference.onnx": graph, "weights.safetensors": tensorfile.sha256_hex(raw)}
        self.slots.install(ServingRecord("job", number, 3, files, **fields))
        return weights

    @contextmanager
    def serving(
        self, address: str = "", *, takes: bool = True, pixels: Pixels | None = None, **server: Any
    ) -> Iterator[None]:
        self.model = LiveModel(self.root / "state" / "serving")
        limits = SampleLimits(100, 64 * 2**20)
        self.samples = SampleStore(self.root / "state" / "samples", limits, SplitShares(device="d")) if takes else None
        where = LocalAddress.parse(address or self.address)
        endpoints = Endpoints(
            self.model,
            self.samples,
            lambda: {"device": "d"},
            class_names=NAMES,
            pixels=pixels,
            allows_reading=where.path is not None,
        )
        try:
            with LocalServer(where, endpoints, **server) as self.server:
                yield
        finally:
            self.model.close()
            if self.samples is not None:
                self.samples.close()

    def connect(self, timeout: float = 10.0) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(timeout)
        connection.connect(str(self.socket))
        return connection

    def exchange(self, raw: bytes, timeout: float = 10.0) -> bytes:
        """Send bytes and the end of all bytes; everything that comes back, until the connection is closed."""
        with self.connect(timeout) as connection:
            try:
                connection.sendall(raw)
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            return read_to_end(connection)


def read_to_end(connection: socket.socket) -> bytes:
    data_read = b""
    try:
        while data := connection.recv(65_536):
            data_read += data
    except ConnectionResetError:
        pass
    return data_read


def parse_answers(raw: bytes) -> list[tuple[int, dict[str, Any]]]:
    """Statuses and bodies of answers, one after the other; each must be whole."""
    answers = []
    while raw:
        head, separator, rest = raw.partition(b"\r\n\r\n")
        assert separator, raw
        first, *lines = head.decode("ascii").split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version == "HTTP/1.1"
        headers = dict(line.split(": ", 1) for line in lines)
        if status == "100":
            raw = rest
            continue
        size = int(headers["Content-Length"])
        assert headers["Content-Type"] == "application/json"
        assert len(rest) >= size
        answers.append((int(status), json.loads(rest[:size])))
        raw = rest[size:]
    return answers


def request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    lines += [f"Content-Length: {len(body)}"] if method == "POST" or body else []
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def ask(board: LocalBoard, raw: bytes) -> tuple[int, dict[str, Any]]:
    """The one answer to a request."""
    answers = parse_answers(board.exchange(raw))
    assert len(answers) == 1, answers
    return answers[0]


def npy(x: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()
