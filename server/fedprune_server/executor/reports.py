"""Stored updates, read back as what a strategy's roles look at."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.blobs.tensor_reader import read_tensors
from fedprune.coordination import commands as do
from fedprune.coordination.influence import shortened
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture
from fedprune.model.classifier_head import spelt
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies import Strategy
from fedprune.strategies.roles import Cut, Report, Scene, Submodel, Turn
from fedprune.training.recipe import Recipe
from fedprune_server.executor.archive import Archive, parts


class Reports:
    """Reads what commands name.

    Args:
        job: The job's settings.
        architecture: The model's.
        strategy: The job's.
        store: Where blobs lie.
        withheld: Which tensors no update carries, by recipe.
    """

    def __init__(
        self,
        job: Job,
        architecture: Architecture,
        strategy: Strategy,
        store: BlobStore,
        withheld: Callable[[Recipe], frozenset[str]],
    ) -> None:
        self.archive = Archive(architecture, store)
        self._job = job
        self._architecture = architecture
        self._strategy = strategy
        self._store = store
        self._withheld = withheld

    def scene(self, round_: int, model: str, memory: dict[str, str], participants: tuple[str, ...] = ()) -> Scene:
        """A round."""
        return Scene(
            self._architecture,
            self._job.seed,
            round_,
            self.archive.model(model),
            self.archive.memory(memory),
            self._job.recipe,
            participants,
        )

    def turn(self, basis: do.Basis, part: do.Part) -> Turn:
        """A device's part in a round."""
        return Turn(self._job.seed, basis.round, part.device, part.widths, part.density, part.samples, part.last)

    def recipe(self, turn: Turn) -> Recipe:
        """A device's recipe."""
        recipe = self._job.privacy.asked_of(self._strategy.objective.recipe(self._job.recipe, turn))
        return replace(recipe, personal=spelt(recipe.personal, self._architecture))

    def withheld(self, basis: do.Basis, part: do.Part) -> frozenset[str]:
        """What no update of a device carries."""
        return self._withheld(self.recipe(self.turn(basis, part)))

    def cut(self, basis: do.Basis, part: do.Part) -> Cut:
        """What a device's submodel is made of."""
        turn = self.turn(basis, part)
        scene = self.scene(basis.round, basis.model, basis.memory)
        withheld = self._withheld(self.recipe(turn))
        past = self.archive.past(part.past, lambda s: _gathered(s, scene.model, withheld))
        selection = self.archive.selection(basis.ranking, part.widths)
        return Cut(scene, turn, selection, self.archive.order(basis.order), past)

    def report(self, found: do.Contribution) -> Report:
        """A stored update. What doesn't travel is the server's own, whatever a device says of it."""
        cut = self.cut(found.basis, found.part)
        selection = self._selection(found)
        mask = self.archive.mask(found.mask, selection)
        withheld = self._withheld(self.recipe(cut.turn))
        held = _gathered(selection, cut.scene.model, withheld)
        tensors, squares = parts(self.archive.update(found.weights, found.codec, found.sent), mask)

        def sent() -> Submodel:
            offered, _ = parts(self.archive.tensors(found.sent), mask)
            return Submodel(selection, offered, mask)

        trained = Submodel(selection, tensors | held, mask)
        return _limited(Report(cut, trained, found.weight, found.steps, sent, squares), found)

    def some(self, found: do.Contribution, refs: Mapping[str, BlobRef], names: Collection[str]) -> Report:
        """A stored update without a mask and without a codec, with some of its tensors; nothing else of it is read.

        Args:
            found: The update.
            refs: Of its blobs.
            names: The tensors.
        """
        scene = self.scene(found.basis.round, found.basis.model, found.basis.memory)
        turn, selection = self.turn(found.basis, found.part), self._selection(found)
        whole = self.archive.selection(found.basis.ranking, found.part.widths)
        held = _gathered(selection, scene.model, self._withheld(self.recipe(turn)))
        tensors = read_tensors(self._store, refs[found.weights], names)
        tensors |= {n: v for n, v in held.items() if n in names}
        sent = partial(self._sent, selection, found.sent, refs, names)
        trained = Submodel(selection, tensors)
        return _limited(Report(Cut(scene, turn, whole), trained, found.weight, found.steps, sent), found)

    def _sent(self, selection: Selection, digest: str, refs: Mapping[str, BlobRef], names: Collection[str]) -> Submodel:
        return Submodel(selection, read_tensors(self._store, refs[digest], names))

    def _selection(self, found: do.Contribution) -> Selection:
        # What was sent says where its channels live: an extractor may have cut less than the turn's, or others.
        return self.archive.selection(found.ranking or found.basis.ranking, found.widths or found.part.widths)

    def reported(self, report: Report) -> frozenset[str]:
        """Of which tensors a device was asked for squared gradients."""
        recipe = self.recipe(report.cut.turn)
        if not recipe.report_squares:
            return frozenset()
        return frozenset(t.name for t in self._architecture.trainable) - self._withheld(recipe)

    def lifted(self, report: Report) -> Submodel:
        """What of an update enters the sums."""
        return self._strategy.personaliser.share(report, self._strategy.extractor.reconstruct(report))


def _limited(report: Report, found: do.Contribution) -> Report:
    return shortened(report, found.shares) if found.shares else report


def _gathered(selection: Selection, model: Tensors, names: frozenset[str]) -> Tensors:
    """Some tensors of a submodel."""
    if not names:
        return {}
    held = selection.gather(model)
    return {name: held[name] for name in sorted(names)}
