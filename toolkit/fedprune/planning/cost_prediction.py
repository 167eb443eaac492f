"""Predicts the cost of a submodel's round on a board: memory, time, bytes, energy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from fedprune.core.metrics import TEST_SHARE
from fedprune.model import step_contract
from fedprune.model.architecture import Architecture
from fedprune.model.losses import LOSSES
from fedprune.model.nested_widths import TensorAxes
from fedprune.model.recipe import Recipe
from fedprune.model.trainable import frozen_tensors, matching_tensors, trained_tensors
from fedprune.planning.correction import NO_CORRECTION, Correction
from fedprune.planning.costs import (
    AUGMENT_COPIES,
    FLOAT,
    NOISE_COPIES,
    Costs,
    MemoryBreakdown,
    costs_at,
    file_bytes,
    memory_seconds,
)
from fedprune.planning.kernel_workload import workload
from fedprune.planning.latency_model import LatencyTable, typical_gpu_table, typical_table
from fedprune.planning.prediction import Prediction
from fedprune.planning.probe_report import CPU, CUDA, ProbeReport
from fedprune.planning.profile import HardwareProfile
from fedprune.updates import HALF_CODEC, NO_CODECS, Codec, Codecs, max_update_bytes

# How far predicted memory may be below the measured one (docs/planner.md).
MEMORY_UNDERESTIMATE = 0.05


def predict_costs(
    architecture: Architecture,
    widths: Sequence[int],
    profile: HardwareProfile,
    recipe: Recipe,
    samples: int,
    *,
    probe: ProbeReport | None = None,
    correction: Correction = NO_CORRECTION,
    frozen: Collection[str] = (),
    codecs: Codecs = NO_CODECS,
    active_share: float = 1.0,
) -> Prediction:
    """Predict the cost of a round at these widths on a board.

    Args:
        probe: What the board measured of itself; it takes precedence over the profile.
        correction: What its rounds taught.
        frozen: Tensors that the model's author froze.
        codecs: Those of the board's updates, and of the weights that it is sent; None for plain files.
        active_share: Share of the layers' weights that a mask of elements keeps, of which alone files have values.
    """
    costs = costs_at(architecture, widths)
    steps = recipe.steps(samples)
    table, bandwidth = latency_table(profile, probe), memory_bandwidth(profile, probe)
    features = recipe.features
    has_frozen = features.frozen or features.trainable or frozen
    frozen_names = frozen_tensors(architecture, features, frozen) if has_frozen else frozenset[str]()
    step_s = correction.step * _step_seconds(architecture, widths, recipe, samples, table, bandwidth)
    step_s *= _backward_share(architecture, widths, frozen_names) if has_frozen else 1.0
    latency_s = correction.latency * float(table.latency_seconds(architecture, widths)[0])
    tested = round(samples * TEST_SHARE / (1 - TEST_SHARE))
    batch_s = float(table.latency_seconds(architecture, widths, recipe.batch_size)[0])
    evaluate_s = (2 + (recipe.average > 0)) * correction.latency * batch_s * tested / recipe.batch_size
    link, power = profile.link, profile.power
    kept = frozen_names | matching_tensors(architecture, recipe.personal, ("recipe", "personal"))
    first_bytes, down_bytes, up_bytes = _transfer_bytes(architecture, widths, costs.wire_bytes, recipe, codecs, kept)
    first_bytes, down_bytes = (n + recipe.drift * costs.wire_bytes for n in (first_bytes, down_bytes))
    if active_share < 1:
        masked = sum(
            math.prod(architecture.shape(name, widths)) for name in {r.weight for r in architecture.layers if r.weight}
        )
        sent_share = 1 - (1 - active_share) * masked / costs.parameters
        first_bytes, down_bytes, up_bytes = (math.ceil(n * sent_share) for n in (first_bytes, down_bytes, up_bytes))
    mask_bytes = costs.parameters // 8 if recipe.features.element_mask else 0
    first_bytes, down_bytes = first_bytes + mask_bytes, down_bytes + mask_bytes
    longest_down_bytes = max(first_bytes, down_bytes) + costs.graph_bytes
    transfer_s = longest_down_bytes / link.down_bytes_s + up_bytes / link.up_bytes_s + 2 * link.delay_s
    # Without both figures nothing is said of energy: a guess would limit or exclude boards.
    watts = None
    if power is not None and power.load_w is not None and power.idle_w is not None:
        watts = power.load_w - power.idle_w
    memory = memory_use(architecture, widths, costs, recipe, samples, frozen, probe=probe, correction=correction)
    return Prediction(
        parameters=costs.parameters,
        forward_macs=costs.forward_macs,
        training_macs=costs.training_macs,
        wire_bytes=costs.wire_bytes,
        memory_bytes=memory.total,
        inference_bytes=costs.inference_bytes(1, None if probe is None else probe.process_bytes),
        storage_bytes=costs.storage_bytes(recipe.extra_files),
        step_s=step_s,
        steps=steps,
        train_s=steps * step_s,
        evaluate_s=evaluate_s,
        transfer_s=transfer_s,
        latency_s=latency_s,
        step_j=None if watts is None else watts * step_s,
        train_j=None if watts is None else watts * steps * step_s,
        latency_j=None if watts is None else watts * latency_s,
        memory=memory,
        first_bytes=first_bytes,
        down_bytes=down_bytes,
        up_bytes=up_bytes,
    )


def _step_seconds(
    architecture: Architecture,
    widths: Sequence[int],
    recipe: Recipe,
    samples: int,
    table: LatencyTable,
    bandwidth: float,
) -> float:
    """Mean time of a full training step over the widths at which the recipe trains."""
    # Each part of a batch runs the graph once: its calls and its passes over the weights are paid per part.
    step_s, trained_widths = 0.0, np.array([widths])
    if recipe.ordered_dropout:  # some steps are narrower, all equally often
        axes = TensorAxes(architecture.sizes, {t.name: t.axes for t in architecture.tensors})
        trained_widths = np.array(axes.step_widths(widths, recipe.ordered_dropout))
    for size, count in Counter(recipe.micro_batch_sizes(samples)).items():
        times = np.maximum(
            table.step_seconds(architecture, trained_widths, size),
            memory_seconds(architecture, trained_widths, size, bandwidth),
        )
        step_s += count * float(times.mean())
    return step_s


def _backward_share(architecture: Architecture, widths: Sequence[int], frozen: Collection[str]) -> float:
    """The work of a step with frozen tensors over that of one that trains all. A layer's forward pass, its weight's
    gradient and its input's cost the same; none needs an input's gradient up to the first layer that is trained."""
    trained, done, whole = False, 0.0, 0.0
    macs = workload(architecture).macs(widths)[0]
    for number, (layer, count) in enumerate(zip(architecture.layers, macs, strict=True)):
        is_trained = bool(layer.weight) and layer.weight not in frozen
        done += count * (1 + is_trained + trained)
        whole += count * (1 + bool(layer.weight) + (number > 0))
        trained |= is_trained
    return done / whole if whole else 1.0


def _transfer_bytes(
    architecture: Architecture,
    widths: Sequence[int],
    plain_bytes: int,
    recipe: Recipe,
    codecs: Codecs,
    kept: Collection[str],
) -> tuple[int, int, int]:
    """The most bytes of whole weights, of weights that are coded as a difference, and of an update without the `kept`
    tensors, frozen and personal ones; `plain_bytes` is the size of the weights' own file."""
    up_codec, down_codec = (None if text is None else Codec.parse(text) for text in codecs)
    whole_codec = None if down_codec is None else HALF_CODEC
    if up_codec is None and down_codec is None and not recipe.report_squares and not kept:
        return plain_bytes, plain_bytes, plain_bytes
    trained, weights = {t.name for t in architecture.trainable}, architecture.shapes(widths)
    first_bytes, down_bytes = (
        plain_bytes if c is None else max_update_bytes(c, weights, trained) for c in (whole_codec, down_codec)
    )
    update_shapes = {n: s for n, s in weights.items() if n not in kept}
    if recipe.report_squares:
        update_shapes |= {step_contract.squares_name(n): s for n, s in update_shapes.items() if n in trained}
    update_bytes = file_bytes(update_shapes) if up_codec is None else max_update_bytes(up_codec, update_shapes, trained)
    return first_bytes, down_bytes, update_bytes


def memory_use(
    architecture: Architecture,
    widths: Sequence[int],
    costs: Costs,
    recipe: Recipe,
    samples: int,
    frozen: Collection[str] = (),
    *,
    probe: ProbeReport | None = None,
    correction: Correction = NO_CORRECTION,
) -> MemoryBreakdown:
    """Peak memory of a training process; arguments are those of `predict_costs`, and the costs at these widths."""
    trained, features = 1.0, recipe.features
    if features.frozen or features.trainable or frozen:
        moved_tensors = trained_tensors(architecture, features, frozen)
        moved = sum(math.prod(architecture.shape(t.name, widths)) for t in moved_tensors)
        trained = moved / max(1, costs.parameters)
    batch, process = recipe.micro_batch_sizes(samples)[0], None if probe is None else probe.process_bytes
    memory = costs.training_memory(batch, recipe.features, samples, trained, recipe.extra_copies, process)
    # Where labels are numbers, they are held as they were read, and as float32; one class per sample hardly counts.
    size = math.prod(recipe.features.target_shape(architecture.output_shape))
    labels = 0 if size == 1 and recipe.features.counts_hits else 2 * FLOAT * samples * size
    outputs = 0 if len(architecture.output_shape) == 1 else batch * math.prod(architecture.output_shape)
    losses = int(FLOAT * outputs * LOSSES[recipe.loss].copies)
    copies = AUGMENT_COPIES + NOISE_COPIES * any(a.startswith("noise") for a in recipe.augment) if recipe.augment else 0
    augmented = int(FLOAT * batch * math.prod(architecture.input_shape) * copies)
    memory = replace(memory, samples=memory.samples + labels, activations=memory.activations + losses + augmented)
    return replace(memory, learnt=correction.memory_beyond(memory))


def training_unit(profile: HardwareProfile, probe: ProbeReport | None) -> str:
    """The unit that trains: the one that the board measured (its processor where its GPU doesn't work), else the one
    that the profile promises."""
    if probe is not None:
        return probe.unit
    return CPU if profile.training_gpu is None else CUDA


def latency_table(profile: HardwareProfile, probe: ProbeReport | None) -> LatencyTable:
    """Times of kernels on the unit that trains: measured, else typical of its rate."""
    if probe is not None and probe.latency is not None:
        return probe.latency
    if training_unit(profile, probe) != CUDA:
        return typical_table(train_rate(profile, probe))
    gpu = profile.training_gpu
    if gpu is None or gpu.peak_flops is None:  # a GPU that the board measured and its profile doesn't know
        return typical_gpu_table()
    return typical_gpu_table(gpu.peak_flops, memory_bandwidth(profile, probe))


def memory_bandwidth(profile: HardwareProfile, probe: ProbeReport | None) -> float:
    """Bytes per second of the memory of the unit that trains, which bound a step; infinite if measured layer times
    include it already."""
    if probe is not None and probe.latency is not None:
        return math.inf
    gpu = profile.training_gpu if training_unit(profile, probe) == CUDA else None
    return (gpu and gpu.bandwidth_bytes_s) or profile.memory.bandwidth_bytes_s


def train_rate(profile: HardwareProfile, probe: ProbeReport | None) -> float:
    """FLOP/s of training on the processor: measured, else promised, corrected by the cores and clock of the board."""
    if probe is None:
        return profile.train_rate
    if probe.train_rate is not None and probe.unit == CPU:
        return probe.train_rate
    clock = probe.clock_hz if probe.clock_hz is not None else profile.cpu.clock_hz
    return profile.train_rate * (probe.cores * clock) / (profile.cpu.cores * profile.cpu.clock_hz)


def training_memory(profile: HardwareProfile, probe: ProbeReport | None) -> int:
    """Bytes that training may take: of the memory that is really there, and no more than was free."""
    if probe is None:
        return profile.training_memory_bytes
    # What was free at the probe is a limit, too: applications of the user's run beside the board's training.
    free = min(probe.memory_total - profile.memory.reserve_bytes, probe.memory_available)
    return round(max(0, free) * profile.memory.training_share)
