"""Endpoints of the local interface: predictions, samples, status."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import shown
from fedprune.model.lengths import Shape, written
from fedprune.model.recipe import JUDGED, MULTI, labels_of
from fedprune_device.api.live_model import LiveModel, LoadedModel
from fedprune_device.api.request import KINDS, NPY, Answer, Request, RequestError, array, batch, document, npy
from fedprune_device.data.dataset import Array
from fedprune_device.data.image_decoding import TYPES, Pixels
from fedprune_device.data.sample_store import MAX_LABEL, Added, NoSampleError, SampleConflictError, SampleStore

# Samples of one prediction: it holds the model's lock, and other requests wait for it.
MAX_BATCH = 64
# Names of samples in one answer.
MAX_LISTED = 1000

_SAMPLE = re.compile(r"/v1/samples/([0-9a-f]{32})(/label)?")
_LOCAL = re.compile(r"(?:127\.0\.0\.1|localhost|\[::1\])(?::\d{1,5})?", re.IGNORECASE)

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
    ("POST", "/v1/predict"): "top",
    ("POST", "/v1/samples"): "label",
    ("GET", "/v1/samples/unlabelled"): "most",
}


class Endpoints:
    """The endpoints of the local interface, for any thread.

    `samples` is None where the board's data comes from elsewhere. `shows`: whether samples may be read, too; a port is
    open to all users of the machine.
    """

    def __init__(
        self,
        model: LiveModel,
        samples: SampleStore | None,
        status: Callable[[], dict[str, Any]],
        *,
        class_names: tuple[str, ...] = (),
        pixels: Pixels | None = None,
        shows: bool = True,
    ) -> None:
        self._model, self._samples, self._status = model, samples, status
        self._names, self._pixels, self._shows = class_names, pixels or Pixels(), shows
        self._decoder = threading.Lock()  # one at a time, because a decoded image needs far more memory than its file

    def answer(self, request: Request) -> Answer:
        """Answer a request; raises the errors that `Answer.of` turns into answers."""
        # A web page may send requests to this machine. Its browser then names the page in Origin, or the host name that
        # the page used in Host.
        if "origin" in request.headers:
            raise RequestError(403, "requests of web pages are not answered")
        host = request.headers.get("host", "")
        if not _LOCAL.fullmatch(host):
            raise RequestError(403, "the header Host", expected="localhost or 127.0.0.1", got=shown(host))
        match = _SAMPLE.fullmatch(request.path)
        name = request.path if match is None else "/v1/samples/ID" + (match[2] or "")
        if name not in _PATHS:
            raise RequestError(404, f"there is no {shown(request.path)}", expected=" or ".join(_PATHS))
        if request.method not in _PATHS[name]:
            raise RequestError(405, f"{shown(request.method)} of {name}", expected=", ".join(_PATHS[name]))
        query_name = _QUERIES.get((request.method, name))
        for name_in_query in request.query:
            if name_in_query != query_name:
                expected = query_name or "nothing"
                raise RequestError(400, "the query of the address", expected=expected, got=shown(name_in_query))
        if match is not None:
            return self._show(request, match[1]) if request.method == "GET" else self._change(request, match[1])
        if name == "/v1/samples/unlabelled":
            return self._unlabelled(request)
        if request.method == "POST":
            return self._predict(request) if name == "/v1/predict" else self._add(request)
        return {"/v1/samples": self._counts, "/v1/status": self._standing, "/v1/health": self._health}[name]()

    def _predict(self, request: Request) -> Answer:
        model = self._model.serving()  # the same model for the whole request
        top = None if "top" not in request.query else _whole("top", request.query["top"], 1, MAX_LABEL)
        x = batch(self._array(request, model), model.shape, MAX_BATCH, tokens=model.tokens)
        rows = self._model.predict(model, x)
        if not np.isfinite(rows).all():
            raise RequestError(500, "the model's outputs are not finite", hint="Check the scale of the input.")
        record = model.record
        names = {"class_names": list(self._names)} if self._names else {}
        if rows.ndim > 2 and top is not None:
            raise RequestError(400, "top", expected="a model with one row of outputs per sample", got=list(rows.shape))
        if rows.ndim > 2:
            predictions = [_of_places(row, record.loss) for row in rows]
        else:
            predictions = [self._row(row, record.loss, top) for row in rows.tolist()]
        return Answer({"model": _named(model), "classes": record.classes, **names, "predictions": predictions})

    def _row(self, row: list[float], loss: str, top: int | None) -> dict[str, Any]:
        order = sorted(range(len(row)), key=lambda c: (-row[c], c))
        best = self._one(order[0], row[order[0]]) if loss == "cross_entropy" else {}
        if labels_of(loss) not in JUDGED:
            return {"values": row}
        if top is None:
            return {**best, "probabilities": row}
        return {**best, "top": [self._one(c, row[c]) for c in order[:top]]}

    def _one(self, number: int, probability: float) -> dict[str, Any]:
        name = {"name": self._names[number]} if number < len(self._names) else {}
        return {"class": number, **name, "probability": probability}

    def _add(self, request: Request) -> Answer:
        samples, model = self._set(), self._model.loaded
        label = self._label(request.query["label"]) if "label" in request.query else None
        x = self._array(request, model)
        if model is not None:
            x = batch(x, model.shape, 1, tokens=model.tokens)[0]
        elif x.dtype.kind == "f":
            x = x.astype(np.float32)
        try:
            added = samples.add(x, label)
        except SampleConflictError as error:
            raise RequestError.of(409, error) from error
        return self._told(added, 201 if added.kept and not added.duplicate else 200)

    def _change(self, request: Request, name: str) -> Answer:
        samples = self._set()
        try:
            if request.method == "POST":
                return self._told(samples.label(name, self._label(document(request, "label")["label"])), 200)
            samples.delete(name)
            return Answer({"id": name, "kept": False})
        except NoSampleError as error:
            raise RequestError.of(404, error) from error

    def _show(self, request: Request, name: str) -> Answer:
        """The numbers of a sample, or its picture if the request accepts one."""
        try:
            x = self._shown().read(name)
        except NoSampleError as error:
            raise RequestError.of(404, error) from error
        if "image/png" in request.headers.get("accept", ""):
            with self._decoder:
                return Answer(self._pixels.png(x), kind="image/png")
        return Answer(npy(x), kind=NPY)

    def _unlabelled(self, request: Request) -> Answer:
        limit = _whole("most", request.query.get("most", "100"), 1, MAX_LISTED)
        return Answer({"samples": self._shown().unlabelled(limit)})

    def _shown(self) -> SampleStore:
        if not self._shows:
            raise RequestError(403, "samples are shown on a Unix socket alone", hint="Run the board with --local.")
        return self._set()

    def _told(self, added: Added, status: int) -> Answer:
        body = asdict(added)
        if added.label is not None and added.label < len(self._names):
            body["name"] = self._names[added.label]
        return Answer(body, status)

    def _counts(self) -> Answer:
        counts = self._set().counts()
        for label, row in counts["classes"].items():
            if int(label) < len(self._names):
                row["name"] = self._names[int(label)]
        return Answer(counts)

    def _standing(self) -> Answer:
        model = self._model.loaded
        serving = None if model is None else {**_named(model), "by": self._model.answers}
        input_shape = self._input(model)
        sizes = (None if isinstance(s, str) else s for s in input_shape or ())  # names of free sizes say nothing
        shape = None if input_shape is None else written(tuple(sizes))
        return Answer({**self._status(), "serving": serving, "input": shape})

    def _health(self) -> Answer:
        return Answer({"status": "ok", "serves": self._model.loaded is not None})

    def _set(self) -> SampleStore:
        if self._samples is None:
            raise RequestError(
                409, "this board takes no samples", hint="It takes them where it was started with --data local."
            )
        return self._samples

    def _label(self, value: object) -> int:
        """A class by its number or its name."""
        model = self._model.loaded
        if model is not None and model.record.loss != "cross_entropy":
            raise RequestError(409, "labels of this model aren't classes", got=f"loss {model.record.loss}")
        highest = MAX_LABEL if model is None else model.record.classes - 1
        highest = min(highest, len(self._names) - 1) if self._names else highest
        if isinstance(value, str) and value in self._names:
            return self._names.index(value)
        return _whole("label", value, 0, highest, ", or a class's name" if self._names else "")

    def _input(self, model: LoadedModel | None) -> Shape | None:
        """The shape of a sample: the active model's; before the first model that of the offered one."""
        return model.shape if model is not None else None if self._samples is None else self._samples.input

    def _array(self, request: Request, model: LoadedModel | None) -> Array:
        shape = None if model is None else model.shape
        if request.kind in TYPES:
            size = self._input(model)
            if size is None:
                raise RequestError(
                    503, "without a model the size of images is unknown", hint="Wait for the first round's offer."
                )
            with self._decoder:
                return self._pixels.read(request.body, (TYPES[request.kind],), size)
        if request.kind not in KINDS:
            kinds = " or ".join((*KINDS, *TYPES))
            raise RequestError(415, "the header Content-Type", expected=kinds, got=shown(request.kind))
        return array(request, shape, tokens=model is not None and model.tokens)


def _named(model: LoadedModel) -> dict[str, Any]:
    record = model.record
    return {"job": record.job, "round": record.round, "digest": record.weights}


def _of_places(row: npt.NDArray[np.float64], loss: str) -> dict[str, Any]:
    """The predictions [K, ...] of a sample, one per position (pixel, time step)."""
    # Without probabilities: those of every pixel would be a hundred times longer than the classes.
    if loss == "cross_entropy":
        return {"classes": row.argmax(0).tolist()}
    return {"probabilities" if labels_of(loss) == MULTI else "values": row.tolist()}


def _whole(subject: str, value: object, low: int, high: int, alternative: str = "") -> int:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
        value = int(value)
    # JSON's true is an int in Python.
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(422, subject, expected=f"a whole number from {low} to {high}{alternative}", got=shown(value))
    return value
