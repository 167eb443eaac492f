"""Finds the channel ranking that a finished model is stored with, so that it can be cut for boards."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.core.errors import ConfigError, MissingExtraError
from fedprune.jobs.job import Job
from fedprune.strategies import compose
from fedprune.strategies.importance.scoring import Ranks
from fedprune.strategies.values import Scene
from fedprune_export.pruning.model import Model
from fedprune_server.executor.archive import Archive

log = logging.getLogger("fedprune.server")


def final_ranks(job: Job, model: Model, state: State, store: BlobStore, digest: str) -> Ranks | None:
    """The ranks of the channels (the best first) by which a job would cut its next submodel from the finished model,
    whose weights have this digest. `model` is the model with which the job began.

    None if all boards trained the whole model, if submodels aren't the first channels of a ranking (other channels, or
    elements), or if only the round decides the ranks (rolling windows, random ranks). None also if the user's own
    strategy fails: the model is worth more than its ranks."""
    try:
        return _next_ranks(job, model, state, store, digest)
    except (ConfigError, MissingExtraError) as error:
        log.warning("the model is without the ranks of its fleet: %s", error)
        return None


def _next_ranks(job: Job, model: Model, state: State, store: BlobStore, digest: str) -> Ranks | None:
    architecture = model.architecture
    strategy, sizes, archive = compose(job), architecture.sizes, Archive(architecture, store)
    has_narrow_boards = any(device.widths and tuple(device.widths) != sizes for device in state.devices.values())
    if not has_narrow_boards and not strategy.planned_recipe(job, "", sizes, 1.0, 1).ordered_dropout:
        return None
    if not strategy.is_device_independent:
        return None
    weights, memory, devices = archive.model(digest), archive.memory(state.memory), tuple(sorted(state.devices))
    scene = Scene(architecture, job.seed, state.round + 1, weights, memory, job.training_recipe, devices, model.ranks)
    # If the same model gets other ranks a round later, only the round decides them. `order` is set for element masks.
    ranking, later_ranking = strategy.rank(scene), strategy.rank(replace(scene, round=scene.round + 1))
    if ranking.order is not None or not all(map(np.array_equal, ranking.ranks, later_ranking.ranks)):
        return None
    return ranking.ranks
