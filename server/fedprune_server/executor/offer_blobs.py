"""Makes the blobs that an offer names (weights, masks, drift, graphs), and puts each into the blob store once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from fedprune import updates
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.core import tensorfile
from fedprune.core.errors import ProtocolError
from fedprune.model import step_contract
from fedprune.model.element_mask import mask_to_bits, pack_active
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.model.trainable import frozen_tensors, matching_tensors
from fedprune.planning.costs import file_bytes
from fedprune.planning.probe_report import CPU
from fedprune.strategies.values import Submodel
from fedprune.updates.relocation import make_relocation, relocate
from fedprune_export.bundles.inference import inference_model
from fedprune_export.precision import lower
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph, unreached_notes
from fedprune_server.executor.offer_entries import UPDATE_BOUND, UPDATE_SIZE
from fedprune_server.executor.retention import LatestGraphs

# Recipes are few; a strategy that changes one in every round must not fill memory.
_MAX_WITHHELD = 64

_LOG = logging.getLogger("fedprune.server")


class OfferBlobs:
    """Makes the blobs that offers name: weights, masks, drift, graphs. Boards may serve at lower `precisions`, too."""

    def __init__(self, model: Model, store: BlobStore, precisions: Sequence[str] = ()) -> None:
        self._model = model
        self._store = store
        self._precisions = precisions
        self._graphs: dict[str | tuple[int, ...], dict[str, Any]] = {}
        self._latest = LatestGraphs()
        self._withheld: dict[tuple[str, ...], frozenset[str]] = {}
        self._trained = frozenset(t.name for t in model.architecture.trainable)

    def body(
        self,
        submodel: Submodel,
        recipe: Recipe,
        unit: str = CPU,
        coding: do.Coding = do.Coding(),  # noqa: B008 - it is frozen
        previous_selection: Selection | None = None,
    ) -> dict[str, Any]:
        """The entries of an offer that follow from the device's submodel and recipe. Raises `ModelError` if the model
        can't be trained by this recipe, and `StorageError` if the disk fails or is full.

        Args:
            unit: The processing unit on which the device trains.
            coding: The codecs of weights and update, and the weights that the device has.
            previous_selection: The selection of these weights; None if it is unknown.
        """
        mask, widths = submodel.mask, submodel.selection.widths
        packed, coded = self._encode_weights(pack_active(mask, submodel.tensors), coding, submodel, previous_selection)
        body: dict[str, Any] = {
            **coded,
            "weights": self._store.put(tensorfile.encode(packed)).to_dict(),
            "training": self.training_ref(recipe, unit),
            "inference": self._graph_ref(widths, lambda: inference_model(self._model, widths)),
            "recipe": recipe.to_offer(),
        }
        # Shapes of the tensors in the update that answers these weights.
        withheld_names = self.withheld_names(recipe)
        shapes = {n: v.shape for n, v in packed.items() if n not in withheld_names}
        if recipe.report_squares:
            shapes |= {step_contract.squares_name(n): shape for n, shape in shapes.items() if n in self._trained}
        body[UPDATE_SIZE] = file_bytes(shapes)
        update_codec = None if coding.update is None else updates.Codec.parse(coding.update)
        if update_codec is not None:
            bound = updates.max_update_bytes(update_codec, shapes, self._trained)
            body |= {"codec": coding.update, UPDATE_BOUND: bound}
        if self._model.base is not None:
            body["base"] = self._graph_ref("base", lambda: self._model.base_file or b"")
        if self._precisions:
            body["lowered"] = self.lowered_refs(widths)
        if mask:
            body["mask"] = self._store.put(tensorfile.encode(mask_to_bits(mask))).to_dict()
        if drift := {n: v for n, v in submodel.drift.items() if n not in withheld_names}:
            body["drift"] = self._store.put(tensorfile.encode(pack_active(mask, drift))).to_dict()
        return body

    def training_ref(self, recipe: Recipe, unit: str = CPU) -> dict[str, Any]:
        """The training graph of a recipe for a unit; errors are those of `body`."""
        features = recipe.features

        def make() -> bytes:
            graph = training_graph(self._model, features, unit)
            for note in unreached_notes(graph.metadata):
                _LOG.info("model: %s", note)
            return graph.to_bytes()

        return self._graph_ref(f"{unit} {features.key}", make)

    def lowered_refs(self, widths: tuple[int, ...]) -> dict[str, dict[str, Any]]:
        """The graphs of lower precisions at some widths. Raises `ModelError` if nothing of the model
        can be computed with 8 bits, where that is asked for; and `StorageError` if the disk fails or is full."""

        def make(precision: str) -> bytes:
            return lower(self._model, widths, precision).packed

        return {p: self._graph_ref(f"{p} {widths}", partial(make, p)) for p in self._precisions}

    def note(self, graphs: Iterable[str], round_: int) -> None:
        """Note graphs that an offer of a round names, and drop graphs that no offer has named for long."""
        self._latest.note_named(graphs, round_)
        if self._latest.drop_unnamed(round_):
            current = self._latest.digests()
            self._graphs = {k: ref for k, ref in self._graphs.items() if ref["sha256"] in current}

    def graph_digests(self) -> set[str]:
        """Digests of the graphs that offers of the latest rounds named."""
        return self._latest.digests()

    def _graph_ref(self, key: str | tuple[int, ...], make: Callable[[], bytes]) -> dict[str, Any]:
        """The reference of a graph, which is made if it is new or its blob was deleted."""
        ref = self._graphs.get(key)
        if ref is None or not self._store.has(ref["sha256"]):
            ref = self._store.put(make()).to_dict()
        self._graphs[key] = ref
        return ref

    def withheld_names(self, recipe: Recipe) -> frozenset[str]:
        """Tensors that no update carries: those that are frozen, and those that stay on the board. Raises `ConfigError`
        if a pattern matches no tensor, or no tensor is left to train."""
        key = (recipe.features.key, *recipe.personal)
        if key not in self._withheld:
            architecture = self._model.architecture
            frozen = frozen_tensors(architecture, recipe.features, self._model.frozen)
            if len(self._withheld) >= _MAX_WITHHELD:
                self._withheld.clear()
            # A pattern that matches nothing is an error: what was misspelt must not be sent by mistake.
            self._withheld[key] = frozen | matching_tensors(architecture, recipe.personal, ("recipe", "personal"))
        return self._withheld[key]

    def _encode_weights(
        self, packed: Tensors, coding: do.Coding, submodel: Submodel, previous_selection: Selection | None
    ) -> tuple[Tensors, dict[str, Any]]:
        """Encode weights. Returns the weights as the device will decode them, and the entries of its offer.

        Coding loses precision. The server continues from the decoded weights, so that both sides have the same bits.
        Losses don't add up over rounds, because the next difference is taken to what the device really has.
        """
        fields: dict[str, Any] = {}
        relocation_blob = b""
        if previous_selection is not None and previous_selection.digest != submodel.selection.digest:
            relocation_blob = make_relocation(previous_selection, submodel.selection)
            fields = {"moved": self._store.put(relocation_blob).to_dict(), "moved_from": previous_selection.digest}
        weights_codec = None if coding.weights is None else updates.Codec.parse(coding.weights)
        if weights_codec is None:
            return packed, fields
        fields["weights_codec"] = str(weights_codec)
        current_weights: Tensors | None = None
        digest = None if coding.received is None else coding.received.weights
        if digest and previous_selection is not None and not submodel.mask:
            current_weights = self._weights_on_device(digest, relocation_blob, packed)
        try:
            encoded = updates.weights.encode(weights_codec, packed, current_weights, self._trained)
            decoded_bytes = sum(v.nbytes for v in packed.values())
            decoded = updates.weights.decode(weights_codec, encoded, current_weights, decoded_bytes)
        except ProtocolError as error:
            _LOG.warning("weights are sent plainly: %s", error)
            return packed, fields
        fields["coded"] = self._store.put(encoded).to_dict()
        return decoded, fields if current_weights is None else {**fields, "held": digest}

    def _weights_on_device(self, digest: str, relocation_blob: bytes, packed: Tensors) -> Tensors | None:
        """A device's weights, moved to their places in its new submodel; None if they are deleted or don't fit it."""
        if not self._store.has(digest):
            return None
        tensors: Tensors = tensorfile.decode(self._store.read(digest))
        tensors = relocate(tensors, relocation_blob, 2**40) if relocation_blob else tensors
        return tensors if {n: v.shape for n, v in tensors.items()} == {n: v.shape for n, v in packed.items()} else None
