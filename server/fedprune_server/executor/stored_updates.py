"""Stored updates and what they were made of, read from blobs for a strategy's roles."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial

from fedprune.aggregation.client_update import check_squares
from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.blobs.tensor_reader import read_tensors
from fedprune.coordination import commands as do
from fedprune.coordination.limits import RoundUpdate, shortened
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.model.trainable import spelt
from fedprune.strategies import Strategy
from fedprune.strategies.importance.scoring import Ranks
from fedprune.strategies.values import Cut, Report, Scene, Submodel, Turn
from fedprune_server.executor.archive import Archive, parts


class StoredUpdates:
    """Reads the scenes, submodels and updates that commands name.

    Args:
        withheld: By recipe, the tensors that no update carries.
    """

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

    def scene(self, round_: int, model: str, memory: dict[str, str], participants: tuple[str, ...] = ()) -> Scene:
        return Scene(
            self._architecture,
            self._job.seed,
            round_,
            self.archive.model(model),
            self.archive.memory(memory),
            self._job.training,
            participants,
            self._ranks,
        )

    def turn(self, basis: do.Basis, part: do.Part) -> Turn:
        return Turn(
            self._job.seed,
            basis.round,
            part.device,
            part.widths,
            part.density,
            part.samples,
            part.last_counted_round,
            part.work,
            part.mixed,
            part.core,
        )

    def recipe(self, turn: Turn) -> Recipe:
        recipe = self._job.privacy.asked_of(self._strategy.recipe(self._job.training, turn))
        recipe = recipe if turn.work == 1 else replace(recipe, epochs=recipe.epochs * turn.work)
        personal = spelt(recipe.personal, self._architecture)
        return recipe if personal == recipe.personal else replace(recipe, personal=personal)

    def withheld(self, basis: do.Basis, part: do.Part) -> frozenset[str]:
        """The tensors that no update of a device has."""
        return self._withheld(self.recipe(self.turn(basis, part)))

    def cut(self, basis: do.Basis, part: do.Part) -> Cut:
        """The parts of a device's submodel."""
        turn = self.turn(basis, part)
        scene = self.scene(basis.round, basis.model, basis.memory)
        withheld = self._withheld(self.recipe(turn))
        past = self.archive.past(part.past, lambda s: _gathered(s, scene.model, withheld))
        selection = self.archive.selection(basis.ranking, part.widths)
        return Cut(scene, turn, selection, self.archive.order(basis.order), past)

    def update(self, found: do.Contribution) -> RoundUpdate:
        """A stored update, to be read when its round needs it."""
        basis, part = found.basis, found.part
        content = (found.weights, found.sent, found.mask, found.codec, found.ranking, found.widths)
        key = (basis.round, basis.model, basis.ranking, part.device, part.attempt, content)
        read = partial(self.report, found)
        return RoundUpdate(part.device, key, found.weight, part.samples, read, found.shares)

    def report(self, found: do.Contribution) -> Report:
        """A stored update, whole. What doesn't travel is the server's own, whatever a device sent. Raises
        `FedpruneError` if it can't be read, or holds squared gradients that were not asked for or are none."""
        cut = self.cut(found.basis, found.part)
        selection = self._selection(found)
        mask = self.archive.mask(found.mask, selection)
        recipe = self.recipe(cut.turn)
        withheld = self._withheld(recipe)
        held = _gathered(selection, cut.scene.model, withheld)
        tensors, squares = parts(self.archive.update(found.weights, found.codec, found.sent), mask)

        def sent() -> Submodel:
            offered, _ = parts(self.archive.sent(found.sent), mask)
            return Submodel(selection, offered, mask)

        if squares:
            trainable = frozenset(t.name for t in self._architecture.trainable)
            check_squares(selection, squares, trainable - withheld if recipe.report_squares else ())
        trained = Submodel(selection, tensors | held, mask)
        return Report(cut, trained, found.weight, found.steps, sent, squares)

    def some(self, found: do.Contribution, refs: Mapping[str, BlobRef], names: Collection[str]) -> Report:
        """A stored update without a mask and without a codec, with some of its tensors; nothing else of it is read."""
        scene = self.scene(found.basis.round, found.basis.model, found.basis.memory)
        turn, selection = self.turn(found.basis, found.part), self._selection(found)
        whole = self.archive.selection(found.basis.ranking, found.part.widths)
        held = _gathered(selection, scene.model, self._withheld(self.recipe(turn)))
        tensors = read_tensors(self._store, refs[found.weights], names)
        tensors |= {n: v for n, v in held.items() if n in names}
        sent = partial(self._sent, selection, found.sent, refs, names)
        trained = Submodel(selection, tensors)
        report = Report(Cut(scene, turn, whole), trained, found.weight, found.steps, sent)
        return shortened(report, found.shares) if found.shares else report

    def _sent(self, selection: Selection, digest: str, refs: Mapping[str, BlobRef], names: Collection[str]) -> Submodel:
        return Submodel(selection, read_tensors(self._store, refs[digest], names))

    def _selection(self, found: do.Contribution) -> Selection:
        # The channels of what was sent: an extractor may have cut fewer than the turn's, or others.
        return self.archive.selection(found.ranking or found.basis.ranking, found.widths or found.part.widths)


def _gathered(selection: Selection, model: Tensors, names: frozenset[str]) -> Tensors:
    """Some tensors of a submodel."""
    if not names:
        return {}
    held = selection.gather(model)
    return {name: held[name] for name in sorted(names)}
