"""A round of stored updates, for tests of who adds them up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune.model.architecture import widths_at
from fedprune_export.pruning.model import Model
from fedprune_server.executor.worker import Worker

DENSITIES = (1.0, 0.5, 0.25, 1.0, 0.75, 0.5, 0.25, 1.0, 0.5)

STRATEGIES: dict[str, dict[str, Any]] = {
    "plain": {"strategy": "plain"},
    "momentum and filling": {"strategy": "fedprune"},
    "evidence": {"strategy": "ca-hfp"},
    "moves of earlier models": {"strategy": "fedbuff"},
    "transport": {"strategy": "subflot"},
    "own parts": {"strategy": "fedper"},
}


def worker(model: Model, folder: Path, settings: dict[str, Any]) -> Worker:
    return Worker(Job.from_dict({"name": "t", **settings}), model, BlobStore(folder, durable=False))


def round_of(w: Worker, spoilt: str = "", far: str = "") -> tuple[list[do.Fold], do.Close]:
    """A round's updates as they come, and its end.

    Args:
        w: Makes the submodels.
        spoilt: A device whose update holds numbers that are never accepted.
        far: A device whose update is five times as long as the others'.
    """
    start = w.initial()
    names = tuple(f"d{k}" for k in range(len(DENSITIES)))
    scored = w.execute(do.Score(1, start, {}, names))
    assert isinstance(scored, on.Scored)
    basis = do.Basis(1, start, scored.ranking, scored.order)
    found = []
    for k, name in enumerate(names):
        part = do.Part(name, 1, widths_at(w.architecture, DENSITIES[k]), DENSITIES[k], 10 + k, None)
        extracted = w.execute(do.Extract(basis, part))
        assert isinstance(extracted, on.Extracted)
        offer, dice = extracted.offer, np.random.default_rng(k)
        withheld = w.updates.withheld(basis, part)
        update = {
            n: (v + (0.5 if name == far else 0.1) * dice.standard_normal(v.shape)).astype(np.float32)
            for n, v in tensorfile.decode(w.store.read(offer["weights"]["sha256"])).items()
            if n not in withheld
        }
        for n, v in update.items():
            if n.endswith("var"):
                np.abs(v, out=v)
        if name == spoilt:
            next(iter(update.values())).reshape(-1)[0] = np.nan
        stored = w.store.put(tensorfile.encode(update)).sha256
        sent, mask = offer["weights"]["sha256"], offer["mask"]["sha256"] if "mask" in offer else None
        widths = tuple(offer["widths"])
        found.append(do.Contribution(basis, part, sent, mask, stored, 10 + k, 3, widths, offer["ranking"]))
    return [do.Fold(1, start, {}, c) for c in found], do.Close(1, start, {}, names, tuple(found))
