"""Checks of an offer before anything is downloaded, and comparisons of offers."""

from __future__ import annotations

from msgspec.structs import replace

from fedprune.core.errors import PlanError, StorageFullError
from fedprune.model import step_contract
from fedprune.model.recipe import Recipe
from fedprune.planning.costs import storage_bytes
from fedprune.planning.profile import HardwareProfile
from fedprune.wire.messages import Accepted, Cancelled, Offer, SecureStep, UpdateAnnouncement
from fedprune_device.storage.state_directory import DeviceStore


def check_offer(offer: Offer, store: DeviceStore, profile: HardwareProfile | None) -> None:
    """Check an offer; raises `ConfigError`, `PrivacyError`, `StorageFullError`, or `PlanError` beyond the profile."""
    recipe = Recipe.from_dict(offer.recipe)
    store.privacy.check(recipe)
    full_size = _dense_bytes(offer)
    lowered_graphs = offer.lowered or {}
    needed, free = _needed_bytes(offer, recipe, store), store.free_bytes() + store.reclaimable_bytes(offer)
    if needed > free:
        raise StorageFullError("no room for the offer's files", expected=f"{needed} bytes", got=f"{free} free")
    if profile is None:
        return
    total = storage_bytes(full_size, offer.training.size, offer.inference.size, recipe.extra_files)
    total += sum(r.size for r in offer.graphs[2:]) + (2 * full_size if lowered_graphs else 0)
    if total > profile.storage.budget_bytes:
        raise PlanError(
            "the offer needs more room than the profile allows",
            expected=f"at most {profile.storage.budget_bytes} bytes",
            got=total,
        )
    memory = _min_weight_copies(recipe) * full_size + (offer.drift.size if offer.drift else 0)
    if memory > profile.training_memory_bytes:
        raise PlanError(
            "the offered model needs more memory than the profile allows",
            expected=f"at most {profile.training_memory_bytes} bytes",
            got=f"{memory} and more",
        )


def fits_disk(offer: Offer, store: DeviceStore) -> bool:
    """Whether the disk has room for an offer without deleting anything."""
    return _needed_bytes(offer, Recipe.from_dict(offer.recipe), store) <= store.free_bytes()


def _needed_bytes(offer: Offer, recipe: Recipe, store: DeviceStore) -> int:
    """Bytes on the disk that an offer needs in addition to what has arrived."""
    missing = [r for r in (*offer.blobs(), *offer.encoded) if not store.blobs.has(r.sha256)]
    # With a codec, three copies more: the serving weights, which the update's file no longer holds, and the remainder
    # of encoding before and after the round.
    codec_copies = 0 if offer.codec is None else 3
    if offer.secure is not None:
        codec_copies = 5  # the same, and a vector of up to 8 bytes a number, twice as large as float32
    # A lowered model is smaller than its float32 model, and counts as one copy.
    copies = 2 + recipe.extra_files + codec_copies + len(offer.lowered or {})
    return sum(r.size for r in missing) + copies * _dense_bytes(offer)


def _dense_bytes(offer: Offer) -> int:
    """About the bytes of the weights with all elements in their places: 32 times the mask's, which has a bit for each
    float32."""
    return max(offer.weights.size, 0 if offer.mask is None else 32 * offer.mask.size)


def _min_weight_copies(recipe: Recipe) -> int:
    """How many arrays as large as all weights a training needs at least: weights and optimiser's state, now and next.

    Only the training graph says which tensors are frozen, so for a recipe that freezes some only the weights count.
    """
    return 1 if recipe.frozen or recipe.trainable else 3 + 2 * len(step_contract.state_names(recipe.optimizer))


def is_same_work(first: Offer, second: Offer) -> bool:
    """Whether two offers lead to the same bits: they differ only in the attempt's number and the web server's URL."""
    return _without_attempt(first) == _without_attempt(second)


def _without_attempt(offer: Offer) -> Offer:
    return replace(offer, attempt=0, blobs_at=None)


def job_and_round(message: Offer | UpdateAnnouncement | Accepted) -> tuple[str, int]:
    return message.job, message.round


def attempt_of(message: Offer | UpdateAnnouncement | Cancelled | SecureStep) -> tuple[str, int, int]:
    return message.job, message.round, message.attempt
