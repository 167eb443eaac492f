"""The model that answers predictions: the old one, until a new one is loaded completely and has passed its check."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedprune.core.closeable import Closeable
from fedprune.core.errors import FedpruneError
from fedprune.model.input_type import InputType
from fedprune.model.lengths import Shape
from fedprune_device.api.request import RequestError
from fedprune_device.data.stored_array import Array
from fedprune_device.engines.engine_selector import EngineRequest, EngineSelector
from fedprune_device.serving.model_slots import ModelSlots, ServingRecord
from fedprune_device.serving.prediction_text import likelihoods
from fedprune_device.serving.predictor import Predictor

_LOG = logging.getLogger("fedprune.device")

# How often the pointer's file is looked at: a stat costs microseconds, and a new model serves soon after its round.
_POLL_INTERVAL_S = 0.5
# Between two tries at a model that can't be loaded; each pause is twice the last. The reason may have been a lack of
# memory, which passes, or a model that never loads, which must not take the processor from training.
_FIRST_PAUSE_S, _MAX_PAUSE_S = 5.0, 600.0


@dataclass(frozen=True)
class LoadedModel:
    predictor: Predictor
    record: ServingRecord

    @property
    def shape(self) -> Shape:
        return self.predictor.input_shape

    @property
    def input_type(self) -> InputType:
        return self.predictor.input_type


class LiveModel(Closeable):
    """Follows the serving folder of a state directory, in a thread of its own."""

    def __init__(self, serving: Path, *, cuda: bool = False, selector: EngineSelector | None = None) -> None:
        self._slots, self._pointer = ModelSlots(serving), serving / "serving.json"
        self._cuda, self._selector = cuda, selector
        self.loaded: LoadedModel | None = None
        self._loaded_pointer: tuple[int, ...] | None = None  # the pointer to what is loaded
        self._tried_pointer: tuple[int, ...] | None = None
        self._pause_s, self._retry_at = 0.0, 0.0
        # More predictions at a time would only share the same cores.
        self._prediction_lock = threading.Lock()
        self._poll_lock = threading.Lock()
        self._stopping = threading.Event()
        self._poll_safely()
        self._thread = threading.Thread(target=self._follow, name="fedprune-live-model", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop following the folder; the loaded model still answers."""
        self._stopping.set()
        self._thread.join()
        if self._selector is not None:
            self._selector.close()

    @property
    def runtime(self) -> str:
        """The runtime of the answers and, if it is not an engine, the reason."""
        return "onnxruntime" if self._selector is None else self._selector.status

    def serving_model(self) -> LoadedModel:
        """The active model; raises `RequestError` before the first one."""
        if self.loaded is None:
            raise RequestError(503, "no model serves yet", hint="The board must finish a round first.")
        return self.loaded

    def predict(self, model: LoadedModel, x: Array) -> tuple[npt.NDArray[np.float64], dict[str, Array]]:
        """Predictions of samples [n, ...] as rows [n, outputs], adjusted by the board's own label shares, and the
        outputs of the user's own file by name (`Predictor.file_outputs`).

        `model` answers even if another one has become active. Raises `ModelError` if an operator fails.
        """
        with self._prediction_lock:
            logits = model.predictor.predict(model.record.scaling(x))
        outputs = model.record.scaling.invert(model.record.adjustment(logits))
        file_outputs = model.predictor.file_outputs(outputs)
        return likelihoods(model.record.loss, outputs.astype(np.float64)), file_outputs

    def poll(self) -> None:
        with self._poll_lock:
            self._load_new_model()
            # Let an engine answer in place of onnxruntime, once one is built.
            session, model = None if self._selector is None else self._selector.turn(), self.loaded
            if session is not None and model is not None:
                self.loaded = LoadedModel(Predictor(self._slots.folder(model.record), session=session), model.record)

    def _load_new_model(self) -> None:
        try:
            status = self._pointer.stat()
            pointer = status.st_ino, status.st_mtime_ns, status.st_size
        except OSError:
            return
        now = time.monotonic()
        if pointer == self._loaded_pointer or (pointer == self._tried_pointer and now < self._retry_at):
            return
        self._pause_s = min(2 * self._pause_s, _MAX_PAUSE_S) if pointer == self._tried_pointer else _FIRST_PAUSE_S
        self._tried_pointer, self._retry_at = pointer, now + self._pause_s
        try:
            predictor, record = self._slots.open(cuda=self._cuda)
            if self.loaded is None or record != self.loaded.record:
                predictor.check(record.classes)
                self.loaded = LoadedModel(predictor, record)
                _LOG.info("round %d of job %s answers predictions", record.round, record.job)
                if self._selector is not None:
                    request = EngineRequest.for_serving(predictor, self._slots.folder(record), record)
                    self._selector.request_engine(request)
            self._loaded_pointer = pointer
        except FedpruneError as error:
            _LOG.warning("the new model doesn't answer predictions; trying again in %g s: %s", self._pause_s, error)

    def _follow(self) -> None:
        while not self._stopping.wait(_POLL_INTERVAL_S):
            self._poll_safely()

    def _poll_safely(self) -> None:
        try:
            self.poll()
        except Exception:  # noqa: BLE001 - whatever a model does, predictions go on
            _LOG.exception("unexpected error while loading a model; the old one answers")
