"""Endpoints of the local interface: predictions, samples, status."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from fedprune.core.errors import DataError, shape_text, value_text
from fedprune.model.features import JUDGED_LABELS, MULTI_LABELS, labels_of
from fedprune.model.input_type import FLOATS
from fedprune.model.lengths import Shape, fits_shape, shape_to_json
from fedprune_device.api.live_model import LiveModel, LoadedModel
from fedprune_device.api.request import LocalAnswer, Request, RequestError
from fedprune_device.api.request_array import KINDS, NPY, json_document, npy_bytes, request_array, request_batch
from fedprune_device.data.image_decoding import TYPES, Pixels, is_picture
from fedprune_device.data.sample_store import MAX_LABEL, AddedSample, SampleStore
from fedprune_device.data.stored_array import Array

MAX_BATCH = 64  # samples of one prediction: it holds the model's lock, and other requests wait for it
MAX_LISTED = 1000  # names of samples in one answer

_SAMPLE_PATH = re.compile(r"/v1/samples/([0-9a-f]{32})(/label)?")
_IMAGE_SHAPE = re.compile(r"[0-9]{1,5},[0-9]{1,5},[0-9]{1,5}")
_LOCAL_HOST = re.compile(r"(?:127\.0\.0\.1|localhost|\[::1\])(?::\d{1,5})?", re.IGNORECASE)

_PATHS = {
    "/v1/predict": ("POST",),
    "/v1/samples": ("GET", "POST"),
    "/v1/samples/unlabelled": ("GET",),
    "/v1/samples/ID": ("GET", "DELETE"),
    "/v1/samples/ID/label": ("POST",),
    "/v1/status": ("GET",),
    "/v1/health": ("GET",),
}
_QUERIES = {
    ("POST", "/v1/predict"): ("top",),
    ("POST", "/v1/samples"): ("label", "shape"),
    ("GET", "/v1/samples/unlabelled"): ("most",),
}


class Endpoints:
    """The endpoints of the local interface, for any thread.

    `samples` is None where the board's data comes from elsewhere. `allows_reading`: whether samples may be read, too; a
    port is open to all users of the machine.
    """

    def __init__(
        self,
        model: LiveModel,
        samples: SampleStore | None,
        status: Callable[[], dict[str, Any]],
        *,
        class_names: tuple[str, ...] = (),
        pixels: Pixels | None = None,
        allows_reading: bool = True,
    ) -> None:
        self._model, self._samples, self._status = model, samples, status
        self._class_names, self._pixels, self._allows_reading = class_names, pixels or Pixels(), allows_reading
        self._decoder = threading.Lock()  # one at a time, because a decoded image needs far more memory than its file

    def answer(self, request: Request) -> LocalAnswer:
        """Answer a request; raises the errors that `LocalAnswer.from_error` turns into answers."""
        # A web page may send requests to this machine. Its browser then names the page in Origin, or the host name that
        # the page used in Host.
        if "origin" in request.headers:
            raise RequestError(403, "requests of web pages are not answered")
        host = request.headers.get("host", "")
        if not _LOCAL_HOST.fullmatch(host):
            raise RequestError(403, "the header Host", expected="localhost or 127.0.0.1", got=value_text(host))
        match = _SAMPLE_PATH.fullmatch(request.path)
        name = request.path if match is None else "/v1/samples/ID" + (match[2] or "")
        if name not in _PATHS:
            raise RequestError(404, f"there is no {value_text(request.path)}", expected=" or ".join(_PATHS))
        if request.method not in _PATHS[name]:
            raise RequestError(405, f"{value_text(request.method)} of {name}", expected=", ".join(_PATHS[name]))
        query_names = _QUERIES.get((request.method, name), ())
        for name_in_query in request.query:
            if name_in_query not in query_names:
                expected = " or ".join(query_names) or "nothing"
                raise RequestError(400, "the query of the address", expected=expected, got=value_text(name_in_query))
        if match is not None:
            handle_sample = self._show_sample if request.method == "GET" else self._change_sample
            return handle_sample(request, match[1])
        if name == "/v1/samples/unlabelled":
            limit = _check_whole_number("most", request.query.get("most", "100"), 1, MAX_LISTED)
            return LocalAnswer({"samples": self._readable_samples().unlabelled_names(limit)})
        if request.method == "POST":
            return self._predict(request) if name == "/v1/predict" else self._add_sample(request)
        if name == "/v1/health":
            return LocalAnswer({"status": "ok", "serves": self._model.loaded is not None})
        return self._count_samples() if name == "/v1/samples" else self._status_answer()

    def _predict(self, request: Request) -> LocalAnswer:
        model = self._model.serving_model()  # the same model for the whole request
        top = None if "top" not in request.query else _check_whole_number("top", request.query["top"], 1, MAX_LABEL)
        x = request_batch(self._read_array(request, model), model.shape, MAX_BATCH, model.input_type)
        rows, file_outputs = self._model.predict(model, x)
        if not np.isfinite(rows).all():
            raise RequestError(500, "the model's outputs are not finite", hint="Check the scale of the input.")
        record = model.record
        names = {"class_names": list(self._class_names)} if self._class_names else {}
        if rows.ndim > 2 and top is not None:
            raise RequestError(400, "top", expected="a model with one row of outputs per sample", got=list(rows.shape))
        if rows.ndim > 2 and record.loss == "cross_entropy":
            # Without probabilities: those of every pixel would be a hundred times longer than the classes.
            predictions = [{"classes": row.argmax(0).tolist()} for row in rows]
        elif rows.ndim > 2:
            kind = "probabilities" if labels_of(record.loss) == MULTI_LABELS else "values"
            predictions = [{kind: row.tolist()} for row in rows]
        else:
            predictions = [self._prediction_row(row, record.loss, top) for row in rows.tolist()]
        answer = {"model": _model_row(model), "classes": record.classes, **names, "predictions": predictions}
        # JSON holds no numbers that aren't finite; probabilities of every position would be a hundred times longer than
        # decisions.
        short = {n: v for n, v in file_outputs.items() if v.dtype.kind != "f" or (v.ndim < 3 and np.isfinite(v).all())}
        if short:
            answer["file_outputs"] = {name: value.tolist() for name, value in short.items()}
        return LocalAnswer(answer)

    def _prediction_row(self, row: list[float], loss: str, top: int | None) -> dict[str, Any]:
        order = sorted(range(len(row)), key=lambda c: (-row[c], c))
        best = self._class_row(order[0], row[order[0]]) if loss == "cross_entropy" else {}
        if labels_of(loss) not in JUDGED_LABELS:
            return {"values": row}
        if top is None:
            return {**best, "probabilities": row}
        return {**best, "top": [self._class_row(c, row[c]) for c in order[:top]]}

    def _class_row(self, number: int, probability: float) -> dict[str, Any]:
        name = {"name": self._class_names[number]} if number < len(self._class_names) else {}
        return {"class": number, **name, "probability": probability}

    def _add_sample(self, request: Request) -> LocalAnswer:
        samples, model = self._sample_store(), self._model.loaded
        label = self._parse_label(request.query["label"]) if "label" in request.query else None
        x = self._read_array(request, model, self._stated_shape(request, model))
        if model is not None:
            x = request_batch(x, model.shape, 1, model.input_type)[0]
        elif x.dtype.kind == "f":
            x = x.astype(np.float32)
        elif x.dtype not in (np.int32, np.int64):
            raise DataError("type of a sample without a model", expected="float32", got=x.dtype, hint=FLOATS.hint)
        added = samples.add(x, label)
        return self._added_answer(added, 201 if added.kept and not added.duplicate else 200)

    def _change_sample(self, request: Request, name: str) -> LocalAnswer:
        samples = self._sample_store()
        if request.method == "POST":
            label = self._parse_label(json_document(request, "label")["label"])
            return self._added_answer(samples.label(name, label), 200)
        samples.delete(name)
        return LocalAnswer({"id": name, "kept": False})

    def _show_sample(self, request: Request, name: str) -> LocalAnswer:
        """The numbers of a sample, or its picture if the request accepts one."""
        x = self._readable_samples().read(name)
        if "image/png" in request.headers.get("accept", ""):
            with self._decoder:
                return LocalAnswer(self._pixels.png(x), kind="image/png")
        return LocalAnswer(npy_bytes(x), kind=NPY)

    def _readable_samples(self) -> SampleStore:
        if not self._allows_reading:
            raise RequestError(403, "samples are shown on a Unix socket alone", hint="Run the board with --local.")
        return self._sample_store()

    def _added_answer(self, added: AddedSample, status: int) -> LocalAnswer:
        body = asdict(added)
        if added.label is not None and added.label < len(self._class_names):
            body["name"] = self._class_names[added.label]
        return LocalAnswer(body, status)

    def _count_samples(self) -> LocalAnswer:
        counts = self._sample_store().counts()
        for label, row in counts["classes"].items():
            if int(label) < len(self._class_names):
                row["name"] = self._class_names[int(label)]
        return LocalAnswer(counts)

    def _status_answer(self) -> LocalAnswer:
        model = self._model.loaded
        serving = None if model is None else {**_model_row(model), "by": self._model.runtime}
        input_shape = self._input_shape(model)
        sizes = (None if isinstance(s, str) else s for s in input_shape or ())  # names of free sizes say nothing
        shape = None if input_shape is None else shape_to_json(tuple(sizes))
        return LocalAnswer({**self._status(), "serving": serving, "input": shape})

    def _sample_store(self) -> SampleStore:
        if self._samples is None:
            raise RequestError(
                409, "this board takes no samples", hint="It takes them where it was started with --data local."
            )
        return self._samples

    def _parse_label(self, value: object) -> int:
        """A class by its number or its name."""
        model = self._model.loaded
        if model is not None and model.record.loss != "cross_entropy":
            raise RequestError(409, "labels of this model aren't classes", got=f"loss {model.record.loss}")
        highest = MAX_LABEL if model is None else model.record.classes - 1
        highest = min(highest, len(self._class_names) - 1) if self._class_names else highest
        if isinstance(value, str) and value in self._class_names:
            return self._class_names.index(value)
        return _check_whole_number("label", value, 0, highest, ", or a class's name" if self._class_names else "")

    def _input_shape(self, model: LoadedModel | None) -> Shape | None:
        """The shape of a sample: the active model's; before the first model that of the offered one."""
        return model.shape if model is not None else None if self._samples is None else self._samples.input_shape

    def _stated_shape(self, request: Request, model: LoadedModel | None) -> Shape | None:
        """The shape that a request asks its image to have, for which a board without a model has no other source."""
        if (text := request.query.get("shape")) is None:
            return None
        if request.kind not in TYPES:
            raise RequestError(400, "shape in the query", expected=" or ".join(TYPES), got=value_text(request.kind))
        shape = tuple(map(int, text.split(","))) if _IMAGE_SHAPE.fullmatch(text) else ()
        max_numbers = self._sample_store().max_sample_bytes // 4
        if not is_picture(shape) or not 0 < math.prod(shape) <= max_numbers:
            expected = f"1 or 3 colours, height and width, such as 3,96,96, and at most {max_numbers} numbers in all"
            raise RequestError(422, "shape in the query", expected=expected, got=value_text(text))
        model_shape = self._input_shape(model)
        if model_shape is not None and not fits_shape(shape, model_shape):
            raise RequestError(
                422, "shape in the query", expected=f"that of the board's model, {shape_text(*model_shape)}",
                got=shape_text(*shape), hint="It is needed before the first model alone.",
            )  # fmt: skip
        return shape

    def _read_array(self, request: Request, model: LoadedModel | None, stated_shape: Shape | None = None) -> Array:
        shape = None if model is None else model.shape
        if request.kind in TYPES:
            size = self._input_shape(model) or stated_shape
            if size is None:
                raise RequestError(
                    503, "without a model the size of images is unknown",
                    hint="Add the shape that the model takes, such as ?shape=3,96,96: the server sends a model only to "
                    "boards with samples.",
                )  # fmt: skip
            with self._decoder:
                is_bytes = model is not None and model.input_type.is_bytes
                return self._pixels.read(request.body, (TYPES[request.kind],), size, as_bytes=is_bytes)
        if request.kind not in KINDS:
            kinds = " or ".join((*KINDS, *TYPES))
            raise RequestError(415, "the header Content-Type", expected=kinds, got=value_text(request.kind))
        return request_array(request, shape, FLOATS if model is None else model.input_type)


def _model_row(model: LoadedModel) -> dict[str, Any]:
    record = model.record
    return {"job": record.job, "round": record.round, "digest": record.weights}


def _check_whole_number(subject: str, value: object, low: int, high: int, alternative: str = "") -> int:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
        value = int(value)
    # JSON's true is an int in Python.
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        expected = f"a whole number from {low} to {high}{alternative}"
        raise RequestError(422, subject, expected=expected, got=value_text(value))
    return value
