"""What a submodel costs: multiplications, parameters, bytes on the wire, memory, time.

`docs/planner.md` gives every formula, where its constants come from and how far they were off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from fedprune import tensorfile
from fedprune.architecture import Activation, Architecture
from fedprune.recipe import Features

FLOAT = 4
"""Bytes of a float32."""

RUNTIME_BYTES = 60 * 2**20
"""A Python process with numpy and onnxruntime loaded, before any graph."""

WEIGHT_COPIES = 9
"""Arrays of the size of all weights that live at the peak of a step: weights and momentum, as received from the last
step and as made by this one, gradients, and the temporaries of the update."""

TRANSIENTS = 4
"""Arrays of the size of the largest activation that live beside what the backward pass needs: the gradients that go in
and out of a layer and the buffer in which a convolution unrolls its input."""

INFERENCE_VALUES = 3
"""Largest activations that live at once in a forward pass: a layer's input, its output, a branch that waits."""


@dataclass(frozen=True)
class Costs:
    """Costs of one submodel; per sample where nothing else is said.

    Attributes:
        parameters: Numbers in all tensors, statistics included.
        forward_macs: Multiplications of the forward pass.
        training_macs: Multiplications of forward and backward pass.
        wire_bytes: Exact size of the canonical weights file.
        kept_bytes: Activations that the backward pass needs.
        largest_bytes: The largest activation.
        inference_activation_bytes: Activations that live at once in a forward pass.
        traffic_bytes: Bytes of all activations.
        sample_bytes: One sample of local data.
    """

    parameters: int
    forward_macs: int
    training_macs: int
    wire_bytes: int
    kept_bytes: int
    largest_bytes: int
    inference_activation_bytes: int
    traffic_bytes: int
    sample_bytes: int

    @property
    def parameter_bytes(self) -> int:
        """All tensors as float32."""
        return FLOAT * self.parameters

    def training_bytes(self, batch: int, features: Features, samples: int) -> int:
        """Peak memory of a process that trains.

        Args:
            batch: Samples of a step.
            features: Optional inputs of the training graph: anchors, masks and gradients take memory.
            samples: Local samples, which it holds as float32.
        """
        copies = WEIGHT_COPIES + 2 * features.proximal + 2 * features.element_mask + features.gradients
        activations = batch * (self.kept_bytes + TRANSIENTS * self.largest_bytes)
        return RUNTIME_BYTES + copies * self.parameter_bytes + activations + samples * self.sample_bytes

    def inference_bytes(self, batch: int) -> int:
        """Peak memory of a process that predicts `batch` samples at a time."""
        # The weights twice: the file's pages, and the copy that onnxruntime reorders for its kernels.
        return RUNTIME_BYTES + 2 * self.parameter_bytes + batch * (self.inference_activation_bytes + self.sample_bytes)

    def step_seconds(self, batch: int, rate: float, bandwidth: float) -> float:
        """Time of one training step.

        Args:
            batch: Samples of the step.
            rate: FLOP/s that convolutions of a training step reach.
            bandwidth: Bytes per second of main memory, read plus write.
        """
        flops = 2 * batch * self.training_macs
        moved = batch * self.traffic_bytes + WEIGHT_COPIES * self.parameter_bytes
        return flops / rate + moved / bandwidth


def costs_at(architecture: Architecture, widths: Sequence[int]) -> Costs:
    """Costs of the submodel of these widths.

    Raises:
        BundleError: The widths don't fit the architecture.
    """
    checked = architecture.check_widths(widths)
    shapes = architecture.shapes(checked)
    macs = [prod(shapes[layer.weight]) * layer.positions for layer in architecture.layers]
    forward = sum(macs)
    values = [_bytes(v, checked, architecture) for v in architecture.activations]
    kept = sum(b for v, b in zip(architecture.activations, values, strict=True) if v.kept)
    parameters = sum(prod(shape) for shape in shapes.values())
    head = tensorfile.header((name, "F32", shape) for name, shape in shapes.items())
    return Costs(
        parameters=parameters,
        forward_macs=forward,
        # Forward, weight gradient and input gradient cost the same; nobody needs the gradient of the model's input.
        training_macs=3 * forward - (macs[0] if macs else 0),
        wire_bytes=len(head) + FLOAT * parameters,
        kept_bytes=kept,
        largest_bytes=max(values, default=0),
        inference_activation_bytes=sum(sorted(values)[-INFERENCE_VALUES:]),
        traffic_bytes=sum(values),
        sample_bytes=FLOAT * prod(architecture.input_shape),
    )


def _bytes(value: Activation, widths: Sequence[int], architecture: Architecture) -> int:
    return FLOAT * value.positions * value.channels.size(widths, architecture.sizes)
