"""Costs of a submodel: MACs, parameters, bytes on the wire, memory, time.

`docs/planner.md` gives every formula, where its constants come from and how far they were off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
import numpy.typing as npt

from fedprune.core import tensorfile
from fedprune.model import step_contract as step
from fedprune.model.architecture import Architecture, LayerRow
from fedprune.model.features import Features
from fedprune.model.selection import ElementMask, check_mask
from fedprune.planning.kernel_workload import ArchitectureKey, workload

Numbers = npt.NDArray[np.float64]

# Bytes of a float32.
FLOAT = 4

# A board's process before it trains: Python, numpy, onnxruntime 1.31 with a loaded graph, the MQTT client and the
# agent. A board that measures it reports its own: 1.23 takes 8 MB less, 1.32 2 MB more.
PROCESS_BYTES = 85_000_000

# Bytes that a round adds to that for any model: threads, buffers, and what allocators round up.
ROUND_BYTES = 10_900_000

# Bytes of a loaded graph per activation of the model, which is some thirty nodes of a training graph.
VALUE_BYTES = 131_000

# Samples up to this size are held in memory; larger arrays stay on the disk and are read as batches are drawn.
MAX_SAMPLES_IN_MEMORY = 4 * 2**20

# Arrays of the size of all weights that exist at the peak of a step: weights as received, weights and momentum before
# and after the step, and what remains of gradients and temporaries of the update.
WEIGHT_COPIES = 5.82

# Arrays of the size of weights that aren't trained: as received, and as the step reads them.
FROZEN_COPIES = 2

# Arrays of the size of the largest frozen weight while a layer reads it: transposed as stored, and dequantised.
DEQUANTISED_COPIES = 1.5

# Memory over size of the activations that the backward pass needs: it frees them from the last to the first, while its
# gradients come. That of the other ones is free again before it begins, but the allocator leaves gaps.
KEPT_COPIES, PASSING_COPIES = 0.8, 0.4

# The same where a base is frozen, over size of those that the backward pass needs. Next to a frozen layer's output are
# an adapter's and their sum, of which only the sum stays, and no nodes make a weight's gradient.
FROZEN_KEPT_COPIES = 1.5

# Memory over size of the lines that depthwise and grouped convolutions read (`unrolled_elements`).
UNROLLED_COPIES = 1.0

# Arrays of the size of the largest activation that exist in addition: the gradients that go in and out of a layer, and
# what a pooling compares to find its maxima.
TRANSIENT_COPIES = 2.5

# Arrays of the size of the samples of a step (or of a part of it) that augmentation needs, and how many more with
# noise. Measured with batches of 64 colour images of 224 × 224.
AUGMENT_COPIES, NOISE_COPIES = 3.0, 2.0

# Memory of activations in steps of several parts, over that in steps of one: sums and statistics of a part come and
# go in the allocator's memory, and leave more gaps.
SPLIT_GAPS = 1.12

# Area of a map that is one line, longest line that stays whole, and blocks of longer ones, as in training graphs.
_MAX_ONE_LINE_AREA, _MAX_WHOLE_LINE, _LINE_BLOCK = 16, 64, 16

# How often a training step moves its activations through main memory where caches don't help.
ACTIVATION_PASSES = 12

# How often it moves its weights.
WEIGHT_PASSES = 6

# Bytes that a process which only predicts saves: the MQTT client and the agent.
AGENT_PROCESS_BYTES = 17_200_000

# Arrays of the size of the weights while a model is loaded: of most weights, and of those of convolutions and
# recurrent layers (`_LAID_OUT`), which onnxruntime lays out again while the former arrays still exist.
INFERENCE_COPIES, INFERENCE_KERNEL_COPIES = 1.26, 3.37

_LAID_OUT = ("Conv", "GRU", "LSTM", "RNN")

# Largest activations that live at once in a forward pass: a layer's input, its output, a branch that waits.
INFERENCE_VALUES = 3

# Weights files that a board holds at its worst moment: as received, as trained, and those of its two model slots.
WEIGHT_FILES = 4

# Inference graphs that a board holds at that moment: the offer's, and those of its two slots, which may be of earlier
# rounds.
INFERENCE_FILES = 3

TRAINING_GRAPH_BYTES = 4_000
# Bytes of graphs on the disk per activation of the model, rounded up from those of the tests' nets.
INFERENCE_GRAPH_BYTES = 500


@dataclass(frozen=True)
class MemoryBreakdown:
    """Peak memory of a board's process by what takes it, in bytes.

    Attributes:
        process: Python, numpy, onnxruntime, the MQTT client and the board's agent.
        graph: The loaded training graph.
        weights: Weights, gradients and the optimiser's state.
        activations: What the forward pass keeps for the backward pass, and temporaries.
        samples: Local samples that are held in memory.
        learnt: What the board's own rounds took beyond the sum of these, or less if negative.
    """

    process: int
    graph: int
    weights: int
    activations: int
    samples: int
    learnt: int = 0

    @property
    def total(self) -> int:
        return self.uncorrected + self.learnt

    @property
    def uncorrected(self) -> int:
        """All of it except what the board's rounds taught."""
        return self.process + self.samples + self.of_width

    @property
    def of_width(self) -> int:
        """The bytes that depend on the width and on the parts of a batch."""
        return self.graph + self.weights + self.activations


@dataclass(frozen=True)
class Costs:
    """Costs of one submodel; per sample where nothing else is said.

    Attributes:
        parameters: Numbers in all tensors, statistics included.
        wire_bytes: Exact size of the canonical weights file.
        kept_bytes: Activations that the backward pass needs.
        unrolled_bytes: Lines that depthwise and grouped convolutions read, written out (`unrolled_elements`).
        inference_activation_bytes: Activations that live at once in a forward pass.
        kernel_bytes: Weights of convolutions and recurrent layers.
        values: How many activations the model has; `kept_values` how many of them the backward pass needs.
        base_bytes: The frozen base as it is stored; it is sent once, and not counted in `wire_bytes`.
        dequantised_bytes: Its largest array as float32, which a layer reads.
    """

    parameters: int
    forward_macs: int
    training_macs: int
    wire_bytes: int
    activation_bytes: int
    kept_bytes: int
    largest_bytes: int
    unrolled_bytes: int
    inference_activation_bytes: int
    sample_bytes: int
    kernel_bytes: int
    values: int
    base_bytes: int = 0
    dequantised_bytes: int = 0
    kept_values: int = 0

    @property
    def parameter_bytes(self) -> int:
        return FLOAT * self.parameters

    @property
    def graph_bytes(self) -> int:
        """Bytes of what a board is sent beside weights in its first round: its two graphs and the frozen base."""
        return (TRAINING_GRAPH_BYTES + INFERENCE_GRAPH_BYTES) * self.values + self.base_bytes

    def training_memory(
        self,
        batch: int,
        features: Features,
        samples: int,
        trained: float = 1.0,
        own_copies: int = 0,
        process: int | None = None,
    ) -> MemoryBreakdown:
        """Peak memory of a board's process that trains, by what takes it.

        Args:
            batch: Samples that are worked on at once.
            samples: Local samples; of many only `MAX_SAMPLES_IN_MEMORY` are held in memory.
            trained: Share of the parameters that are trained; the others are only held.
            own_copies: Further copies of all weights that it holds (`Recipe.extra_copies`).
            process: Bytes that the process takes before it trains, as the board measured it; None for a typical
                process.
        """
        extra_copies = 2 * (features.proximal + features.element_mask + features.threshold)
        # Each is there twice: what goes into a step, and what comes out of it.
        extra_copies += 2 * (len(step.state_names(features.optimizer)) - 1)
        extra_copies += features.gradients + features.accumulate + features.drift
        copies = own_copies + FROZEN_COPIES + trained * (WEIGHT_COPIES - FROZEN_COPIES + extra_copies)
        frozen = self.base_bytes > 0
        passing = PASSING_COPIES * (self.activation_bytes - self.kept_bytes)
        sample = FROZEN_KEPT_COPIES * self.kept_bytes if frozen else KEPT_COPIES * self.kept_bytes + passing
        sample += UNROLLED_COPIES * self.unrolled_bytes + TRANSIENT_COPIES * self.largest_bytes
        base = self.base_bytes + int(DEQUANTISED_COPIES * self.dequantised_bytes)
        return MemoryBreakdown(
            process=(PROCESS_BYTES if process is None else process) + ROUND_BYTES,
            graph=VALUE_BYTES * (self.kept_values if frozen else self.values),
            weights=int(copies * self.parameter_bytes) + base,
            activations=int(batch * (SPLIT_GAPS if features.accumulate else 1.0) * sample),
            samples=min(samples * self.sample_bytes, MAX_SAMPLES_IN_MEMORY),
        )

    def inference_bytes(self, batch: int, process: int | None = None) -> int:
        """Peak memory of a process that predicts `batch` samples at a time; `process` is as for `training_memory`."""
        fixed = max(0, (PROCESS_BYTES if process is None else process) - AGENT_PROCESS_BYTES)
        weights = INFERENCE_COPIES * (self.parameter_bytes - self.kernel_bytes)
        weights += INFERENCE_KERNEL_COPIES * self.kernel_bytes
        weights += self.base_bytes + DEQUANTISED_COPIES * self.dequantised_bytes
        return int(fixed + weights + batch * (self.inference_activation_bytes + self.sample_bytes))

    def storage_bytes(self, own_files: int = 0) -> int:
        """Bytes on a board's disk for rounds of this submodel, with further files that the recipe makes the board keep
        (`Recipe.extra_files`)."""
        graphs = TRAINING_GRAPH_BYTES * self.values, INFERENCE_GRAPH_BYTES * self.values
        return storage_bytes(self.wire_bytes, *graphs, own_files) + self.base_bytes


def file_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Exact size of a plain file of float32 tensors."""
    head = tensorfile.header_for_specs((name, "F32", shape) for name, shape in shapes.items())
    return len(head) + FLOAT * sum(map(prod, shapes.values()))


def storage_bytes(weights: int, training: int, inference: int, own_files: int = 0) -> int:
    """Most bytes that a board's state directory takes for a submodel, from the sizes of its three files. Rounds leave
    and overwrite files of the size of the weights; `own_files` is the number of further ones (`Recipe.extra_files`)."""
    return (WEIGHT_FILES + own_files) * weights + training + INFERENCE_FILES * inference


def costs_at(architecture: Architecture, widths: Sequence[int]) -> Costs:
    """Costs of the submodel of these widths. Raises `BundleError` if the widths don't fit the architecture."""
    return _costs_at(ArchitectureKey(architecture), architecture.check_widths(widths))


@lru_cache(maxsize=512)
def _costs_at(key: ArchitectureKey, widths: tuple[int, ...]) -> Costs:
    architecture = key.architecture
    shapes = architecture.shapes(widths)
    macs = [layer_macs(architecture, layer, widths, shapes) for layer in architecture.layers]
    forward = sum(macs)
    sizes = architecture.sizes
    values = [FLOAT * v.positions * v.channels.size(widths, sizes) for v in architecture.activations]
    kept_bytes = [b for v, b in zip(architecture.activations, values, strict=True) if v.is_kept]
    parameters = sum(prod(shape) for shape in shapes.values())
    kernels = {r.weight for r in architecture.layers if r.op in _LAID_OUT and r.weight}
    return Costs(
        parameters=parameters,
        forward_macs=forward,
        # Forward, weight gradient and input gradient cost the same; the gradient of the model's input isn't needed.
        training_macs=3 * forward - next(filter(None, macs), 0),
        wire_bytes=file_bytes(shapes),
        activation_bytes=sum(values),
        kept_bytes=sum(kept_bytes),
        largest_bytes=max(values, default=0),
        unrolled_bytes=sum(
            _unrolled_bytes(r, widths, architecture, shapes[r.weight][2:] if r.weight else ())
            for r in architecture.layers
        ),
        inference_activation_bytes=sum(sorted(values)[-INFERENCE_VALUES:]),
        sample_bytes=FLOAT * prod(architecture.input_shape),
        kernel_bytes=FLOAT * sum(prod(shapes[w]) for w in kernels),
        values=len(values),
        base_bytes=architecture.base_bytes,
        dequantised_bytes=FLOAT * max((prod(b.shape) for b in architecture.base), default=0),
        kept_values=len(kept_bytes),
    )


def active_macs_share(architecture: Architecture, widths: Sequence[int], mask: ElementMask) -> float:
    """Share of a training step's MACs whose weight is active: what kernels that skip masked weights would compute. A
    board's kernels skip none. Raises `BundleError` if widths or mask don't fit the architecture."""
    checked = architecture.check_widths(widths)
    shapes = architecture.shapes(checked)
    check_mask(mask, shapes)
    macs, active_macs = (np.zeros(len(architecture.layers)) for _ in range(2))
    for i, layer in enumerate(architecture.layers):
        macs[i] = layer_macs(architecture, layer, checked, shapes)
        bits = mask.get(layer.weight)
        active_macs[i] = macs[i] if bits is None or not bits.size else macs[i] * bits.mean()
    first_layer = int(np.argmax(macs > 0))  # the gradient of the model's input isn't needed
    return float((3 * active_macs.sum() - active_macs[first_layer]) / max(3 * macs.sum() - macs[first_layer], 1))


def memory_seconds(architecture: Architecture, widths: npt.ArrayLike, batch: int, bandwidth: float) -> Numbers:
    """Least times [n] of training steps at widths [n, groups] or [groups] on a board whose main memory is slow.
    `bandwidth` is in bytes per second, read plus write, and may be infinite."""
    elements, parameters = workload(architecture).element_counts(widths)
    moved_bytes: Numbers = FLOAT * (ACTIVATION_PASSES * batch * elements + WEIGHT_PASSES * parameters)
    return moved_bytes / bandwidth


def layer_macs(
    architecture: Architecture, layer: LayerRow, widths: Sequence[int], shapes: Mapping[str, tuple[int, ...]]
) -> int:
    """MACs of one sample's forward pass in one row of the cost table, where tensors have these shapes."""
    if layer.weight:
        return prod(shapes[layer.weight]) * layer.positions
    # A product of two values: every number that it makes sums over the inner axis.
    inner = layer.inner.size(widths, architecture.sizes)
    return inner * layer.output_volume.size(widths, architecture.sizes) if inner else 0


def unrolled_elements(layer: LayerRow, channels: int, kernel: Sequence[int]) -> int:
    """Elements of the lines that the outputs of a depthwise or grouped convolution read, for one sample.

    A training graph multiplies these lines by matrices (`fedprune_export.autodiff.depthwise_convolution`) and keeps
    them for the gradient of the kernel. Lines up to `_MAX_WHOLE_LINE` are whole; longer ones are cut into blocks, and a
    block of outputs reads all blocks that its window touches. Rows of the cost table have areas, so that maps are
    taken as square. `channels` are those of the input, `kernel` the sizes of the window.
    """
    areas = layer.input_volume.positions, layer.positions, layer.stride
    size, made_size, stride = (round(math.pow(n, 1 / len(kernel))) for n in areas)
    if layer.input_volume.positions <= _MAX_ONE_LINE_AREA or not made_size:
        return channels * layer.input_volume.positions
    lines = channels * prod(kernel[:-1]) * layer.positions // made_size
    if size <= _MAX_WHOLE_LINE:
        return lines * size
    step = max(_LINE_BLOCK // stride, 1)
    blocks = ((step - 1) * stride + kernel[-1] - 1) // (step * stride) + 1
    return lines * blocks * -(-made_size // step) * step * stride


def _unrolled_bytes(layer: LayerRow, widths: Sequence[int], architecture: Architecture, kernel: Sequence[int]) -> int:
    if layer.op != "Conv" or layer.groups == 1 or not layer.input_volume.positions:
        return 0
    channels = layer.input_volume.size(widths, architecture.sizes) // layer.input_volume.positions
    return FLOAT * unrolled_elements(layer, channels, kernel)
