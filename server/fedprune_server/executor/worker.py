"""The worker of a job: carries out the heavy commands of the coordinator (score, extract, fold, close, evaluate).

Server and simulator both use it. Commands name blobs, and the result is an event. It follows from blobs and settings
only, so that a command can be repeated at any time, in another process, with the same bits. In commands, a *part* is a
device's participation in a round, a *basis* the global model and ranking from which its submodel was cut, and a
*contribution* its stored update. To *fold* is to add an update to the running sum of a round.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.round import Round, RoundOutcome
from fedprune.coordination.update_limits import UpdateLimits
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune.jobs.state import State
from fedprune.model.initial_values import is_untrained
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.model.trainable import frozen_tensors
from fedprune.planning.probe_report import CPU
from fedprune.strategies import compose
from fedprune.strategies.values import NewMemory, Turn
from fedprune_export.pruning.model import Model
from fedprune_server.executor.accountant import Accountant
from fedprune_server.executor.background import HeavyCommand
from fedprune_server.executor.calibration import Calibration
from fedprune_server.executor.distillation import Distiller
from fedprune_server.executor.evaluator import Evaluator, ModelSessions
from fedprune_server.executor.masked_sums import MaskedSums
from fedprune_server.executor.offer_blobs import OfferBlobs
from fedprune_server.executor.offer_maker import OfferMaker
from fedprune_server.executor.round_closer import RoundCloser
from fedprune_server.executor.server_samples import LabelledSamples
from fedprune_server.executor.stored_updates import StoredUpdates

log = logging.getLogger("fedprune.server")


class Worker:
    """Carries out commands of one job. Raises `ConfigError` if the job's strategy or its options are wrong, or there
    are no test samples, and `DataError` if the recipe's loss can't take the labels of the test samples.

    Args:
        model: The imported model; its weights are where the job starts.
        evaluation: The server's test samples; without it `Evaluated` carries no metrics. Metrics that aren't finite are
            left out, and a model that predicts numbers has no accuracy.
        calibration: Samples on which the batch-norm statistics of every global model are measured again, and on which
            it is distilled if the strategy asks for it; None for neither.
        unit: The processing unit of devices that have not measured theirs.
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
        self._offer_blobs = OfferBlobs(model, store, job.precision)
        self.updates = StoredUpdates(
            job, model.architecture, self.strategy, store, self._offer_blobs.withheld_names, model.ranks
        )
        self.limits = UpdateLimits(job, uniform=self.strategy.aggregator.weighting == "uniform")
        self._round: tuple[object, Round] | None = None
        self._closer = RoundCloser(self.updates, self.round_of)
        if job.secure_aggregation:
            self._closer = MaskedSums(job, self.updates, store, self.round_of)
        self.offers = OfferMaker(
            job, self.architecture, self.strategy, store, self.updates, self._offer_blobs, self._closer, unit
        )
        self._logged_limits: set[str] = set()

    @cached_property
    def accountant(self) -> Accountant | None:
        """The accountant of the job's privacy; None if the job promises none. Raises `ConfigError` if the budget is not
        enough for a round, and `MissingExtraError` if dp-accounting is not installed."""
        privacy = self.job.privacy
        return Accountant(privacy) if privacy.is_on and privacy.noise_multiplier else None

    def begin(self) -> State:
        """The state of a job that begins with the model. Raises as `put_initial_model`."""
        untrained = is_untrained(self.architecture, self.model.tensors)
        return State(model=self.put_initial_model(), architecture=self.architecture.digest, untrained=untrained)

    def put_initial_model(self) -> str:
        """Put the job's first model into the store and return its digest.

        Raises `StrategyError` if a user's `begin` has failed, `ConfigError` if the strategy's can't use the model, and
        as `check_recipe`: that is better known before the first device is there.
        """
        model = self.strategy.begin(self.architecture, self.model.tensors)
        self.check_recipe(1)
        return self._put_start(model)

    def _put_start(self, model: Tensors) -> str:
        if model is not self.model.tensors:
            # Frozen tensors keep the values of the given model: training never changes them.
            recipe = self.updates.recipe(Turn(self.job.seed, 1, "", self.architecture.sizes))
            frozen_names = frozen_tensors(self.architecture, recipe.features, self.model.frozen)
            model = {**model, **{n: v for n, v in self.model.tensors.items() if n in frozen_names}}
        return self._put(model)

    def _put(self, tensors: Tensors) -> str:
        return self.store.put(tensorfile.encode(tensors)).sha256

    def check_recipe(self, round_: int) -> Recipe:
        """Make the graphs that a board of full width needs in a round, and return its recipe. Raises `ModelError` if
        the model can't be trained by the recipe, and `ConfigError` if a pattern of it matches no tensor."""
        recipe = self.updates.recipe(Turn(self.job.seed, round_, "", self.architecture.sizes))
        self._offer_blobs.training_ref(recipe, self._unit)
        self._offer_blobs.lowered_refs(self.architecture.sizes)
        self._offer_blobs.withheld_names(recipe)
        return recipe

    def execute(self, command: HeavyCommand) -> on.Event:
        """Carry out one command and return its result. A `FoldUpdate` of a faulty update results in `UpdateRejected`,
        and a `Close` leaves such updates out. Raises `FedpruneError` if the command fails for another reason."""
        match command:
            case do.Score():
                return self._score(command)
            case do.Extract():
                return self.offers.make(command)
            case do.FoldUpdate():
                contribution = command.contribution
                failure = self.round_of(command).add_update(self.updates.round_update(contribution))
                if failure is not None:
                    identity = contribution.part.device, contribution.basis.round, contribution.part.attempt
                    return on.UpdateRejected(*identity, failure.reason, failure.kind)
                return on.Folded(contribution.part.device, contribution.basis.round, contribution.part.attempt)
            case do.Close():
                return self._close(command)
            case do.Evaluate():
                return self._evaluate(command)

    def expect(self, commands: Sequence[do.Command]) -> None:
        """Do nothing: only a worker with helpers can begin with commands in advance (`DistributedWorker`)."""

    def graph_digests(self) -> set[str]:
        """Digests of the graphs that offers of the latest rounds named; they must outlive garbage collection."""
        return self._offer_blobs.graph_digests()

    def round_of(self, command: do.FoldUpdate | do.Close | do.Basis) -> Round:
        """The round of a command; a new one if the command before belonged to another."""
        key = (command.round, command.model, command.memory)
        # The next command of an asynchronous job may belong to another model, whose sums are separate.
        if self._round is None or self._round[0] != key:
            scene = self.updates.scene(command.round, command.model, command.memory)
            self._round = key, Round(self.strategy, scene, self.limits)
        return self._round[1]

    def _score(self, command: do.Score) -> on.Scored:
        model, memory = command.model, command.memory
        if command.round == 1:
            # The round may have begun before, with another core: it begins with the given model each time.
            model, memory = self._put_start(self.strategy.begin(self.architecture, self.model.tensors)), {}
            scene = self.updates.scene(1, model, memory, command.participants)
            if command.core and (start := self.strategy.start_core(scene, command.core)) is not None:
                model, memory = self._put_start(start[0]), self._memory(memory, start[1])
        ranking = self.strategy.rank(self.updates.scene(command.round, model, memory, command.participants))
        selection = Selection.of(self.architecture, self.architecture.sizes, ranking.ranks)
        ranking_digest = self.store.put(selection.to_json().encode()).sha256
        order = None if ranking.order is None else self._put(ranking.order)
        return on.Scored(command.round, ranking_digest, order, model, memory)

    def _close(self, command: do.Close) -> on.Closed:
        result = self._closer.close(command)
        self._round = None
        self._log(command.round, result)
        model = self._put_model(command, result)
        memory = self._memory(command.memory, result.memories)
        reasons = {device: failure.reason for device, failure in result.rejected.items()}
        kinds: dict[str, str] = {device: failure.kind for device, failure in result.rejected.items()}
        return on.Closed(command.round, model, memory, reasons, dict(result.limited), kinds, result.reduced)

    def _memory(self, memory: Mapping[str, str], new: NewMemory) -> dict[str, str]:
        """The digests of a memory with what is new in it; what is empty is forgotten."""
        kept = {n: digest for n, digest in memory.items() if n not in new}
        return kept | {n: self._put(tensors) for n, tensors in new.items() if tensors}

    def _log(self, round_: int, result: RoundOutcome) -> None:
        for device, failure in result.rejected.items():
            log.warning("%sthe update of %s doesn't count in round %d: %s", self.prefix, device, round_, failure.reason)
        for device, reason in result.limited.items():
            # A board reports the same number of samples in each round, so that one warning is enough.
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
        if self._distiller is not None and command.contributions:
            scene = self.updates.scene(command.round, command.model, command.memory)
            trained = {contribution.part.widths for contribution in command.contributions}
            tensors = self._distiller(tensors, self.strategy.rank(scene).ranks, command.round, trained)
        if self._calibration is not None:
            # Last: distillation changes the weights, and so the statistics.
            tensors = self._calibration(tensors)
        return self._put(tensors)

    def _evaluate(self, command: do.Evaluate) -> on.Evaluated:
        privacy_metrics = {} if self.accountant is None else self.accountant.metrics(command)
        if self._evaluator is None:
            return on.Evaluated(command.round, privacy_metrics)
        model, widths = self.updates.archive.model(command.model), command.widths or self.architecture.sizes
        if widths != self.architecture.sizes:
            model = self.updates.archive.selection(command.ranking, widths).gather(model)
            # Statistics of the whole model fit no submodel.
            model = model if self._calibration is None else self._calibration(model)
        return on.Evaluated(command.round, self._evaluator(model, widths) | privacy_metrics)
