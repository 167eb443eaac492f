"""What an offer names: weights, masks and graphs, put into the blob store once and referred to by digest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from fedprune import step, tensorfile
from fedprune.blobs import BlobStore
from fedprune.freezing import frozen_tensors, matching
from fedprune.recipe import Recipe
from fedprune.selection import Tensors
from fedprune.strategies.roles import Submodel
from fedprune_export.imported import Model
from fedprune_export.inference import inference_model
from fedprune_export.training import training_graph
from fedprune_server.uploads import UPDATE_SIZE

GRAPH_ROUNDS = 10
"""A graph that no offer named for so many rounds is let go of, and made again if it is needed again."""

_WITHHELD = 64

K = TypeVar("K")


class _Graphs(Generic[K]):
    """References of one kind of graph, by what it was made for, with the round in which each was named last."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._known: dict[K, tuple[dict[str, Any], int]] = {}
        self._round = 0

    def get(self, key: K, round_: int, make: Callable[[], bytes]) -> dict[str, Any]:
        """The graph's reference; it is made if it isn't known, or was deleted meanwhile."""
        if round_ > self._round:
            self._round = round_
            self._known = {k: (ref, last) for k, (ref, last) in self._known.items() if last >= round_ - GRAPH_ROUNDS}
        found = self._known.get(key)
        if found is None or not self._store.has(found[0]["sha256"]):
            found = (self._store.put(make()).to_dict(), self._round)
        self._known[key] = (found[0], self._round)
        return found[0]

    def digests(self) -> set[str]:
        """Of all that are known."""
        return {ref["sha256"] for ref, _ in self._known.values()}


class Offers:
    """Puts what offers name into a store.

    Args:
        model: The imported model.
        store: Where blobs are put.
    """

    def __init__(self, model: Model, store: BlobStore) -> None:
        self._model = model
        self._store = store
        self._training = _Graphs[str](store)
        self._inference = _Graphs[tuple[int, ...]](store)
        self._withheld: dict[str, frozenset[str]] = {}

    def body(self, submodel: Submodel, recipe: Recipe, round_: int) -> dict[str, Any]:
        """The entries of an offer that follow from what a device is sent and how it trains.

        Args:
            submodel: What it is sent.
            recipe: How it trains.
            round_: The offer's round.

        Raises:
            ModelError: The model can't be trained by this recipe.
            StorageError: The disk fails or is full.
        """
        mask = submodel.mask
        packed = submodel.tensors if mask is None else mask.pack(submodel.tensors)
        body = {
            "weights": self._store.put(tensorfile.encode(packed)).to_dict(),
            "training": self.training(recipe, round_),
            "inference": self.inference(submodel.selection.widths, round_),
            "recipe": recipe.to_offer(),
            UPDATE_SIZE: self._update_size(packed, recipe),
        }
        if mask is not None:
            body["mask"] = self._store.put(tensorfile.encode(mask.to_tensors())).to_dict()
        return body

    def training(self, recipe: Recipe, round_: int) -> dict[str, Any]:
        """The training graph of a recipe, named in a round; errors are those of `body`."""
        features = recipe.features
        return self._training.get(features.key, round_, lambda: training_graph(self._model, features).to_bytes())

    def inference(self, widths: tuple[int, ...], round_: int) -> dict[str, Any]:
        """The inference graph at some widths, named in a round; errors are those of `body`."""
        return self._inference.get(widths, round_, lambda: inference_model(self._model, widths))

    def graphs(self) -> set[str]:
        """Digests of the graphs that offers of the latest rounds named."""
        return self._training.digests() | self._inference.digests()

    def withheld(self, recipe: Recipe) -> frozenset[str]:
        """Tensors that no update carries: those that are frozen, and those that stay on the board.

        Raises:
            ConfigError: A pattern matches no tensor, or no tensor is left to train.
        """
        features = recipe.features
        key = "|".join((features.key, *recipe.personal))
        if key not in self._withheld:
            architecture = self._model.architecture
            frozen = frozen_tensors(architecture, features, self._model.frozen)
            if len(self._withheld) >= _WITHHELD:
                self._withheld.clear()
            # A pattern that matches nothing is an error: what was misspelt must not be sent by mistake.
            self._withheld[key] = frozen | matching(architecture, recipe.personal, "recipe: personal")
        return self._withheld[key]

    def _update_size(self, packed: Tensors, recipe: Recipe) -> int:
        """Bytes of the update that answers these weights: as many, without what is withheld."""
        withheld = self.withheld(recipe)
        sent = {n: v for n, v in packed.items() if n not in withheld}
        if recipe.report_squares:
            trained = {t.name for t in self._model.architecture.trainable}
            sent |= {step.squares(n): v for n, v in sent.items() if n in trained}
        header = tensorfile.header((n, "F32", v.shape) for n, v in sent.items())
        return len(header) + sum(v.nbytes for v in sent.values())
