"""The model that answers predictions: always a whole one, the old one until the new one has passed its check."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedprune.errors import FedpruneError
from fedprune_device.data import Array, Shape
from fedprune_device.local.request import RequestError
from fedprune_device.predictions import likely
from fedprune_device.predictor import Predictor
from fedprune_device.slots import Serving, Slots

_LOG = logging.getLogger("fedprune.device")

_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Loaded:
    """A model with all that is said of it.

    Attributes:
        predictor: The model.
        record: What it is.
    """

    predictor: Predictor
    record: Serving

    @property
    def shape(self) -> Shape:
        """One sample's shape."""
        return self.predictor.input_shape

    @property
    def tokens(self) -> bool:
        """Whether it takes whole numbers."""
        return self.predictor.takes_tokens


class LiveModel:
    """Follows the serving folder of a state directory, in a thread of its own.

    Args:
        serving: The folder.
        threads: Threads that predict, beside those that train.
    """

    def __init__(self, serving: Path, threads: int = 1) -> None:
        self._slots, self._pointer = Slots(serving), serving / "serving.json"
        self._threads = threads
        self._loaded: Loaded | None = None
        self._seen: tuple[int, ...] | None = None
        self._lock = threading.Lock()  # more predictions at a time would only share the same cores
        self._stopping = threading.Event()
        self.look()
        self._thread = threading.Thread(target=self._watch, name="fedprune-live-model", daemon=True)
        self._thread.start()

    def __enter__(self) -> LiveModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Follow no longer; what is loaded still answers."""
        self._stopping.set()
        self._thread.join()

    @property
    def loaded(self) -> Loaded | None:
        """What answers now; None before the first model."""
        return self._loaded

    def serving(self) -> Loaded:
        """What answers now.

        Raises:
            RequestError: Nothing yet.
        """
        if self._loaded is None:
            raise RequestError(503, "no model serves yet", hint="The board must finish a round first.")
        return self._loaded

    def predict(self, model: Loaded, x: Array) -> npt.NDArray[np.float64]:
        """What a model says of samples: probabilities of classes or labels, or numbers.

        Args:
            model: The model; the same one to the end, whatever serves meanwhile.
            x: Samples [n, ...].

        Returns:
            Rows [n, outputs], with what the board's own labels say in them.

        Raises:
            ModelError: An operator fails.
        """
        with self._lock:
            logits = model.predictor.predict(x)
        return likely(model.record.loss, model.record.own(logits).astype(np.float64))

    def look(self) -> None:
        """Load what serves, if it is another model; what can't be loaded or fails its check is left alone."""
        try:
            status = self._pointer.stat()
            found = status.st_ino, status.st_mtime_ns, status.st_size
        except OSError:
            return
        if found == self._seen:
            return
        self._seen = found
        try:
            predictor, record = self._slots.open(self._threads)
            if self._loaded is None or record != self._loaded.record:
                predictor.check(record.classes)
                self._loaded = Loaded(predictor, record)
                _LOG.info("round %d of job %s answers predictions", record.round, record.job)
        except FedpruneError as error:
            _LOG.warning("the new model doesn't answer predictions: %s", error)

    def _watch(self) -> None:
        while not self._stopping.wait(_LOOK_SECONDS):
            self._look_safely()

    def _look_safely(self) -> None:
        try:
            self.look()
        except Exception:  # noqa: BLE001 - whatever a model does, predictions go on
            _LOG.exception("unexpected error while loading a model; the old one answers")
