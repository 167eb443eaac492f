"""Reads the inputs of a strategy from blobs: what it sees of a round (a scene), a device's submodel, stored updates.

In commands, a *part* is a device's participation in a round (for strategies its `Turn`), a *basis* the global model and
ranking from which its submodel was cut, and a *contribution* its stored update.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial

from fedprune.aggregation.client_update import check_squares
from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.blobs.tensor_reader import read_tensors
from fedprune.coordination import commands as do
from fedprune.coordination.update_limits import RoundUpdate, shorten_update
from fedprune.core.bounded_cache import BoundedCache
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.model.trainable import expand_head
from fedprune.planning.costs import costs_at
from fedprune.strategies import Strategy
from fedprune.strategies.importance.scoring import Ranks
from fedprune.strategies.values import Cut, Scene, Submodel, Turn, UpdateReport
from fedprune_server.executor.archive import Archive, split_update


class StoredUpdates:
    """Reads the scenes, submodels and updates that commands name. `withheld` returns the tensors that no update
    carries, given the recipe."""

    def __init__(
        self,
        job: Job,
        architecture: Architecture,
        strategy: Strategy,
        store: BlobStore,
        withheld: Callable[[Recipe], frozenset[str]],
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks
        self.archive = Archive(architecture, store)
        self._job = job
        self._architecture = architecture
        self._strategy = strategy
        self._store = store
        self._withheld = withheld
        self._macs_shares = BoundedCache[tuple[int, ...], float]()

    def scene(self, round_: int, model: str, memory: dict[str, str], participants: tuple[str, ...] = ()) -> Scene:
        return Scene(
            self._architecture,
            self._job.seed,
            round_,
            self.archive.model(model),
            self.archive.memory(memory),
            self._job.training_recipe,
            participants,
            self._ranks,
        )

    def turn(self, basis: do.Basis, device_part: do.DevicePart) -> Turn:
        return Turn(
            self._job.seed,
            basis.round,
            device_part.device,
            device_part.widths,
            device_part.density,
            device_part.samples,
            device_part.last_counted_round,
            device_part.work,
            self._macs_share(device_part.widths),
        )

    def _macs_share(self, widths: tuple[int, ...]) -> float:
        if widths not in self._macs_shares:
            macs, whole = (costs_at(self._architecture, w).training_macs for w in (widths, self._architecture.sizes))
            self._macs_shares[widths] = macs / whole if macs else 1.0
        return self._macs_shares[widths]

    def recipe(self, turn: Turn) -> Recipe:
        recipe = self._job.privacy.private_recipe(self._strategy.recipe(self._job.training_recipe, turn))
        recipe = recipe if turn.work == 1 else replace(recipe, epochs=recipe.epochs * turn.work)
        personal = expand_head(recipe.personal, self._architecture)
        return recipe if personal == recipe.personal else replace(recipe, personal=personal)

    def withheld_names(self, basis: do.Basis, device_part: do.DevicePart) -> frozenset[str]:
        """The tensors that no update of a device has."""
        return self._withheld(self.recipe(self.turn(basis, device_part)))

    def cut(self, basis: do.Basis, device_part: do.DevicePart) -> Cut:
        """The input of a device's submodel."""
        turn = self.turn(basis, device_part)
        scene = self.scene(basis.round, basis.model, basis.memory)
        withheld = self._withheld(self.recipe(turn))
        past = self.archive.past(device_part.past, lambda s: gather_named(s, scene.model, withheld))
        selection = self.archive.selection(basis.ranking, device_part.widths)
        return Cut(scene, turn, selection, self.archive.order(basis.order), past)

    def round_update(self, contribution: do.Contribution) -> RoundUpdate:
        """A stored update, to be read when its round needs it."""
        basis, device_part = contribution.basis, contribution.part
        content = (
            contribution.weights,
            contribution.sent,
            contribution.mask,
            contribution.codec,
            contribution.ranking,
            contribution.widths,
        )
        key = (basis.round, basis.model, basis.ranking, device_part.device, device_part.attempt, content)
        read = partial(self.report, contribution)
        return RoundUpdate(device_part.device, key, contribution.weight, device_part.samples, read, contribution.shares)

    def report(self, contribution: do.Contribution) -> UpdateReport:
        """A stored update with all its tensors. Those that don't travel are the server's, whatever a device sent.

        Raises `FedpruneError` if it can't be read, or if its squared gradients were not asked for or are invalid.
        """
        cut = self.cut(contribution.basis, contribution.part)
        selection = self._selection(contribution)
        mask = self.archive.mask(contribution.mask, selection)
        recipe = self.recipe(cut.turn)
        withheld = self._withheld(recipe)
        withheld_tensors = gather_named(selection, cut.scene.model, withheld)
        update = self.archive.update(contribution.weights, contribution.codec, contribution.sent)
        tensors, squares = split_update(update, mask)

        def read_sent() -> Submodel:
            offered, _ = split_update(self.archive.sent_weights(contribution.sent), mask)
            return Submodel(selection, offered, mask)

        if squares:
            trainable = frozenset(t.name for t in self._architecture.trainable)
            check_squares(selection, squares, trainable - withheld if recipe.report_squares else ())
        trained = Submodel(selection, tensors | withheld_tensors, mask)
        return UpdateReport(cut, trained, contribution.weight, contribution.steps, read_sent, squares)

    def partial_report(
        self, contribution: do.Contribution, refs: Mapping[str, BlobRef], names: Collection[str]
    ) -> UpdateReport:
        """Some tensors of a stored update that has no mask and no codec; no others are read."""
        scene = self.scene(contribution.basis.round, contribution.basis.model, contribution.basis.memory)
        turn, selection = self.turn(contribution.basis, contribution.part), self._selection(contribution)
        round_selection = self.archive.selection(contribution.basis.ranking, contribution.part.widths)
        withheld_tensors = gather_named(selection, scene.model, self._withheld(self.recipe(turn)))
        tensors = read_tensors(self._store, refs[contribution.weights], names)
        tensors |= {n: v for n, v in withheld_tensors.items() if n in names}

        def read_sent() -> Submodel:
            return Submodel(selection, read_tensors(self._store, refs[contribution.sent], names))

        trained, cut = Submodel(selection, tensors), Cut(scene, turn, round_selection)
        report = UpdateReport(cut, trained, contribution.weight, contribution.steps, read_sent)
        return shorten_update(report, contribution.shares) if contribution.shares else report

    def _selection(self, contribution: do.Contribution) -> Selection:
        # The channels of what was sent: an extractor may have cut fewer than the turn's, or others.
        return self.archive.selection(
            contribution.ranking or contribution.basis.ranking, contribution.widths or contribution.part.widths
        )


def gather_named(selection: Selection, model: Tensors, names: frozenset[str]) -> Tensors:
    """The tensors of a submodel that have these names."""
    if not names:
        return {}
    submodel = selection.gather(model)
    return {name: submodel[name] for name in sorted(names)}
