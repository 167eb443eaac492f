"""Makes the offer of a device's part in a round: the submodel that is cut for it, its graphs, and its recipe.

Devices that would get the same submodel, recipe and graphs share one offer.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture
from fedprune.model.element_mask import gather_mask
from fedprune.model.recipe import Recipe
from fedprune.model.selection import ALL_ACTIVE, Selection
from fedprune.strategies import Strategy
from fedprune.strategies.element_masks import global_mask
from fedprune.strategies.importance.element_ranking import magnitudes, mask_threshold
from fedprune.strategies.values import Cut, Submodel
from fedprune.updates import increments
from fedprune_server.executor.offer_blobs import OfferBlobs
from fedprune_server.executor.offer_entries import blobs_of_offer, offer_graphs
from fedprune_server.executor.round_closer import RoundCloser
from fedprune_server.executor.stored_updates import StoredUpdates

# Latest bases (the models and rankings from which submodels are cut) whose offers are kept for further devices.
_KEPT_BASES = 2


class OfferMaker:
    """Makes the offers of a job. `closer` adds the fields by which an offer asks for the update in a form of its own;
    `unit` is the processing unit of devices that have not measured theirs."""

    def __init__(
        self, job: Job, architecture: Architecture, strategy: Strategy, store: BlobStore, updates: StoredUpdates,
        blobs: OfferBlobs, closer: RoundCloser, unit: str,
    ) -> None:  # fmt: skip
        self._seed, self._architecture, self._strategy, self._store = job.seed, architecture, strategy, store
        self._updates, self._blobs, self._closer, self._unit = updates, blobs, closer, unit
        self._shared_offers: dict[Hashable, dict[Hashable, dict[str, Any]]] = {}
        # Of the latest basis, by the densities from which and to which they go.
        self._increments: tuple[Hashable, dict[tuple[float, float], dict[str, Any]]] = None, {}

    def note(self, command: do.Extract, event: on.Extracted) -> None:
        """Note a new offer, perhaps of a helper: its graphs, and that other devices may get the same offer."""
        self._blobs.note(offer_graphs(event.offer), event.round)
        key = self.shared_key(command)
        if key is not None:
            basis = _basis_key(command)
            if basis not in self._shared_offers:
                # Devices of an asynchronous job may still be given the previous basis.
                self._shared_offers = dict([*self._shared_offers.items(), (basis, {})][-_KEPT_BASES:])
            self._shared_offers[basis].setdefault(key, dict(event.offer))

    def shared_key(self, command: do.Extract) -> Hashable:
        """The key of an offer: devices with equal keys get the same offer. None if only this device may get it."""
        if not self._strategy.is_device_independent:
            return None
        unit = command.unit or self._unit
        # Density tells submodels of equal widths apart only with element masks.
        density = command.part.density if command.basis.order is not None else 1.0
        submodel_key = command.part.widths, density
        return _basis_key(command), submodel_key, command.coding, self._recipe(command), unit, command.levels

    def _recipe(self, command: do.Extract) -> Recipe:
        recipe = self._updates.recipe(self._updates.turn(command.basis, command.part))
        return recipe.with_micro_batches(command.accumulate)

    def make(self, command: do.Extract) -> on.Extracted:
        """The event with a device's offer, a new one or that of a device with the same submodel."""
        device_part, key = command.part, self.shared_key(command)
        offer = self._shared_offers.get(_basis_key(command), {}).get(key)
        # Blobs may have been swept since the offer was made.
        if offer is None or not all(map(self._store.has, blobs_of_offer(offer))):
            offer = self._new_offer(command)
        event = on.Extracted(command.basis.round, device_part.device, device_part.attempt, dict(offer))
        self.note(command, event)
        return event

    def _new_offer(self, command: do.Extract) -> dict[str, Any]:
        cut = self._updates.cut(command.basis, command.part)
        submodel = self._strategy.extract(cut)
        recipe = _submodel_recipe(self._recipe(command), submodel)
        held_submodel = command.coding.received
        previous_selection = None
        if held_submodel is not None and self._store.has(held_submodel.ranking):
            previous_selection = self._updates.archive.selection(held_submodel.ranking, held_submodel.widths)
        body = self._blobs.body(submodel, recipe, command.unit or self._unit, command.coding, previous_selection)
        return {
            **self._closer.offer_fields(command.basis, command.part, submodel.selection),
            "seed": self._seed,
            "architecture": self._architecture.digest,
            "selection": submodel.selection.digest,
            "ranking": self._ranking(command.basis, cut, submodel.selection),
            "widths": list(submodel.selection.widths),
            "classes": self._architecture.classes,
            **body,
            **self._increment_fields(command, cut, submodel, recipe, body),
        }

    def _increment_fields(
        self, command: do.Extract, cut: Cut, submodel: Submodel, recipe: Recipe, body: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The increments of a submodel at full width; none where they would be more bytes than a plan counts, or where
        frozen tensors, which boards keep from round to round, would travel again."""
        may_split = command.levels and cut.order and cut.turn.widths == self._architecture.sizes
        if not may_split or "coded" in body or self._blobs.withheld_names(recipe):
            return {}
        densities = [*(d for d in command.levels if d < cut.turn.density), cut.turn.density]
        if self._increments[0] != _basis_key(command):
            self._increments = _basis_key(command), {}
        steps, made = list(pairwise((0.0, *densities))), self._increments[1]
        missing = {step for step in steps if step not in made or not self._store.has(made[step]["sha256"])}
        if missing:
            cuts = [replace(cut, turn=replace(cut.turn, density=density)) for density in densities]
            masks = [gather_mask(global_mask(smaller_cut), submodel.selection) for smaller_cut in cuts]
            # In a tiny model a smaller density may keep all elements, too; and a whole model alone has no increments.
            if not all(masks[:-1]) or masks == [ALL_ACTIVE]:
                return {}
            for step, smaller, mask in zip(steps, (None, *masks), masks, strict=False):
                if step in missing:
                    made[step] = self._store.put(increments.encode(submodel.tensors, smaller, mask)).to_dict()
        refs = [made[step] for step in steps]
        most_bytes = body["weights"]["size"] + sum(v.size for v in (cut.order or {}).values()) // 8
        return {"increments": refs} if sum(ref["size"] for ref in refs) <= most_bytes else {}

    def _ranking(self, basis: do.Basis, cut: Cut, selection: Selection) -> str:
        """The ranking whose first channels a submodel has: the round's, or a ranking of its own.

        The update is folded by this ranking, so that a strategy may extract any channels.
        """
        if selection is cut.selection or selection.digest == cut.selection.with_widths(selection.widths).digest:
            return basis.ranking
        return self._store.put(selection.with_widths(self._architecture.sizes).to_json().encode()).sha256


def _submodel_recipe(recipe: Recipe, submodel: Submodel) -> Recipe:
    """The recipe of a submodel with its drift, and its mask, which stays as it is or follows a threshold."""
    recipe = replace(recipe, drift=recipe.drift or bool(submodel.drift))
    if not submodel.mask:
        return recipe
    if recipe.mask == "threshold":
        smallest = mask_threshold(magnitudes(submodel.tensors, submodel.mask), submodel.mask)
        return replace(recipe, mask_threshold=smallest)
    return replace(recipe, mask="hard")


def _basis_key(command: do.Extract) -> Hashable:
    """The key of the model and ranking from which a submodel is cut."""
    basis = command.basis
    return basis.round, basis.model, basis.ranking, basis.order
