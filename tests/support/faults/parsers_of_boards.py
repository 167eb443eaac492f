"""Parsers on boards: requests of programs, samples, and what a board keeps."""

from __future__ import annotations

import hashlib
import io
import json
from argparse import Namespace
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core import tensorfile
from fedprune.core.atomic_file import read_document
from fedprune.core.errors import FedpruneError
from fedprune.wire.fleet_messages import CrashReport
from fedprune_device.api.address import Address
from fedprune_device.api.http_server import _Handler
from fedprune_device.api.request import Answer, Request, array, batch, document
from fedprune_device.cli.predict import _samples as samples_to_predict
from fedprune_device.data.audio_decoding import Audio
from fedprune_device.data.boxes import coco_boxes, yolo_boxes
from fedprune_device.data.dataset import load_data, read_arrays
from fedprune_device.data.image_decoding import Pixels, mask
from fedprune_device.data.labels import Targets
from fedprune_device.data.segment_log import Kind, SegmentLog
from fedprune_device.data.segment_log import LogRecord as Sample
from fedprune_device.data.splits import SplitShares
from fedprune_device.data.table_windows import TableFile
from fedprune_device.launcher.slot_store import SlotRecord, SlotStore
from fedprune_device.launcher.state import DamagedError, LauncherState
from fedprune_device.privacy.redaction import private
from fedprune_device.serving.model_slots import Serving
from fedprune_device.storage.local_state import LocalState
from fedprune_device.telemetry.crash_reports import _fault_frames
from fedprune_device.telemetry.log_buffer import LogBuffer
from support.fakes.sample_files import wav
from support.faults.parser_target import Target, as_file, as_object, as_text, dumped, scratch
from support.faults.parsers_of_files import npz, picture

SHAPE = (3, 8, 8)
COCO = {
    "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}],
    "categories": [{"id": 3, "name": "dog"}],
    "annotations": [{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3.5, 4]}],
}
_FILES = 2 * 2**20  # bytes that numpy's, Pillow's and zipfile's machinery may take for any file


def to_predict(path: Path) -> object:
    """The samples that `fedprune-device predict --input` reads."""
    others = {"class_names": (), "device": "", "seed": 0, "validation_share": 0.0}
    return samples_to_predict(Namespace(input=path, split=None, **others), (4,), ())


def to_train(path: Path) -> object:
    """The windows of a table that `fedprune-device train --data` reads."""
    return TableFile(path, SplitShares(0.0), 10).snapshot((1, 1), Targets("cross_entropy", 2))


@cache
def board_targets() -> tuple[Target, ...]:
    """All of them."""
    return (*_requests(), *_samples(), *_kept())


def _requests() -> tuple[Target, ...]:
    x = np.zeros((2, *SHAPE), np.float32)
    npy = io.BytesIO()
    np.save(npy, x)
    said = (
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}",
        b"GET /v1/status HTTP/1.1\r\nHost: 127.0.0.1:80\r\n\r\n",
    )

    def body(kind: str) -> Callable[[bytes], object]:
        def parsed(raw: bytes) -> object:
            found = array(Request("POST", "/v1/predict", {}, {"content-type": kind}, raw), SHAPE, tokens=False)
            return batch(found, SHAPE, 64, tokens=False)

        return parsed

    def label(raw: bytes) -> object:
        return document(Request("POST", "/", {}, {"content-type": "application/json"}, raw), "label")

    def image(raw: bytes) -> object:
        return Pixels().read(raw, ("PNG", "JPEG"), SHAPE)

    return (
        Target("local.request", _asked, said, text=True, constant=_FILES, share=0.5),
        Target(
            "local.json",
            body("application/json"),
            dumped({"x": x[0].tolist()}, {"x": x.tolist()}),
            text=True,
            factor=200,
        ),
        Target("local.label", label, dumped({"label": 3}), text=True),
        Target("local.safetensors", body("application/safetensors"), (tensorfile.encode({"x": x}),)),
        Target("local.npy", body("application/x-npy"), (npy.getvalue(),)),
        Target("local.raw numbers", body("application/octet-stream"), (x.tobytes(),)),
        Target("local.image", image, (picture("PNG"), picture("JPEG")), constant=200 * 2**20, share=0.5),
        Target(
            "local.address",
            as_text(Address.parse),
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

    def arrived(self, _: object) -> None: ...

    @staticmethod
    def answer(_: Request) -> Answer:
        return Answer({})


_Server.endpoints = _Server


def _asked(raw: bytes) -> object:
    try:
        return _Handler(_Client(raw), ("", 0), _Server())  # type: ignore[arg-type]
    except ConnectionAbortedError:  # the client went in the middle of a body
        return None


def _samples() -> tuple[Target, ...]:
    x, y = np.zeros((4, *SHAPE), np.float32), np.arange(4)
    sets = npz(x=x, y=y), npz(np.savez, x_train=x, y_train=y, x_test=x, y_test=y)
    npy = io.BytesIO()
    np.save(npy, x)
    folder = scratch() / "segments"
    folder.mkdir(exist_ok=True)
    log = SegmentLog(folder, b"key", 2**20)
    list(log.replay())
    log.append([Sample(Kind.COUNTS, b"n" * 16, 1, 1, b"payload")])
    log.close()
    sound = log.path(1).read_bytes()

    def segment(raw: bytes) -> object:
        log.path(1).write_bytes(raw)
        return list(SegmentLog(folder, b"key", 2**20).replay())

    return (
        Target("samples.npz", as_file(read_arrays, "board.npz"), sets, factor=2200, constant=_FILES, share=0.2),
        Target(
            "samples.data",
            as_file(lambda p: load_data(str(p)), "data.npz"),
            sets,
            factor=2200,
            constant=_FILES,
            share=0.2,
        ),
        Target(
            "samples.to predict",
            as_file(to_predict, "inputs"),
            (sets[0], npy.getvalue()),
            factor=2200,
            constant=_FILES,
            share=0.2,
        ),
        Target(
            "samples.recording",
            lambda raw: Audio().samples(raw, (1, 8)),
            (wav(b"\0\1" * 99), wav(b"abcdef" * 40, 2, 3, 48000)),
            factor=200,
            constant=200 * 2**20,
            share=0.5,
        ),
        Target("samples.mask", lambda raw: mask(raw, 4, 4), (picture("PNG", "L"),), constant=200 * 2**20, share=0.5),
        Target("samples.boxes", yolo_boxes, (b"1 .5 .5 .25 .5\n0 .1 .2 .1 .1\n",), text=True),
        Target("samples.coco", coco_boxes, dumped(COCO), text=True),
        Target(
            "samples.table",
            as_file(to_train, "table.csv"),
            (b"time,a,class\n1,2,0\n2,2.5,1\n",),
            text=True,
            constant=2**20,
        ),
        Target("samples.segment", segment, (sound,), share=0.5),
    )


_LINE = {"number": 8, "at": 1, "level": "error", "count": 2, "text": "too hot: 81 °C"}
_FAULT = b"""Fatal Python error: Segmentation fault

Current thread 0x00007f (most recent call first):
  File "/opt/a/fedprune_device/agent/agent.py", line 12 in run
  File "/usr/lib/python3/dist-packages/numpy/x.py", line 9 in f
"""


def _log_kept(path: Path) -> object:
    """What a board takes up of its log, and would tell of it."""
    log = LogBuffer(path.parent, "a", lambda: 1.0, lambda: 1.0)
    told = log.take(64, 10**6)
    return None if told is None else told.to_bytes()


def _fault(text: str) -> object:
    """What a board would tell of a fault."""
    return CrashReport("a", 1, 1, "signal", private(text, 1000), tuple(_fault_frames(text)), "fedprune", "")


def _document(body: bytes) -> bytes:
    text = body.decode("utf-8", "replace")
    return json.dumps({"body": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()


def _slot(body: bytes) -> bytes:
    text = body.decode("utf-8", "replace")
    whole = {"format": 1, "body": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return json.dumps(whole).encode()


def _kept() -> tuple[Target, ...]:
    serving = {
        "job": "j", "round": 1, "classes": 2, "inference": "0" * 64, "weights": "1" * 64, "offset": [0.0, 1.0],
        "slot": "a", "loss": "cross_entropy", "present": None, "precision": "float32", "lowered": [],
    }  # fmt: skip
    home = SlotStore(scratch() / "home")
    home.folder.mkdir(parents=True, exist_ok=True)
    home.save(LauncherState("a", highest=3))
    home.write_record("a", SlotRecord(1, "0.1", "app:main", {"app.py": ("0" * 64, 3)}))
    state, record = (json.loads((home.folder / n).read_bytes())["body"].encode() for n in ("state.json", "a.json"))

    def loaded(raw: bytes) -> object:
        for name in ("state.json", "copy.json"):
            (home.folder / name).write_bytes(raw)
        return home.load()

    def recorded(raw: bytes) -> object:
        (home.folder / "a.json").write_bytes(raw)
        return home.record("a")

    return (
        Target("kept.document", as_file(read_document, "document"), (_document(b'{"a": 1}'),), text=True),
        Target(
            "kept.document's body",
            as_file(read_document, "document"),
            dumped({"a": 1, "b": [2]}),
            text=True,
            frame=_document,
        ),
        Target(
            "kept.log",
            as_file(_log_kept, "log.json"),
            dumped({"number": 9, "lines": [_LINE]}),
            text=True,
            frame=_document,
            constant=2**20,
        ),
        Target("kept.fault", as_text(_fault), (_FAULT,), text=True, constant=2**20),
        Target("kept.serving", as_object(Serving.from_dict), dumped(serving), text=True),
        Target("kept.own", LocalState.from_bytes, (_own(),), share=0.5),
        Target("kept.launcher's state", loaded, (state,), text=True, share=0.5, frame=_slot),
        Target(
            "kept.slot's record",
            recorded,
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
        "mask": None,
    }
    for field in fields(LocalState):
        if field.name not in values:
            kind = str(field.type)
            values[field.name] = (1,) if "tuple" in kind else 1 if kind == "int" else 1.0 if kind == "float" else "0"
    return LocalState(**values).to_bytes()
