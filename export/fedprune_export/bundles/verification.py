"""Verifies a bundle: its files, its graphs, a training step. Each check returns a finding or raises an error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fedprune.core import tensorfile
from fedprune.core.errors import BundleError, ModelError, TrainingError, shape_text
from fedprune.core.text import quantity
from fedprune.model import step_contract as step
from fedprune.model.losses import LOSSES
from fedprune.runtime.bundle import BASE, FILES, INFERENCE, TRAINING, WEIGHTS, Bundle, open_bundle
from fedprune.runtime.onnx_subgraph import subgraph_for
from fedprune.runtime.precision import lowered_weights
from fedprune.runtime.precision_files import files_of, graph_file, prepare_file, weights_file
from fedprune.runtime.session import OnnxSession
from fedprune_export.bundles.inference import check_origin, inference_graph
from fedprune_export.checks import parity
from fedprune_export.checks.parity import Array, random_labels, step_feeds
from fedprune_export.ir.graph import Graph
from fedprune_export.ir.rounding import Distance, check_outputs
from fedprune_export.ir.sample_inputs import sample_feeds
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import unreached_notes

# The largest difference of the two graphs' losses, as a share of the loss, or of 1 if it is less. Boards apply such a
# limit before a model serves, whatever rounding does to it.
MAX_LOSS_DIFFERENCE = 1e-3

# A single sample, an odd number, and all: a graph with a frozen batch fails at one of them.
_TRIAL_BATCHES = (1, 3, parity.STEP_SAMPLES)
# Learning rates that are tried in turn: some losses are steep.
_TRIAL_RATES = (parity.TRIAL_LEARNING_RATE, 0.01, 1e-3, 1e-4, 1e-5, 1e-6)


@dataclass(frozen=True)
class PassedCheck:
    """A check that a bundle has passed, and its finding."""

    name: str
    finding: str


def verify_bundle(folder: Path, model: Model | None = None) -> Iterator[PassedCheck]:
    """Check a bundle; yields each check once it is passed. The bundle is compared with the whole `model`, if given.

    Raises:
        BundleError: A file is missing, changed, or doesn't fit the others.
        ModelError: onnxruntime doesn't take a graph, or a graph computes wrong or non-finite values.
        TrainingError: The training step computes wrong or non-finite values.
    """
    bundle = open_bundle(folder)
    files = (*FILES, *(n for p in bundle.precisions for n in files_of(p)), *([BASE] if bundle.base else []))
    size = sum(bundle.path(n).stat().st_size for n in files)
    yield PassedCheck("files", f"{len(files)} files of {size:,} bytes are as they were exported")
    trial = _Trial(bundle)
    yield PassedCheck("weights", trial.check_weights())
    yield PassedCheck("inference", trial.check_inference())
    yield PassedCheck("training", trial.check_step())
    yield PassedCheck("descent", trial.check_descent())
    yield PassedCheck("agreement", trial.check_agreement())
    for precision in bundle.precisions:
        yield PassedCheck(precision, trial.check_precision(precision))
    if model is not None:
        yield PassedCheck("model", check_model(bundle, model))


class _Trial:
    """A bundle under trial, with a batch of random samples."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.outputs = bundle.architecture.output_shape
        self.tensors = tensorfile.load_tensors(bundle.path(WEIGHTS))

    @cached_property
    def graph(self) -> Graph:
        return inference_graph(self.bundle.folder)

    @cached_property
    def training(self) -> OnnxSession:
        return OnnxSession(self.bundle.path(TRAINING), training=True)

    @cached_property
    def x(self) -> Array:
        return sample_feeds(self.graph, parity.STEP_SAMPLES)[step.X]

    @cached_property
    def y(self) -> Array:
        return random_labels(self.bundle.recipe, parity.STEP_SAMPLES, self.outputs[0], self.training.inputs[step.Y])

    def feeds(self, tensors: dict[str, Array] | None = None, rate: float | None = None) -> dict[str, Array]:
        feeds = step_feeds(
            self.training,
            self.bundle.recipe,
            {**(self.tensors if tensors is None else tensors), **self.bundle.frozen_weights()},
            self.x,
            self.y,
            self.outputs[0],
        )
        return feeds if rate is None else {**feeds, step.LR: np.array(rate, np.float32)}

    @cached_property
    def loss(self) -> float:
        return float(self.training.run(self.feeds(), [step.LOSS])[step.LOSS])

    def check_weights(self) -> str:
        """Check that all numbers are finite; names and shapes were checked when the bundle was opened."""
        for name, value in self.tensors.items():
            if not np.isfinite(value).all():
                raise BundleError(f"{WEIGHTS}: tensor {name} has numbers that are not finite")
        return f"{quantity(len(self.tensors), 'tensor')}, {sum(v.size for v in self.tensors.values()):,} finite numbers"

    def check_inference(self) -> str:
        """Check that logits have the right shape at several batch sizes, and that each depends only on its sample."""
        shape = self.bundle.architecture.input_shape
        if tuple(self.graph.inputs[0].shape[1:]) != shape:
            raise BundleError(f"{INFERENCE}: its input", expected=shape, got=self.graph.inputs[0].shape[1:])
        session = OnnxSession(self.bundle.path(INFERENCE))
        all_logits = session.run({step.X: self.x})[step.LOGITS]
        for batch in _TRIAL_BATCHES:
            logits = session.run({step.X: self.x[:batch]})[step.LOGITS]
            if logits.shape != (batch, *self.outputs):
                raise ModelError(f"{INFERENCE}: logits", expected=(batch, *self.outputs), got=logits.shape)
            if not np.isfinite(logits).all():
                raise ModelError(f"{INFERENCE}: logits of {batch} random samples are not finite")
            subject = f"{INFERENCE}: the logits of a sample depend on the others of its batch"
            samples = parity.rerun(parity.run_model, self.graph.to_bytes(), self.x[:batch])
            check_outputs(logits, all_logits[:batch], samples, subject, "Export the bundle again.")
        batches = ", ".join(map(str, _TRIAL_BATCHES))
        return f"logits {shape_text('n', *self.outputs)} of {batches} random samples are finite"

    def check_step(self) -> str:
        """Check that a step gives a finite loss, moves weights, and keeps all shapes."""
        # With the recipe's own rate of 0 nothing would move: try the step with another.
        outputs = self.training.run(self.feeds(rate=None if self.bundle.recipe.lr else parity.TRIAL_LEARNING_RATE))
        moved_count = parity.count_moved_tensors(outputs, self.bundle.architecture, self.tensors)
        frozen_count = sum(step.next_name(n) not in outputs for n in self.tensors)
        rest = f" and leaves {frozen_count} frozen" if frozen_count else ""
        unreached = "".join(f". {note.rstrip('.')}" for note in unreached_notes(self.training.metadata))
        return f"loss {float(outputs[step.LOSS]):.4g}; a step moves {quantity(moved_count, 'tensor')}{rest}{unreached}"

    def check_descent(self) -> str:
        """Check that a small step lowers the loss of its own batch."""
        for rate in _TRIAL_RATES:
            outputs = self.training.run(self.feeds(rate=rate))
            next_tensors = {n: outputs.get(step.next_name(n), v) for n, v in self.tensors.items()}
            next_loss = float(self.training.run(self.feeds(next_tensors), [step.LOSS])[step.LOSS])
            if next_loss < self.loss:
                return f"a step at learning rate {rate:g} lowers the loss to {next_loss:.4g}"
        raise TrainingError(f"{TRAINING}: no step, however small, lowers the loss of its own batch", got=self.loss)

    def check_agreement(self) -> str:
        """Check that both graphs compute the same loss if batch norms use the batch's statistics in both."""
        graph = self.graph.copy()
        for node in graph.nodes:
            if node.op == "BatchNormalization" and step.next_name(node.inputs[3]) in self.training.outputs:
                # Before opset 14 BatchNormalization in training mode had other outputs.
                if graph.opset < 14:
                    return f"not compared: batch norms have no training mode at opset {graph.opset}"
                node.attrs["training_mode"] = 1
                node.outputs += [graph.fresh("mean"), graph.fresh("var")]
        raw = graph.to_bytes()
        distance = check_outputs(
            np.array(self.loss),
            self._inference_loss(raw, self.x),
            parity.rerun(self._inference_loss, raw, self.x),
            "inference and training graph contradict each other: their losses",
            "Export the bundle again.",
            limit=MAX_LOSS_DIFFERENCE,
            least_scale=1.0,
        )
        return f"the inference graph's logits give the same loss to {_distance_text(distance)}"

    def _inference_loss(self, raw: bytes, x: Array) -> Array:
        """The loss of a graph's outputs: computed with numpy, or by the training graph's own loss if that is one."""
        # Not optimised: onnxruntime keeps one copy of equal tensors, such as the zeros of a new bias and mean, and a
        # batch norm in training mode writes the next mean where the last one was.
        logits = OnnxSession(raw, exact=True).run({step.X: x})[step.LOGITS]
        value = LOSSES[self.bundle.recipe.loss].value
        if value is not None:
            # In float64, so that the reference is more exact than the graph.
            return np.array(value(logits.astype(np.float64), self.feeds()))
        training = self.bundle.path(TRAINING).read_bytes()
        objective = OnnxSession(subgraph_for(training, [step.LOSS], given_values=[step.LOGITS]))
        feeds = {n: v for n, v in self.feeds().items() if n in objective.inputs}
        return objective.run({**feeds, step.LOGITS: logits})[step.LOSS]

    def check_precision(self, precision: str) -> str:
        """Check that lower-precision weights are those that the bundle's prepare graph makes of the float32 weights.

        Predictions with them must be finite.
        """
        bundle = self.bundle
        stored = tensorfile.load_tensors(bundle.path(weights_file(precision)))
        prepared = tensorfile.decode(lowered_weights(bundle.folder, precision, self.tensors))
        for name in (*prepared, *stored):
            subject = f"{weights_file(precision)}: tensor {name}"
            made, kept = prepared.get(name), stored.get(name)
            if made is None or kept is None or (made.dtype, made.shape) != (kept.dtype, kept.shape):
                raise BundleError(f"{subject} is not what {prepare_file(precision)} makes")
            # Another processor may round a number to its neighbour.
            tolerance = 1e-6 + (1.0 if made.dtype.kind in "iu" else 0.0)
            if not np.allclose(made.astype(np.float64), kept.astype(np.float64), rtol=1e-3, atol=tolerance):
                raise BundleError(f"{subject} was not made from these weights", hint="Export the bundle again.")
        logits = OnnxSession(bundle.path(graph_file(precision)), exact=True).run({step.X: self.x})[step.LOGITS]
        shape = (len(self.x), *self.outputs)
        if logits.shape != shape or not np.isfinite(logits).all():
            raise ModelError(f"{graph_file(precision)}: logits of random samples are not finite numbers {shape}")
        # How far they are off says nothing: ranges were measured on samples of another kind.
        return f"{len(stored)} tensors are those of the weights; logits of random samples are finite"


def check_model(bundle: Bundle, model: Model) -> str:
    """Check that a bundle's outputs are those of the whole model with the pruned channels masked.

    Raises `BundleError` if architecture or weights are not the model's, `ModelError` if the outputs differ.
    """
    check_origin(bundle, model)
    cut_tensors = bundle.selection.gather(model.tensors)
    stored = tensorfile.load_tensors(bundle.path(WEIGHTS))
    changed = [n for n, v in cut_tensors.items() if not np.array_equal(v, stored[n])]
    if changed:
        raise BundleError(
            "the bundle holds other weights than the model",
            expected=f"{len(cut_tensors)} equal tensors",
            got=f"{len(changed)} others, such as {changed[0]}",
            hint="Give the model that the bundle was exported from; a torch factory may draw other weights each time.",
        )
    names = (INFERENCE, WEIGHTS, *([BASE] if bundle.base else []))
    distance = parity.check_parity(model, bundle.selection, {n: bundle.path(n).read_bytes() for n in names})
    error_text = f"within a relative error of {_distance_text(distance)}"
    return f"equals the whole model with the pruned channels masked, {error_text}"


def _distance_text(distance: Distance) -> str:
    """How far outputs are apart, with what is to be known of it."""
    return ". ".join([f"{distance.value:.1e}", *(note.rstrip(".") for note in distance.notes)])
