"""The worker: does the heavy work that the coordinator asks for, on blobs.

Daemon and simulator use it alike. Every command is answered from blobs and settings alone, so it can be repeated at
any time, in another process, with the same bits.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune import step, tensorfile
from fedprune.aggregation import Fold
from fedprune.blobs import BlobStore
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.errors import BundleError, FedpruneError, StorageError
from fedprune.evidence import Evidence
from fedprune.freezing import frozen_tensors
from fedprune.job import Job
from fedprune.scoring import random_ranks, ranks, score
from fedprune.selection import Selection, Tensors
from fedprune.session import Session
from fedprune.wire.fields import one_line
from fedprune_device.labels import targets
from fedprune_device.losses import data_loss, hits
from fedprune_export.cut import at_widths
from fedprune_export.graph import Port
from fedprune_export.imported import Model
from fedprune_export.inference import inference_model
from fedprune_export.training import training_graph
from fedprune_server.calibration import Calibration
from fedprune_server.uploads import UPDATE_SIZE
from fedprune_server.workshop import Work

Evaluation = tuple[npt.NDArray[Any], npt.NDArray[Any]]
"""Samples and labels of the server's own set, as `LocalData` has them."""

log = logging.getLogger("fedprune.server")

_EVALUATION_BATCH = 256
_CACHED_GRAPHS = 64


class Worker:
    """Carries out commands of one job.

    Args:
        job: The job's settings.
        model: The imported model; its weights are where the job starts.
        store: Where blobs are read and put.
        evaluation: The server's set; without it `Evaluated` carries no metrics. One that isn't finite is left out, and
            there is no accuracy where numbers are predicted.
        calibration: Samples on which every global model's batch-norm statistics are measured anew, if any.
    """

    def __init__(
        self,
        job: Job,
        model: Model,
        store: BlobStore,
        evaluation: Evaluation | None = None,
        calibration: npt.NDArray[np.float32] | None = None,
    ) -> None:
        self.job = job
        self.model = model
        self.architecture = model.architecture
        self.store = store
        self.evaluation = evaluation
        self._calibration = None if calibration is None else Calibration(model, calibration, job.recipe.features)
        self._training: dict[str, Any] | None = None
        self._inference: OrderedDict[tuple[int, ...], dict[str, Any]] = OrderedDict()
        self._tensors: tuple[str, Tensors] | None = None
        self._ranked: tuple[str, dict[tuple[int, ...], Selection]] | None = None
        self._fold: tuple[tuple[int, str], Fold, dict[str, do.Contribution]] | None = None
        self._session: Session | None = None

    def initial(self) -> str:
        """Put the model's own weights into the store and return their digest.

        Raises:
            ModelError: The model can't be trained, which is better known before the first device is there.
        """
        self._training_graph()
        return self.store.put(tensorfile.encode(self.model.tensors)).sha256

    def execute(self, command: Work) -> on.Event:
        """Carry out one command and return what came of it.

        Raises:
            FedpruneError: It can't be done. A `Fold` whose update is at fault is answered by `UpdateRejected` instead.
        """
        match command:
            case do.Score():
                return self._score(command)
            case do.Extract():
                return self._extract(command)
            case do.Fold():
                return self._add(command)
            case do.Close():
                return self._close(command)
            case do.Evaluate():
                return self._evaluate(command)

    def graphs(self) -> set[str]:
        """Digests of the graphs that current offers refer to; they must outlive garbage collection."""
        found = [g["sha256"] for g in self._inference.values()]
        return {*found, *([self._training["sha256"]] if self._training else [])}

    def _score(self, command: do.Score) -> on.Scored:
        evidence = None if command.evidence is None else self._evidence(command.evidence)
        # Until every channel has been trained once there is nothing to judge some of them by (CA-HFP, Sec. III-B).
        unknown = command.scorer == "curvature" and (evidence is None or not evidence.complete)
        if command.scorer == "random" or unknown:
            order = random_ranks(self.architecture, self.job.seed, command.round)
        else:
            order = ranks(score(command.scorer, self.architecture, self._global(command.model), evidence))
        selection = Selection.of(self.architecture, self.architecture.sizes, order)
        return on.Scored(command.round, self.store.put(selection.to_json().encode()).sha256)

    def _extract(self, command: do.Extract) -> on.Extracted:
        selection = self._selection(command.ranking, command.widths)
        tensors = selection.gather(self._global(command.model))
        weights = self.store.put(tensorfile.encode(tensors))
        offer = {
            "seed": self.job.seed,
            "architecture": self.architecture.digest,
            "selection": selection.digest,
            "widths": list(command.widths),
            "classes": self.architecture.classes,
            "weights": weights.to_dict(),
            "training": self._training_graph(),
            "inference": self._inference_graph(command.widths),
            "recipe": self.job.recipe.to_offer(),
            UPDATE_SIZE: self._update_size(tensors),
        }
        return on.Extracted(command.round, command.device, command.attempt, offer)

    def _update_size(self, tensors: Tensors) -> int:
        """Bytes of the update that answers these weights: as many, without those that are frozen."""
        sent = {n: v for n, v in tensors.items() if n not in self._frozen}
        return len(tensorfile.header((n, "F32", v.shape) for n, v in sent.items())) + sum(
            v.nbytes for v in sent.values()
        )

    def _training_graph(self) -> dict[str, Any]:
        if self._training is None:
            graph = training_graph(self.model, self.job.recipe.features)
            self._training = self.store.put(graph.to_bytes()).to_dict()
        return self._training

    def _inference_graph(self, widths: tuple[int, ...]) -> dict[str, Any]:
        known = self._inference.get(widths)
        if known is None:
            known = self._inference[widths] = self.store.put(inference_model(self.model, widths)).to_dict()
            while len(self._inference) > _CACHED_GRAPHS:
                self._inference.popitem(last=False)
        self._inference.move_to_end(widths)
        return known

    def _sums(self, round_: int, model: str) -> tuple[Fold, dict[str, do.Contribution]]:
        """The round's sums and which contributions are in them; new sums for another round or model."""
        key = (round_, model)
        if self._fold is None or self._fold[0] != key:
            fold = Fold(
                self.architecture,
                self._global(model),
                rule=self.job.rule,
                evidence=self.job.scorer == "curvature",
            )
            self._fold = (key, fold, {})
        return self._fold[1], self._fold[2]

    def _add(self, command: do.Fold) -> on.Folded | on.UpdateRejected:
        part = command.contribution
        try:
            self._include(command.round, command.model, command.ranking, part)
        except StorageError:
            raise
        except FedpruneError as error:
            return on.UpdateRejected(part.device, command.round, part.attempt, one_line(str(error)))
        return on.Folded(part.device, command.round, part.attempt)

    def _include(self, round_: int, model: str, ranking: str, part: do.Contribution) -> None:
        fold, included = self._sums(round_, model)
        if part.device in included:
            return
        raw, selection = self.store.read(part.weights), self._selection(ranking, part.widths)
        try:
            # Whatever a device says of frozen tensors, they are the global model's.
            fold.add(selection, tensorfile.decode(raw) | self._frozen_part(model, selection), part.weight, part.steps)
        except (FedpruneError, MemoryError):
            raise
        except Exception as error:
            # A stranger's bytes: what our checks have overlooked must cost this update, not the server.
            log.warning("update of %s in round %d: our own code failed on it", part.device, round_, exc_info=True)
            self._fold = None  # whatever got into the sums must not stay there; the others are added up anew
            raise BundleError(f"update can't be read ({type(error).__name__}: {error})") from error
        included[part.device] = part

    @cached_property
    def _frozen(self) -> frozenset[str]:
        return frozen_tensors(self.architecture, self.job.recipe.features, self.model.frozen)

    def _frozen_part(self, model: str, selection: Selection) -> Tensors:
        """The frozen tensors of a submodel, which don't travel in updates."""
        if not self._frozen:
            return {}
        held = selection.gather(self._global(model))
        return {name: held[name] for name in self._frozen}

    def _close(self, command: do.Close) -> on.Closed:
        _, included = self._sums(command.round, command.model)
        wanted = {p.device: p for p in command.contributions}
        if any(wanted.get(name) != part for name, part in included.items()):
            self._fold = None  # the sums hold something that must not count: add up anew
        for part in command.contributions:
            self._include(command.round, command.model, command.ranking, part)
        fold, _ = self._sums(command.round, command.model)
        velocity = None if command.velocity is None else tensorfile.decode(self.store.read(command.velocity))
        tensors, velocity = fold.close(self.job.server_momentum, velocity)
        tensors |= {n: self._global(command.model)[n] for n in self._frozen}  # sums would round them
        if self._calibration is not None:
            tensors = self._calibration(tensors)
        evidence = command.evidence
        if self.job.scorer == "curvature":
            gathered = Evidence.empty(self.architecture) if evidence is None else self._evidence(evidence)
            gathered.update(fold, self.job.recipe.lr, self.job.recipe.momentum)
            evidence = self.store.put(tensorfile.encode(gathered.to_tensors())).sha256
        model = self.store.put(tensorfile.encode(tensors)).sha256
        moved = None if velocity is None else self.store.put(tensorfile.encode(velocity)).sha256
        self._fold = None
        return on.Closed(command.round, model, moved, evidence)

    def _evaluate(self, command: do.Evaluate) -> on.Evaluated:
        if self.evaluation is None:
            return on.Evaluated(command.round, {})
        recipe, outputs = self.job.recipe, self.architecture.classes
        x, y = self.evaluation
        y = targets(y, recipe.loss, outputs)
        run = self._evaluator(command.model)
        terms = {step.HUBER_DELTA: np.array(recipe.huber_delta)}
        right: list[npt.NDArray[np.bool_]] = []
        loss = 0.0
        with np.errstate(over="ignore", invalid="ignore"):  # a diverged model has no loss, and that is no error
            for at in range(0, len(x), _EVALUATION_BATCH):
                labels = y[at : at + _EVALUATION_BATCH]
                logits = run(x[at : at + _EVALUATION_BATCH])
                found = hits(recipe.loss, logits, labels)
                right += [] if found is None else [found]
                loss += data_loss(recipe.loss, logits, labels, terms) * len(labels)
        metrics = {"accuracy": float(np.mean(np.concatenate(right)))} if right else {}
        metrics |= {"loss": loss / len(x), "samples": float(len(x))}
        return on.Evaluated(command.round, {k: v for k, v in metrics.items() if math.isfinite(v)})

    def _evaluator(self, model: str) -> Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]]:
        """A function from samples to logits of the global model.

        The weights are inputs of the graph, so that one session serves every round.
        """
        if self._session is None:
            graph = at_widths(self.model, self.architecture.sizes)
            graph.inputs += [Port(t.name, np.dtype(np.float32), t.shape) for t in self.architecture.tensors]
            self._session = Session(graph.to_bytes())
        session, weights = self._session, self._global(model)

        def run(x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
            logits: npt.NDArray[np.float32] = session.run({step.X: x, **weights}, [step.LOGITS])[step.LOGITS]
            return logits

        return run

    def _global(self, digest: str) -> Tensors:
        if self._tensors is None or self._tensors[0] != digest:
            self._tensors = (digest, tensorfile.decode(self.store.read(digest)))
        return self._tensors[1]

    def _evidence(self, digest: str) -> Evidence:
        return Evidence.from_tensors(self.architecture, tensorfile.decode(self.store.read(digest)))

    def _selection(self, ranking: str, widths: tuple[int, ...]) -> Selection:
        """The first channels of a ranking; boards of equal width share one, with its maps."""
        if self._ranked is None or self._ranked[0] != ranking:
            whole = Selection.from_json(self.store.read(ranking), self.architecture)
            self._ranked = (ranking, {whole.widths: whole})
        selections = self._ranked[1]
        if widths not in selections:
            selections[widths] = selections[self.architecture.sizes].narrowed(widths)
        return selections[widths]
