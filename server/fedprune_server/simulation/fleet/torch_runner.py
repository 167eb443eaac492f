"""Virtual devices that train with torch, one after the other or many at once, on a CPU or a GPU.

What a device does with an offer is the board's own code (`fedprune_device.training.round_runner.Workbench`); only the
sessions that compute steps and predictions are torch's. Many devices are worked out at once by letting each one's
workbench run in a thread of its own and answering the steps that all of them wait for together (`ensemble`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.core.errors import FedpruneError, MissingExtraError, ModelError, RuntimeUnavailableError
from fedprune.training import step_contract
from fedprune.training.recipe import Recipe
from fedprune_device.serving.model_slots import Slots
from fedprune_device.serving.predictor import WEIGHTS, Predictor
from fedprune_device.training.loaded import LoadedTrainer
from fedprune_device.training.trainer import Trainer
from fedprune_export.pruning.model import Model
from fedprune_server.simulation.fleet.ensemble import Ensemble
from fedprune_server.simulation.fleet.prepared_runner import Done, PreparedBench
from fedprune_server.simulation.fleet.virtual_device import Outcome, VirtualDevice, Work

if TYPE_CHECKING:  # torch is an extra
    from fedprune_export.eager.inference import Inference, Predictions
    from fedprune_export.eager.training import TrainingStep

Array = npt.NDArray[Any]

_STEPS = 8
"""Training graphs whose steps are kept."""


class TorchTrainer(LoadedTrainer):
    """Loads trainers and models whose sessions are torch's.

    Args:
        model: The model.
        device: `cpu`, `cuda` or `cuda:1`.

    Raises:
        MissingExtraError: torch is not installed.
        RuntimeUnavailableError: torch doesn't have the device.
    """

    def __init__(self, model: Model, device: str = "cpu") -> None:
        super().__init__(keep=True)
        _prepared(device)
        from fedprune_export.eager.inference import Predictions

        self.predictions: Predictions = Predictions(model, device)
        self.recipe = Recipe()
        self._model = model
        self._device = device
        self._steps: OrderedDict[tuple[str, str, str], TrainingStep] = OrderedDict()
        self._lock = threading.Lock()

    def step(self, sha256: str, read: Callable[[], bytes], recipe: Recipe) -> TrainingStep:
        """The step of a training graph.

        Args:
            sha256: The graph.
            read: Gives its bytes, if they are needed.
            recipe: What it is used for.

        Raises:
            ModelError: It can't be read, or the model has an operator that torch is not told about here.
        """
        from fedprune_export.eager.training import TrainingStep

        key = (sha256, recipe.loss, recipe.optimizer)
        with self._lock:
            if key not in self._steps:
                self._steps[key] = TrainingStep(self._model, _graph(read()), recipe, self._device)
                while len(self._steps) > _STEPS:
                    self._steps.popitem(last=False)
            self._steps.move_to_end(key)
            return self._steps[key]

    def of(self, sha256: str, read: Callable[[], bytes], blocked: Callable[[], bytes] | None = None) -> Trainer:
        """See `LoadedTrainer.of`; layouts are torch's own matter."""
        return self.trainer(self.step(sha256, read, self.recipe))

    def trainer(self, session: Any) -> Trainer:
        """A board's trainer that a session of torch works for."""
        return Trainer(b"", session=session)

    def predictor(self, model: Path) -> Predictor:
        """See `LoadedTrainer.predictor`; of the staged files only the weights are read."""
        return Predictor(model, session=self.inference(model))

    def inference(self, model: Path) -> Inference:
        """The session of a staged model."""
        from fedprune_export.eager.inference import Inference

        return Inference(self.predictions, tensorfile.decode((model / WEIGHTS).read_bytes()))


@dataclass(frozen=True, eq=False)
class Request:
    """What a device's workbench wants computed.

    Attributes:
        session: A step, or a model that predicts.
        feeds: Arrays by input name.
        outputs: Names of what is wanted.
        resident: Whether arrays may stay where they are computed.
    """

    session: Any
    feeds: dict[str, Array]
    outputs: tuple[str, ...]
    resident: bool

    @property
    def predicts(self) -> bool:
        """Whether logits are wanted, and no step."""
        return step_contract.LOGITS in self.session.outputs

    def kind(self) -> Hashable:
        """What requests have in common that are answered together: all but weights and samples."""
        if self.predicts:
            weights = tuple((n, v.shape) for n, v in self.session.tensors.items())
            return (weights, self.feeds[step_contract.X].shape[1:])
        shapes = tuple(
            (n, np.shape(v)[1:] if n in step_contract.OF_SAMPLES else np.shape(v))
            for n, v in sorted(self.feeds.items())
        )
        return (id(self.session), self.outputs, self.resident, shapes)


class _Asking:
    """A session whose runs are answered together with those of other devices."""

    def __init__(self, ensemble: Ensemble[Any], session: Any, resident: bool = False) -> None:
        self.inputs, self.outputs, self.metadata = session.inputs, session.outputs, session.metadata
        self._ensemble = ensemble
        self._session = session
        self._resident = resident

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """See `fedprune.runtime.session.Session.run`."""
        found: dict[str, Array] = self._ensemble.ask(
            Request(self._session, dict(feeds), tuple(outputs or self.outputs), self._resident)
        )
        return found


class _Together(LoadedTrainer):
    """What one device's workbench gets of a `TorchTrainer`."""

    def __init__(self, own: TorchTrainer, ensemble: Ensemble[Any], recipe: Recipe, resident: bool) -> None:
        super().__init__(keep=True)
        self._own = own
        self._ensemble = ensemble
        self._recipe = recipe
        self._resident = resident

    def of(self, sha256: str, read: Callable[[], bytes], blocked: Callable[[], bytes] | None = None) -> Trainer:
        """See `LoadedTrainer.of`; layouts are torch's own matter."""
        session = self._own.step(sha256, read, self._recipe)
        return self._own.trainer(_Asking(self._ensemble, session, self._resident))

    def predictor(self, model: Path) -> Predictor:
        """See `LoadedTrainer.predictor`."""
        asking = _Asking(self._ensemble, self._own.inference(model))
        return Predictor(model, session=asking)


class TorchBench(PreparedBench):
    """Where virtual devices do their work with torch.

    Args:
        model: The model.
        store: Where offers' blobs lie and updates are put.
        folder: A folder for scratch files.
        device: `cpu`, `cuda` or `cuda:1`.
        together: How many devices are worked out at once; 1 for one after the other, which is faster on a CPU.

    Raises:
        MissingExtraError: torch is not installed.
        RuntimeUnavailableError: torch doesn't have the device.
    """

    def __init__(self, model: Model, store: BlobStore, folder: Path, *, device: str = "cpu", together: int = 1) -> None:
        super().__init__(store, folder, together)
        self._trainer = self._torch = TorchTrainer(model, device)
        self._resident = device != "cpu"
        self._folder = folder

    def ahead(self, work: Sequence[Work]) -> list[Done | Exception]:
        """See `PreparedBench.ahead`."""
        ensemble: Ensemble[Done] = Ensemble(self._answers)

        def piece(place: int, device: VirtualDevice, offer: dict[str, Any], number: int) -> Done:
            recipe = Recipe.from_dict(offer["recipe"])
            slots = Slots(self._folder / f"slots-{place}", lasting=False)
            slots.prepare()
            # Narrower steps are written into a board's arrays, which must then be its own.
            resident = self._resident and not recipe.ordered_dropout
            return self.work(device, offer, number, _Together(self._torch, ensemble, recipe, resident), slots)

        return ensemble.run([partial(piece, place, *item) for place, item in enumerate(work)])

    def carry_out(self, device: VirtualDevice, offer: dict[str, Any], number: int) -> Outcome:
        """See `Bench.carry_out`."""
        self._torch.recipe = Recipe.from_dict(offer["recipe"])
        return super().carry_out(device, offer, number)

    def _answers(self, requests: Sequence[Request]) -> list[Any]:
        """Compute what devices wait for: those together that ask for the same at equal widths."""
        groups: dict[Hashable, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(request.kind(), []).append(place)
        answers: list[Any] = [None] * len(requests)
        for places in groups.values():
            for place, answer in zip(places, self._computed([requests[p] for p in places]), strict=True):
                answers[place] = answer
        return answers

    def _computed(self, requests: Sequence[Request]) -> list[Any]:
        """Answers to requests of one kind; where one device spoils them, each is answered by itself."""
        session, feeds, outputs = requests[0].session, [r.feeds for r in requests], requests[0].outputs
        try:
            if requests[0].predicts:
                weights, samples = [r.session.tensors for r in requests], [f[step_contract.X] for f in feeds]
                return [{step_contract.LOGITS: rows} for rows in self._torch.predictions.logits(weights, samples)]
            if len(requests) > 1 or requests[0].resident:
                found: list[Any] = session.run_many(feeds, outputs, resident=requests[0].resident)
                return found
            return [session.run(feeds[0], outputs)]
        except FedpruneError as error:
            if len(requests) == 1:
                return [error]
        return [answer for request in requests for answer in self._computed([request])]


def _graph(raw: bytes) -> Any:
    """A training graph's inputs, outputs and metadata."""
    import onnx

    from fedprune_export.ir.graph import Graph

    try:
        return Graph.from_proto(onnx.load_from_string(raw))
    except Exception as error:
        if isinstance(error, FedpruneError):
            raise
        raise ModelError(f"the training graph can't be read ({type(error).__name__})") from error


def _prepared(device: str) -> None:
    """Make torch compute the same every time, as far as it can."""
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingExtraError("torch is not installed", extra="torch") from error
    try:
        place = torch.device(device)
        if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
            raise RuntimeUnavailableError(f"torch has no device {device!r}", got=f"{torch.cuda.device_count()} GPUs")
    except RuntimeError as error:
        raise RuntimeUnavailableError(f"torch has no device {device!r}", expected="cpu, cuda or cuda:1") from error
    # Sums of several threads come in another order; whoever has more cores trains more devices side by side instead.
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
