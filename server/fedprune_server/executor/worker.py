"""The worker: does the heavy work that the coordinator asks for, on blobs.

Daemon and simulator use it alike. Every command is answered from blobs and settings alone, so it can be repeated at
any time, in another process, with the same bits. The job's strategy decides what is done.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.limits import UpdateLimits
from fedprune.coordination.round import Round, RoundOutcome
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune.jobs.state import State
from fedprune.model.initial_values import is_untrained
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.model.trainable import frozen_tensors
from fedprune.planning.probe_report import CPU
from fedprune.strategies import compose
from fedprune.strategies.importance.element_ranking import magnitudes, mask_threshold
from fedprune.strategies.values import Cut, Memories, Submodel, Turn
from fedprune_export.pruning.model import Model
from fedprune_server.executor.accountant import Accountant
from fedprune_server.executor.background import HeavyCommand
from fedprune_server.executor.calibration import Calibration
from fedprune_server.executor.distillation import Distiller
from fedprune_server.executor.evaluator import Evaluator, ModelSessions
from fedprune_server.executor.masked_sums import MaskedSums
from fedprune_server.executor.offers import Offers, offer_blobs, offer_graphs
from fedprune_server.executor.round_closer import RoundCloser
from fedprune_server.executor.server_samples import LabelledSamples
from fedprune_server.executor.stored_updates import StoredUpdates

log = logging.getLogger("fedprune.server")

# Latest bases of submodels whose offers are kept for further devices.
_KEPT_BASES = 2


class Worker:
    """Carries out commands of one job.

    Args:
        model: The imported model; its weights are where the job starts.
        store: Where blobs are read and put.
        evaluation: The server's test set; without it `Evaluated` carries no metrics. Metrics that aren't finite are
            left out, and a model that predicts numbers has no accuracy.
        calibration: Samples on which every global model is distilled, if the strategy asks for it, and its batch-norm
            statistics are measured again; None for neither.
        unit: The processing unit of devices that have not measured theirs.
        prefix: Begins log lines about devices' updates, to tell several jobs apart.

    Raises:
        ConfigError: The job's strategy or its options are wrong, or the server's set is empty.
        DataError: The labels of the server's set are not what the recipe's loss takes.
    """

    def __init__(
        self,
        job: Job,
        model: Model,
        store: BlobStore,
        evaluation: LabelledSamples | None = None,
        calibration: npt.NDArray[np.float32] | None = None,
        *,
        unit: str = CPU,
        prefix: str = "",
    ) -> None:
        self.job, self.prefix = job, prefix
        self.model = model
        self.architecture = model.architecture
        self.strategy = compose(job)
        self.store = store
        self._unit = unit
        self._evaluator = None if evaluation is None else Evaluator(ModelSessions(model, 1), job.recipe, evaluation)
        self._calibration = None if calibration is None else Calibration(model, calibration, job.recipe.features)
        distillation, self._distiller = self.strategy.distillation, None
        if self._calibration is not None and distillation is not None and model.base is None:
            self._distiller = Distiller(model, self._calibration, distillation, job.recipe, job.seed)
        self._offers = Offers(model, store, job.precision)
        self.updates = StoredUpdates(job, model.architecture, self.strategy, store, self._offers.withheld, model.ranks)
        self.limits = UpdateLimits(job, uniform=self.strategy.aggregator.weighting == "uniform")
        self._round: tuple[object, Round] | None = None
        self._closer = RoundCloser(self.updates, self.round_of)
        if job.secure_aggregation:
            self._closer = MaskedSums(job, self.updates, store, self.round_of)
        self._shared_offers: dict[Hashable, dict[Hashable, dict[str, Any]]] = {}
        self._logged_limits: set[str] = set()

    @cached_property
    def accountant(self) -> Accountant | None:
        """The accountant of the job's privacy; None without a guarantee. Helpers have no need of it. Raises
        `ConfigError` if the job's budget of privacy is not enough for a round, and `MissingExtraError` if dp-accounting
        is not installed."""
        privacy = self.job.privacy
        return Accountant(privacy) if privacy.is_on and privacy.noise_multiplier else None

    def begin(self) -> State:
        """The state of a job that begins with the model. Raises as `put_initial_model`."""
        untrained = is_untrained(self.architecture, self.model.tensors)
        state = State(model=self.put_initial_model(), architecture=self.architecture.digest, untrained=untrained)
        if self.strategy.core is not None:
            plain = self.store.put(tensorfile.encode(self.model.tensors)).sha256
            state.plain_model = plain if plain != state.model else ""
        return state

    def put_initial_model(self) -> str:
        """Put the job's first model into the store and return its digest.

        Raises:
            StrategyError: A user's `begin` has failed.
            ModelError: The model can't be trained, which is better known before the first device is there.
            ConfigError: The strategy's `begin` can't use it, or a pattern of the recipe matches no tensor.
        """
        model = self.strategy.begin(self.architecture, self.model.tensors)
        recipe = self.check_recipe(1)
        if model is not self.model.tensors:
            # Frozen tensors keep the values of the given model: training never changes them.
            frozen_names = frozen_tensors(self.architecture, recipe.features, self.model.frozen)
            model = {**model, **{n: v for n, v in self.model.tensors.items() if n in frozen_names}}
        return self.store.put(tensorfile.encode(model)).sha256

    def check_recipe(self, round_: int) -> Recipe:
        """Make the graphs that a board of full width needs in a round, before the first device is there, and return its
        recipe. Raises `ModelError` if the model can't be trained by it, and `ConfigError` if one of its patterns
        matches no tensor."""
        recipe = self.updates.recipe(Turn(self.job.seed, round_, "", self.architecture.sizes))
        self._offers.training_ref(recipe, round_, self._unit)
        self._offers.lowered_refs(self.architecture.sizes, round_)
        self._offers.withheld(recipe)
        return recipe

    def execute(self, command: HeavyCommand) -> on.Event:
        """Carry out one command and return its result. Raises `FedpruneError` if it can't be done. A `FoldUpdate` of a
        faulty update is answered by `UpdateRejected` instead, and a `Close` leaves such updates out."""
        match command:
            case do.Score():
                return self._score(command)
            case do.Extract():
                return self._extract(command)
            case do.FoldUpdate():
                return self._receive_update(command)
            case do.Close():
                return self._close(command)
            case do.Evaluate():
                return self._evaluate(command)

    def expect(self, commands: Sequence[do.Command]) -> None:
        """Do nothing: only a worker with helpers can begin with commands in advance (`DistributedWorker`)."""

    def graph_digests(self) -> set[str]:
        """Digests of the graphs that offers of the latest rounds named; they must outlive garbage collection."""
        return self._offers.graph_digests()

    def note_offer(self, command: do.Extract, event: on.Extracted) -> None:
        """Note a new offer, perhaps of a helper: its graphs, and that other devices may get the same one."""
        self._offers.note(offer_graphs(event.offer), event.round)
        key = self.shared_key(command)
        if key is not None:
            basis = _basis_key(command)
            if basis not in self._shared_offers:
                # Devices of an asynchronous job may still ask for the basis before.
                self._shared_offers = dict([*self._shared_offers.items(), (basis, {})][-_KEPT_BASES:])
            self._shared_offers[basis].setdefault(key, dict(event.offer))

    # A round begins.

    def _score(self, command: do.Score) -> on.Scored:
        ranking = self.strategy.rank(
            self.updates.scene(command.round, command.model, command.memory, command.participants)
        )
        selection = Selection.of(self.architecture, self.architecture.sizes, ranking.ranks)
        ranking_digest = self.store.put(selection.to_json().encode()).sha256
        order = None if ranking.order is None else self.store.put(tensorfile.encode(ranking.order)).sha256
        return on.Scored(command.round, ranking_digest, order)

    def shared_key(self, command: do.Extract) -> Hashable:
        """The key of an offer: devices of equal keys get the same one. None for an offer that only its device gets."""
        if not self.strategy.is_device_independent:
            return None
        unit = command.unit or self._unit
        return _basis_key(command), _submodel_key(command), command.coding, self._recipe(command), unit

    def _recipe(self, command: do.Extract) -> Recipe:
        recipe = self.updates.recipe(self.updates.turn(command.basis, command.part))
        return recipe.with_micro_batches(command.accumulate)

    def _extract(self, command: do.Extract) -> on.Extracted:
        device_part, key = command.part, self.shared_key(command)
        offer = self._shared_offers.get(_basis_key(command), {}).get(key)
        # Blobs may have been swept since the offer was made.
        if offer is None or not all(map(self.store.has, offer_blobs(offer))):
            offer = self._offer(command)
        event = on.Extracted(command.basis.round, device_part.device, device_part.attempt, dict(offer))
        self.note_offer(command, event)
        return event

    def _offer(self, command: do.Extract) -> dict[str, Any]:
        cut = self.updates.cut(command.basis, command.part)
        submodel = self.strategy.extract(cut)
        recipe = _mask_recipe(self._recipe(command), submodel)
        held_submodel = command.coding.received
        previous_selection = None
        if held_submodel is not None and self.store.has(held_submodel.ranking):
            previous_selection = self.updates.archive.selection(held_submodel.ranking, held_submodel.widths)
        return {
            **self._closer.offer_fields(command.basis, command.part, submodel.selection),
            "seed": self.job.seed,
            "architecture": self.architecture.digest,
            "selection": submodel.selection.digest,
            "ranking": self._ranking(command.basis, cut, submodel.selection),
            "widths": list(submodel.selection.widths),
            "classes": self.architecture.classes,
            **self._offers.body(
                submodel, recipe, command.basis.round, command.unit or self._unit, command.coding, previous_selection
            ),
        }

    def _ranking(self, basis: do.Basis, cut: Cut, selection: Selection) -> str:
        """The ranking whose first channels a submodel has: the round's, or one of its own.

        The update is folded by this ranking, so that a strategy may extract any channels.
        """
        if selection is cut.selection or selection.digest == cut.selection.with_widths(selection.widths).digest:
            return basis.ranking
        return self.store.put(selection.with_widths(self.architecture.sizes).to_json().encode()).sha256

    # Updates come in, and a round ends.

    def round_of(self, command: do.FoldUpdate | do.Close | do.Basis) -> Round:
        """The round of a command; a new one if the command before belonged to another."""
        key = (command.round, command.model, command.memory)
        # An asynchronous job's commands may belong to another basis than those before: sums of one model are no sums of
        # another.
        if self._round is None or self._round[0] != key:
            core = any(device_part.core for device_part in _device_parts(command))
            scene = replace(self.updates.scene(command.round, command.model, command.memory), core=core)
            self._round = key, Round(self.strategy, scene, self.limits)
        return self._round[1]

    def _receive_update(self, command: do.FoldUpdate) -> on.Folded | on.UpdateRejected:
        contribution = command.contribution
        failure = self.round_of(command).add_update(self.updates.round_update(contribution))
        if failure is not None:
            identity = contribution.part.device, contribution.basis.round, contribution.part.attempt
            return on.UpdateRejected(*identity, failure.reason, failure.kind)
        return on.Folded(contribution.part.device, contribution.basis.round, contribution.part.attempt)

    def _close(self, command: do.Close) -> on.Closed:
        result = self._closer.close(command)
        self._round = None
        self._log(command.round, result)
        model = self._put_model(command, result)
        memory = self._store_memories(command.memory, result.memories)
        reasons = {device: failure.reason for device, failure in result.rejected.items()}
        kinds: dict[str, str] = {device: failure.kind for device, failure in result.rejected.items()}
        return on.Closed(command.round, model, memory, reasons, dict(result.limited), kinds, result.reduced)

    def _log(self, round_: int, result: RoundOutcome) -> None:
        for device, failure in result.rejected.items():
            log.warning("%sthe update of %s doesn't count in round %d: %s", self.prefix, device, round_, failure.reason)
        for device, reason in result.limited.items():
            # The samples that a board reports stay as they are: once is enough.
            level = logging.DEBUG if reason in self._logged_limits else logging.WARNING
            log.log(level, "%sthe update of %s is limited in round %d: %s", self.prefix, device, round_, reason)
        self._logged_limits = set(result.limited.values())

    def _put_model(self, command: do.Close, result: RoundOutcome) -> str:
        """Store the next model. Tensors that aren't sent keep their exact bits: summing would round them."""
        if result.model is None:
            return command.model
        previous_tensors, withheld_names = self.updates.archive.model(command.model), set[str]()
        counted = {u.device for u in result.updates}
        for contribution in command.contributions:
            if contribution.part.device in counted:
                withheld_names |= self.updates.withheld_names(contribution.basis, contribution.part)
        tensors = result.model | {n: previous_tensors[n] for n in withheld_names}
        if self._distiller is not None and any(contribution.part.mixed for contribution in command.contributions):
            scene = self.updates.scene(command.round, command.model, command.memory)
            core = any(contribution.part.core for contribution in command.contributions)
            trained = {contribution.part.widths for contribution in command.contributions}
            tensors = self._distiller(tensors, self.strategy.rank(scene).ranks, command.round, trained, core=core)
        if self._calibration is not None:
            # Last of all: weights that are distilled have other statistics.
            tensors = self._calibration(tensors)
        return self.store.put(tensorfile.encode(tensors)).sha256

    def _store_memories(self, digests_before: dict[str, str], memories: Memories) -> dict[str, str]:
        digests = dict(digests_before)
        for name, tensors in memories.items():
            if tensors:
                digests[name] = self.store.put(tensorfile.encode(tensors)).sha256
            else:
                digests.pop(name, None)
        return digests

    def _evaluate(self, command: do.Evaluate) -> on.Evaluated:
        privacy_metrics = {} if self.accountant is None else self.accountant.metrics(command)
        if self._evaluator is None:
            return on.Evaluated(command.round, privacy_metrics)
        model, widths = self.updates.archive.model(command.model), command.widths or self.architecture.sizes
        if widths != self.architecture.sizes:
            model = self.updates.archive.selection(command.ranking, widths).gather(model)
            # Statistics of the whole model fit no narrower one.
            model = model if self._calibration is None else self._calibration(model)
        metrics = self._evaluator(model, widths)
        return on.Evaluated(command.round, metrics | privacy_metrics)


def _device_parts(command: do.FoldUpdate | do.Close | do.Basis) -> tuple[do.DevicePart, ...]:
    """The devices' parts whose updates a command names."""
    if isinstance(command, do.FoldUpdate):
        return (command.contribution.part,)
    return () if isinstance(command, do.Basis) else tuple(contribution.part for contribution in command.contributions)


def _mask_recipe(recipe: Recipe, submodel: Submodel) -> Recipe:
    """The recipe of a masked submodel, whose mask stays as it is or follows a threshold of magnitudes."""
    if not submodel.mask:
        return recipe
    if recipe.mask == "threshold":
        smallest = mask_threshold(magnitudes(submodel.tensors, submodel.mask), submodel.mask)
        return replace(recipe, mask_threshold=smallest)
    return replace(recipe, mask="hard")


def _basis_key(command: do.Extract) -> Hashable:
    """The key of what the submodels of a round are cut from."""
    basis = command.basis
    return basis.round, basis.model, basis.ranking, basis.order


def _submodel_key(command: do.Extract) -> Hashable:
    """The key of a device's submodel; density is a part of it only with element masks."""
    device_part = command.part
    return device_part.widths, device_part.density if command.basis.order is not None else 1.0
