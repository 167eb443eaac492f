"""A client of a board's local interface, for an application on the board.

It needs only the standard library, and imports nothing of fedprune: the file may be copied.

    board = Board("unix:/run/fedprune/local.sock")
    print(board.predict(image).classes)
    board.add(image, label="cat")
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import struct
import time
from dataclasses import dataclass, field
from secrets import SystemRandom
from typing import Any
from urllib.parse import quote, urlencode

_MAX_ANSWER_BYTES = 64 * 2**20
_MAX_WAIT_S = 5.0  # seconds between two tries


class BoardError(Exception):
    """The board can't be reached or refuses a request; `status` is the answer's code, 0 without an answer."""

    def __init__(self, status: int, what: str, expected: str = "", got: str = "", hint: str = "") -> None:
        self.status, self.what, self.expected, self.got, self.hint = status, what, expected, got, hint
        details = [f"{name} {text}" for name, text in (("expected", expected), ("got", got)) if text]
        message = what + (": " + ", ".join(details) if details else "")
        super().__init__(f"{message}. {hint}" if hint else message)


@dataclass(frozen=True)
class Predictions:
    """The board's predictions.

    Attributes:
        job: The job that its model is of.
        round: The round that the model is of.
        digest: sha256 of the model's weights.
        predictions: One entry per sample, as the board gave them: `class`, `probability`, `name`, `probabilities`.
        file_outputs: Outputs of the model's own file for all samples, by name, such as the labels of its ArgMax.
    """

    job: str
    round: int
    digest: str
    predictions: list[dict[str, Any]]
    file_outputs: dict[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> list[int]:
        """The likeliest class of every sample."""
        return [int(p["class"]) for p in self.predictions]

    @property
    def probabilities(self) -> list[list[float]]:
        """Probabilities, one row per sample; of `predict` without `top`."""
        return [list(p["probabilities"]) for p in self.predictions]


class Board:
    """A board's local interface. It makes a connection per request, so that any thread may use it; methods raise
    `BoardError`.

    Samples are numpy arrays, or lists of numbers, or the bytes of a JPEG or PNG file where the model takes images. The
    address is `unix:/path` or `127.0.0.1:port`. `timeout` seconds limit connecting, sending and waiting for the next
    bytes of an answer, in each of `tries` tries while the board is busy or can't be reached. A repeated request changes
    nothing: a sample that exists is recognised.
    """

    def __init__(self, address: str, *, timeout: float = 30.0, tries: int = 5) -> None:
        if not address.startswith("unix:/") and ":" not in address.removeprefix("unix:"):
            raise BoardError(0, "address of the board", "unix:/path (an absolute one) or 127.0.0.1:port", repr(address))
        self._address, self._timeout, self._tries = address, timeout, max(tries, 1)

    def predict(self, x: Any, top: int | None = None) -> Predictions:
        """Predict one sample as the model takes it, a batch, or an image file; `top` keeps the likeliest."""
        query = "" if top is None else f"?top={top}"
        answer = self._ask("POST", f"/v1/predict{query}", *_body(x))
        model = answer["model"]
        return Predictions(
            model["job"], model["round"], model["digest"], answer["predictions"], answer.get("file_outputs", {})
        )

    def add(self, x: Any, label: int | str | None = None, shape: tuple[int, int, int] | None = None) -> dict[str, Any]:
        """Add a sample to learn from, with its class by number or name, if it is known.

        Before the board has its first model, an image file needs the `shape` that this model will take, such as
        (3, 96, 96). Returns `id`, `kept`, `duplicate`, `label` and `part` (`train`, `val` or `test`).
        """
        values = {} if label is None else {"label": str(label)}
        if shape is not None:
            values["shape"] = ",".join(map(str, shape))
        query = f"?{urlencode(values, quote_via=quote, safe='')}" if values else ""
        return self._ask("POST", f"/v1/samples{query}", *_body(x))

    def label(self, sample: str, label: int | str) -> dict[str, Any]:
        """Label the sample of this `id` with a class, by number or name."""
        body = json.dumps({"label": label}).encode()
        return self._ask("POST", f"/v1/samples/{quote(sample, safe='')}/label", body, "application/json")

    def unlabelled_samples(self, most: int = 100) -> list[str]:
        """The `id` of samples without a label, the newest first."""
        return [str(sample) for sample in self._ask("GET", f"/v1/samples/unlabelled?most={most}")["samples"]]

    def sample(self, sample: str, kind: str = "application/x-npy") -> bytes:
        """A sample as a .npy file or, of a model that takes images, as the picture that it sees (`image/png`)."""
        return bytes(self._request("GET", f"/v1/samples/{quote(sample, safe='')}", None, {"Accept": kind}))

    def delete(self, sample: str) -> None:
        """Delete a sample; one that doesn't exist any more is fine."""
        try:
            self._ask("DELETE", f"/v1/samples/{quote(sample, safe='')}")
        except BoardError as error:
            if error.status != 404:
                raise

    def samples(self) -> dict[str, Any]:
        """The number of samples, by class and part, and their room."""
        return self._ask("GET", "/v1/samples")

    def status(self) -> dict[str, Any]:
        return self._ask("GET", "/v1/status")

    def healthy(self) -> bool:
        """Whether the board answers and a model serves."""
        try:
            return bool(self._ask("GET", "/v1/health").get("serves"))
        except BoardError:
            return False

    def _ask(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> dict[str, Any]:
        answer: dict[str, Any] = self._request(method, path, body, {"Content-Type": kind} if kind else {})
        return answer

    def _request(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> Any:
        for number in range(self._tries):
            last = number + 1 == self._tries
            try:
                status, answer = self._try_once(method, path, body, headers)
            except (OSError, http.client.HTTPException) as error:
                if last:
                    what = f"the board at {self._address} can't be reached ({error or type(error).__name__})"
                    raise BoardError(0, what, hint="See that fedprune-device runs with --local.") from error
            else:
                if status < 300:
                    return answer
                if status != 503 or last:
                    raise _error(status, answer)
            # Full jitter: those who were turned away together don't come back together.
            time.sleep(SystemRandom().uniform(0, min(_MAX_WAIT_S, 0.1 * 2.0**number)))
        raise BoardError(0, "no try was made")

    def _try_once(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, Any]:
        connection = _Connection(self._address, self._timeout)
        try:
            # A board that refuses a request may answer and hang up before it has read all of it.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, path, body, headers)
            response = connection.getresponse()
            raw = response.read(_MAX_ANSWER_BYTES)
            if response.status < 300 and "Accept" in headers:
                return response.status, raw
            try:
                answer = json.loads(raw)
            except ValueError as error:
                raise http.client.HTTPException(f"not JSON: {raw[:60]!r}") from error
            return response.status, answer if isinstance(answer, dict) else {}
        finally:
            connection.close()


class _Connection(http.client.HTTPConnection):
    def __init__(self, address: str, timeout: float) -> None:
        self._path = address.removeprefix("unix:") if address.startswith("unix:") else None
        super().__init__("localhost" if self._path else address, timeout=timeout)

    def connect(self) -> None:
        if self._path is None:
            super().connect()
            return
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # With this option `connect` waits for its turn among many clients. With Python's own timeout the socket
            # doesn't block, and on a Unix socket whose queue is full `connect` fails at once.
            seconds = float(self.timeout or 0)
            timeval = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        except OSError:
            self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
        self.sock.settimeout(self.timeout)


def _body(x: Any) -> tuple[bytes, str]:
    """The body of a request with samples, and its content type."""
    if isinstance(x, (bytes, bytearray)):
        return bytes(x), "image/png" if x[:4] == b"\x89PNG" else "image/jpeg"
    if not hasattr(x, "astype"):
        return json.dumps({"x": x}).encode(), "application/json"
    # An array: one safetensors file, whose form is its length, what is in it, and the numbers.
    are_whole = x.dtype.kind in "iu"
    data = x.astype("<i8" if are_whole else "<f4").tobytes()
    about = {"dtype": "I64" if are_whole else "F32", "shape": list(x.shape), "data_offsets": [0, len(data)]}
    head = json.dumps({"x": about}).encode()
    return len(head).to_bytes(8, "little") + head + data, "application/safetensors"


def _error(status: int, answer: dict[str, Any]) -> BoardError:
    error = answer.get("error")
    error = error if isinstance(error, dict) else {}
    texts = [str(error.get(name) or "") for name in ("what", "expected", "got", "hint")]
    return BoardError(status, texts[0] or f"the board answered {status}", *texts[1:])
