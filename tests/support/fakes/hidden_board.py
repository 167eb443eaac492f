"""A board with a model of a hidden normalised layer (`make_device_graphs.hidden`), for tests of what it keeps."""

from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core import tensorfile
from fedprune.core.rng import keyed_generator
from fedprune.model.architecture import FIXED, Architecture, Axis, ChannelGroup, Segment, TensorKind, TensorSpec
from fedprune.model.element_mask import mask_to_bits, pack_active
from fedprune.model.recipe import Recipe
from fedprune.model.selection import ALL_ACTIVE, ElementMask, Tensors
from fedprune.wire.messages import Offer, UpdateAnnouncement
from fedprune_device.data.dataset import LocalData
from fedprune_device.storage.local_state import LocalState
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.storage.state_store import FolderStateStore
from fedprune_device.training.round_runner import RoundRunner

HIDDEN, FEATURES, CLASSES = 8, 6, 3
SEED, DEVICE = 7, "d"
Array = np.ndarray[Any, Any]

ARCHITECTURE = Architecture(
    "hidden",
    (ChannelGroup("h", HIDDEN),),
    (
        TensorSpec("w1", TensorKind.WEIGHT, (Axis((Segment(0, 0, HIDDEN, 1),)), Axis((Segment(FIXED, 0, 1, 6),)))),
        TensorSpec("gamma", TensorKind.NORM_SCALE, (Axis((Segment(0, 0, HIDDEN, 1),)),)),
        TensorSpec("w2", TensorKind.WEIGHT, (Axis((Segment(FIXED, 0, 1, 3),)), Axis((Segment(0, 0, HIDDEN, 1),)))),
    ),
    (),
    (),
    (6,),
    (3,),
)
"""Its hidden channels; tensors that are read by name alone are left out."""


def hidden_weights(width: int = HIDDEN, seed: int = 0) -> Tensors:
    """In the order in which the compiler's graphs have them."""
    rng = np.random.default_rng(seed)
    shapes = {"w1": (width, FEATURES), "gamma": (width,), "beta": (width,), "mean": (width,), "var": (width,)}
    shapes |= {"w2": (CLASSES, width), "b2": (CLASSES,)}
    out = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    return out | {"var": np.abs(out["var"]) + np.float32(0.1)}


def logits(w: Tensors, x: Array) -> Array:
    """What the model predicts, in float64."""
    v = {n: a.astype(np.float64) for n, a in w.items()}
    h = (x @ v["w1"].T - v["mean"]) / np.sqrt(v["var"] + 1e-5) * v["gamma"] + v["beta"]
    return np.maximum(h, 0) @ v["w2"].T + v["b2"]


def measured_statistics(w: Tensors, x: Array, batch: int) -> dict[str, Array]:
    """Mean over batches of what each says: its mean and its unbiased variance."""
    order = keyed_generator(SEED, "calibration", DEVICE).permutation(len(x))
    activations = [x[rows].astype(np.float64) @ w["w1"].T for rows in np.array_split(order, -(-len(x) // batch))]
    return {
        "mean": np.mean([p.mean(0) for p in activations], axis=0),
        "var": np.mean([p.var(0, ddof=1) for p in activations], axis=0),
    }


class HiddenBoard:
    """A state directory that may be opened again and again, and offers of a server that is not there."""

    def __init__(self, root: Path, graphs: Path, data: LocalData) -> None:
        self.root, self.graphs, self.data = root, graphs, data

    def offer(self, number: int, recipe: Recipe, weights: Tensors, **changes: Any) -> Offer:
        graph, width = changes.pop("graph", "narrow"), len(weights["gamma"])
        mask: ElementMask = changes.pop("mask", ALL_ACTIVE)
        inference = "hidden" if width == HIDDEN else "hidden_half"
        with DeviceStore(self.root) as store:
            put = store.blobs.put
            values: dict[str, Any] = {
                "job": "job", "round": number, "attempt": 0, "seed": SEED, "architecture": "a" * 64,
                "selection": f"{width:064x}", "widths": (width,), "classes": CLASSES, "ranking": "c" * 64,
                "weights": put(tensorfile.encode(pack_active(mask, weights))),
                "training": put((self.graphs / f"{graph}.onnx").read_bytes()),
                "inference": put((self.graphs / f"{inference}.onnx").read_bytes()),
                "recipe": recipe.to_offer(),
                "mask": put(tensorfile.encode(mask_to_bits(mask))) if mask else None,
            }  # fmt: skip
        return Offer(**{**values, **changes})

    def carry_out(self, offer: Offer) -> tuple[UpdateAnnouncement, Tensors, Tensors]:
        """The update, its tensors, and the tensors that serve afterwards."""
        with DeviceStore(self.root) as store:
            bench = RoundRunner(DEVICE, store.blobs, store.slots, self.data, states=store.local_states)
            update = bench.commit(bench.carry_out(offer))
            sent = tensorfile.decode(store.blobs.read(update.weights.sha256))
            serves = tensorfile.load_tensors(self.root / "serving" / store.slots.current().slot / "weights.safetensors")
        return update, sent, serves

    def newest_state(self) -> LocalState:
        """Of what the board keeps of its own, the record of its last round."""
        records = FolderStateStore(self.root / "own").read().values()
        return max(map(LocalState.from_bytes, records), key=lambda state: state.round)
