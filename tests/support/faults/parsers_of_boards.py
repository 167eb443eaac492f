"""Parsers on boards: requests of programs, and what a board keeps."""

import hashlib
import io
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from fedprune.core import tensorfile
from fedprune.core.atomic_file import read_document
from fedprune.core.errors import FedpruneError
from fedprune.wire.fleet_messages import CrashReport
from fedprune_device.api.address import LocalAddress
from fedprune_device.api.http_server import _Handler
from fedprune_device.api.request import LocalAnswer, Request
from fedprune_device.api.request_array import json_document, request_array, request_batch
from fedprune_device.data.image_decoding import Pixels
from fedprune_device.launcher.slot_store import SlotRecord, SlotStore
from fedprune_device.launcher.state import DamagedError, LauncherState
from fedprune_device.privacy.redaction import redact
from fedprune_device.sensors.config import read_sensor_config
from fedprune_device.sensors.sample_collector import DropCounts, SampleCollector
from fedprune_device.serving.model_slots import ServingRecord
from fedprune_device.storage.local_state import LocalState
from fedprune_device.telemetry.crash_reports import fault_frames
from support.faults.parser_target import Target, as_file, as_object, as_text, json_seeds, scratch
from support.faults.parsers_of_files import picture
from support.faults.parsers_of_samples import sample_targets

SHAPE = (3, 8, 8)
_FILES = 2 * 2**20  # bytes that numpy's, Pillow's and zipfile's machinery may take for any file


@cache
def board_targets() -> tuple[Target, ...]:
    """All of them."""
    return (*_requests(), *sample_targets(), *_slot_file_targets(), *_sensor_targets())


def _sensor_targets() -> tuple[Target, ...]:
    settings = (
        b'broker = "mqtt://a"\nboard = "127.0.0.1:80"\nperiod = 1\nmax_age = 9\n[[channels]]\ntopic = "t/+"\n'
        b'path = "a.b"\ntime = "t"\navailability = "t/+/s"\n[label]\ntopic = "l"\npath = ""\n'
    )
    file = scratch() / "messages.toml"
    file.write_bytes(settings)
    config = read_sensor_config(file)

    def receive(body: bytes) -> None:
        """Messages of anybody: none of them may end the program."""
        collector = SampleCollector(config, DropCounts())
        for topic in ("t/x", "t/x/s", "l"):
            collector.receive(topic, body, 0.0)
        collector.collect(1.0, 1)

    messages = b'{"a": {"b": 21.5}, "t": "2024-01-31T13:45:00Z"}', b"offline", b"21.5", b'{"state": "online"}'
    return (
        Target("sensors.message", receive, messages, text=True, errors=()),
        Target("sensors.settings", as_file(read_sensor_config, "sensors.toml"), (settings,), text=True, share=0.3),
    )


def _requests() -> tuple[Target, ...]:
    x = np.zeros((2, *SHAPE), np.float32)
    npy = io.BytesIO()
    np.save(npy, x)
    requests = (
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}",
        b"GET /v1/status HTTP/1.1\r\nHost: 127.0.0.1:80\r\n\r\n",
    )

    def body(kind: str) -> Callable[[bytes], object]:
        def parse_body(raw: bytes) -> object:
            array = request_array(Request("POST", "/v1/predict", {}, {"content-type": kind}, raw), SHAPE)
            return request_batch(array, SHAPE, 64)

        return parse_body

    def label(raw: bytes) -> object:
        return json_document(Request("POST", "/", {}, {"content-type": "application/json"}, raw), "label")

    def image(raw: bytes) -> object:
        return Pixels().read(raw, ("PNG", "JPEG"), SHAPE)

    return (
        Target("local.request", _handle_request, requests, text=True, constant=_FILES, share=0.5),
        Target(
            "local.json",
            body("application/json"),
            json_seeds({"x": x[0].tolist()}, {"x": x.tolist()}),
            text=True,
            factor=200,
        ),
        Target("local.label", label, json_seeds({"label": 3}), text=True),
        Target("local.safetensors", body("application/safetensors"), (tensorfile.encode({"x": x}),)),
        Target("local.npy", body("application/x-npy"), (npy.getvalue(),)),
        Target("local.raw numbers", body("application/octet-stream"), (x.tobytes(),)),
        Target("local.image", image, (picture("PNG"), picture("JPEG")), constant=200 * 2**20, share=0.5),
        Target(
            "local.address",
            as_text(LocalAddress.parse),
            (b"unix:/run/fedprune.sock", b"127.0.0.1:8080", b"[::1]:0"),
            text=True,
        ),
    )


class _Client:
    """A connection whose bytes are all there."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def makefile(self, mode: str, *_: object, **__: object) -> io.BytesIO:
        return io.BytesIO(self._raw) if "r" in mode else io.BytesIO()

    def recv(self, _: int) -> bytes:
        return b""

    def settimeout(self, *_: object) -> None: ...

    def setsockopt(self, *_: object) -> None: ...

    def shutdown(self, *_: object) -> None: ...

    def sendall(self, data: bytes) -> None:
        if not data.startswith(b"HTTP/1.1 ") and b'"error"' not in data and data != b"{}\n":
            raise ValueError(f"an answer {data[:100]!r}")


class _Server:
    """Answers every request that is one."""

    endpoints: Any = None

    def on_request_read(self, _: object) -> None: ...

    @staticmethod
    def answer(_: Request) -> LocalAnswer:
        return LocalAnswer({})


_Server.endpoints = _Server


def _handle_request(raw: bytes) -> object:
    try:
        return _Handler(_Client(raw), ("", 0), _Server())  # type: ignore[arg-type]
    except ConnectionAbortedError:  # the client went in the middle of a body
        return None


_FAULT = b"""Fatal Python error: Segmentation fault

Current thread 0x00007f (most recent call first):
  File "/opt/a/fedprune_device/agent/agent.py", line 12 in run
  File "/usr/lib/python3/dist-packages/numpy/x.py", line 9 in f
"""


def _fault(text: str) -> object:
    """What a board would tell of a fault."""
    return CrashReport("a", 1, 1, "signal", redact(text, 1000), tuple(fault_frames(text)), "fedprune", "")


def _document(body: bytes) -> bytes:
    text = body.decode("utf-8", "replace")
    return json.dumps({"body": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()


def _slot(body: bytes) -> bytes:
    text = body.decode("utf-8", "replace")
    return json.dumps({"format": 1, "body": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()


def _slot_file_targets() -> tuple[Target, ...]:
    serving = {
        "job": "j", "round": 1, "classes": 2, "offset": [0.0, 1.0], "slot": "a", "loss": "cross_entropy",
        "files": {"inference.onnx": "0" * 64, "weights.safetensors": "1" * 64}, "present": None, "precision": "float32",
    }  # fmt: skip
    home = SlotStore(scratch() / "home")
    home.folder.mkdir(parents=True, exist_ok=True)
    home.save(LauncherState("a", highest=3))
    home.write_record("a", SlotRecord(1, "0.1", "app:main", {"app.py": ("0" * 64, 3)}))
    state, record = (json.loads((home.folder / n).read_bytes())["body"].encode() for n in ("state.json", "a.json"))

    def load_state(raw: bytes) -> object:
        for name in ("state.json", "copy.json"):
            (home.folder / name).write_bytes(raw)
        return home.load()

    def load_record(raw: bytes) -> object:
        (home.folder / "a.json").write_bytes(raw)
        return home.record("a")

    return (
        Target("kept.document", as_file(read_document, "document"), (_document(b'{"a": 1}'),), text=True),
        Target(
            "kept.document's body",
            as_file(read_document, "document"),
            json_seeds({"a": 1, "b": [2]}),
            text=True,
            frame=_document,
        ),
        Target("kept.fault", as_text(_fault), (_FAULT,), text=True, constant=2**20),
        Target("kept.serving", as_object(ServingRecord.from_dict), json_seeds(serving), text=True),
        Target("kept.own", LocalState.from_bytes, (_own(),), share=0.5),
        Target("kept.launcher's state", load_state, (state,), text=True, share=0.5, frame=_slot),
        Target(
            "kept.slot's record",
            load_record,
            (record,),
            text=True,
            share=0.5,
            frame=_slot,
            errors=(DamagedError, FedpruneError),
        ),
    )


def _own() -> bytes:
    from dataclasses import fields

    values: dict[str, Any] = {
        "average": {"w": np.zeros((2, 2), np.float32)},
        "personal": {},
        "residual": {},
        "moments": {"w::momentum": np.zeros((2, 2), np.float32)},
        "mask": {},
    }
    for field in fields(LocalState):
        if field.name not in values:
            kind = str(field.type)
            values[field.name] = (1,) if "tuple" in kind else 1 if kind == "int" else 1.0 if kind == "float" else "0"
    return LocalState(**values).to_bytes()
