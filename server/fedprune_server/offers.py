"""What an offer names: weights, masks and graphs, put into the blob store once and referred to by digest."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

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

_CACHED_GRAPHS = 64


class Offers:
    """Puts what offers name into a store.

    Args:
        model: The imported model.
        store: Where blobs are put.
    """

    def __init__(self, model: Model, store: BlobStore) -> None:
        self._model = model
        self._store = store
        self._training: dict[str, dict[str, Any]] = {}
        self._inference: OrderedDict[tuple[int, ...], dict[str, Any]] = OrderedDict()
        self._withheld: dict[str, frozenset[str]] = {}

    def body(self, submodel: Submodel, recipe: Recipe) -> dict[str, Any]:
        """The entries of an offer that follow from what a device is sent and how it trains.

        Raises:
            ModelError: The model can't be trained by this recipe.
            StorageError: The disk fails or is full.
        """
        mask = submodel.mask
        packed = submodel.tensors if mask is None else mask.pack(submodel.tensors)
        body = {
            "weights": self._store.put(tensorfile.encode(packed)).to_dict(),
            "training": self.training(recipe),
            "inference": self.inference(submodel.selection.widths),
            "recipe": recipe.to_offer(),
            UPDATE_SIZE: self._update_size(packed, recipe),
        }
        if mask is not None:
            body["mask"] = self._store.put(tensorfile.encode(mask.to_tensors())).to_dict()
        return body

    def training(self, recipe: Recipe) -> dict[str, Any]:
        """The training graph of a recipe; errors are those of `body`."""
        features = recipe.features
        if features.key not in self._training:
            graph = training_graph(self._model, features)
            self._training[features.key] = self._store.put(graph.to_bytes()).to_dict()
        return self._training[features.key]

    def inference(self, widths: tuple[int, ...]) -> dict[str, Any]:
        """The inference graph at some widths; errors are those of `body`."""
        known = self._inference.get(widths)
        if known is None:
            known = self._inference[widths] = self._store.put(inference_model(self._model, widths)).to_dict()
            while len(self._inference) > _CACHED_GRAPHS:
                self._inference.popitem(last=False)
        self._inference.move_to_end(widths)
        return known

    def graphs(self) -> set[str]:
        """Digests of the graphs that were handed out."""
        return {g["sha256"] for g in (*self._inference.values(), *self._training.values())}

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
