"""Predicted cost of a submodel's round on a board: memory, time, bytes, energy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedprune.model import step_contract
from fedprune.model.architecture import Architecture
from fedprune.model.losses import LOSSES
from fedprune.model.nested_widths import TensorAxes
from fedprune.model.recipe import Recipe
from fedprune.model.trainable import trained_tensors
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
from fedprune.planning.latency_model import LatencyTable, typical_gpu_table, typical_table
from fedprune.planning.probe_report import CPU, CUDA, ProbeReport
from fedprune.planning.profile import HardwareProfile
from fedprune.updates import HALF_CODEC, NO_CODECS, Codec, Codecs, max_update_bytes

# How far a measured time may correct a predicted one: beyond that something else is wrong.
TIME_CORRECTION_BOUNDS = 0.2, 5.0

# Limits of the correction of memory, which a faulty measurement must not turn into a plan that ends the process.
# The first: the smallest corrected prediction, as a share of the uncorrected one.
# The second: the largest measurement that counts, as a multiple of the prediction or of the board's memory, whichever
# is more.
MEMORY_CORRECTION_BOUNDS = 0.75, 2.0

# How far a measured time may be from the predicted one before a device is planned for again: plans that follow every
# measurement would change widths in every few rounds.
MAX_TIME_ERROR = 1.25

# The same for memory, where too much ends the process.
MAX_MEMORY_ERROR = 1.1

# How far predicted memory may be below the measured one (docs/planner.md).
MEMORY_UNDERESTIMATE = 0.05


@dataclass(frozen=True)
class Prediction:
    """Predicted cost of a submodel's round on a board.

    Attributes:
        forward_macs: MACs of one sample's forward pass; `training_macs` those of its training step.
        wire_bytes: Size of its weights file.
        first_bytes: The most bytes of the weights that the board is sent when it has none to which they could be coded
            as a difference.
        down_bytes: The same in every other round.
        up_bytes: The most bytes of its update.
        memory_bytes: Peak memory of the training process, local data included; `memory` is the same by what takes it.
        inference_bytes: Peak memory of a process that predicts one sample at a time.
        storage_bytes: What the board's disk must hold.
        step_s: Mean time of a full training step over the widths at which the recipe trains.
        train_s: Time of all steps of a round.
        transfer_s: Time on the link, down and up.
        latency_s: Time of the prediction of one sample.
        step_j: Energy of a step beyond what the idle board takes, in joules; None where the profile doesn't say.
        train_j: The same for all steps of a round.
        latency_j: The same for the prediction of one sample.
    """

    parameters: int
    forward_macs: int
    training_macs: int
    wire_bytes: int
    memory_bytes: int
    memory: MemoryBreakdown
    inference_bytes: int
    storage_bytes: int
    step_s: float
    steps: int
    train_s: float
    transfer_s: float
    latency_s: float
    step_j: float | None = None
    train_j: float | None = None
    latency_j: float | None = None
    first_bytes: int = 0
    down_bytes: int = 0
    up_bytes: int = 0

    @property
    def round_s(self) -> float:
        return self.train_s + self.transfer_s

    @property
    def round_bytes(self) -> int:
        """The most bytes of a round, down plus up; graphs, which are sent once, are not counted."""
        return max(self.first_bytes, self.down_bytes) + self.up_bytes


@dataclass(frozen=True)
class Correction:
    """Corrections of a board's predictions, learnt from its own rounds.

    Attributes:
        step: Measured over predicted time of a training step.
        latency: Measured over predicted time of a prediction.
        memory: Measured minus uncorrected predicted peak memory, in bytes, of the latest round that stayed within the
            board's memory.
        memory_at: Predicted graph, weights and activations of that round; 0 before the first.
        overrun: The same difference for the round with the smallest prediction that took more than the board's memory.
        overrun_at: Predicted graph, weights and activations of that round; 0 before the first.
    """

    step: float = 1.0
    latency: float = 1.0
    memory: float = 0.0
    memory_at: float = 0.0
    overrun: float = 0.0
    overrun_at: float = 0.0

    def corrected_by(
        self, prediction: Prediction, applied: Correction, measured: Mapping[str, float], room: float = math.inf
    ) -> Correction:
        """The correction after another round.

        Args:
            applied: The correction in that round's prediction.
            measured: `step_seconds`, `latency_seconds` and `peak_memory_bytes`, as far as the board measured them.
            room: Bytes that training may take.
        """
        low, high = TIME_CORRECTION_BOUNDS
        correction = self
        for name, predicted in (("step", prediction.step_s), ("latency", prediction.latency_s)):
            seconds = measured.get(f"{name}_seconds", 0.0)
            if seconds > 0 and predicted > 0:
                factor = min(high, max(low, getattr(applied, name) * seconds / predicted))
                correction = replace(correction, **{name: factor})
        peak = measured.get("peak_memory_bytes", 0.0)
        return correction._corrected_by_peak(prediction.memory, peak, room) if peak > 0 else correction

    def _corrected_by_peak(self, memory: MemoryBreakdown, peak: float, room: float) -> Correction:
        low, high = MEMORY_CORRECTION_BOUNDS
        bound = high * (max(memory.uncorrected, room) if math.isfinite(room) else memory.uncorrected)
        excess, memory_at = min(bound, max(low * memory.uncorrected, peak)) - memory.uncorrected, float(memory.of_width)
        if peak <= room:
            within_room = replace(self, memory=excess, memory_at=memory_at)
            return within_room if memory_at < self.overrun_at else replace(within_room, overrun=0.0, overrun_at=0.0)
        # A larger plan than the smallest that is known to overrun tells nothing new.
        if 0 < self.overrun_at < memory_at:
            return self
        with_overrun = replace(self, overrun=excess, overrun_at=memory_at)
        return (
            with_overrun
            if 0 < self.memory_at < memory_at
            else replace(with_overrun, memory=excess, memory_at=memory_at)
        )

    def without_times(self) -> Correction:
        """The same without the times."""
        return replace(self, step=1.0, latency=1.0)

    def memory_beyond(self, memory: MemoryBreakdown) -> int:
        """Bytes that a round is expected to take beyond an uncorrected prediction.

        After rounds of one width this is a constant. Once one plan has taken more than the board's memory and a smaller
        one has not, it is interpolated linearly between the two, so that every plan at least as large as the first is
        predicted to take too much.
        """
        excess = self.memory
        if 0 < self.memory_at < self.overrun_at:
            slope = (self.overrun - self.memory) / (self.overrun_at - self.memory_at)
            # Bytes that depend on the width are all that differs between plans of one board.
            excess += slope * (memory.of_width - self.memory_at)
        return math.ceil(max(excess, (MEMORY_CORRECTION_BOUNDS[0] - 1) * memory.uncorrected))

    def differs_from(self, earlier: Correction, prediction: Prediction) -> bool:
        """Whether predictions differ so much from those with an earlier correction that a plan made with it is out of
        date."""
        time_ratios = (self.step / earlier.step, self.latency / earlier.latency)
        memory = prediction.memory
        memory_ratio = (memory.uncorrected + self.memory_beyond(memory)) / memory.total
        return (
            not all(1 / MAX_TIME_ERROR < t < MAX_TIME_ERROR for t in time_ratios)
            or not 1 / MAX_MEMORY_ERROR < memory_ratio < MAX_MEMORY_ERROR
        )


# Nothing was measured yet.
NO_CORRECTION = Correction()


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
) -> Prediction:
    """Predict the cost of a round at these widths on a board.

    Args:
        probe: What the board measured of itself; it takes precedence over the profile.
        correction: What its rounds taught.
        frozen: Tensors that the model's author froze.
        codecs: Those of the board's updates, and of the weights that it is sent; None for plain files.
    """
    costs: Costs = costs_at(architecture, widths)
    steps = recipe.steps(samples)
    table = latency_table(profile, probe)
    # Each part of a batch runs the graph once: its calls and its passes over the weights are paid per part.
    trained_widths = np.array(_trained_widths(architecture, widths, recipe))
    step_s = 0.0
    for size, count in Counter(recipe.micro_batch_sizes(samples)).items():
        times = np.maximum(
            table.step_seconds(architecture, trained_widths, size),
            memory_seconds(architecture, trained_widths, size, memory_bandwidth(profile, probe)),
        )
        step_s += count * float(times.mean())
    latency_s = float(table.latency_seconds(architecture, widths)[0])
    step_s, latency_s = step_s * correction.step, latency_s * correction.latency
    link, power = profile.link, profile.power
    first_bytes, down_bytes, up_bytes = _transfer_bytes(architecture, widths, costs.wire_bytes, recipe, codecs)
    # Two transfers, each announced and acknowledged: a round trip before, one after.
    transfer_s = down_bytes / link.down_bytes_s + up_bytes / link.up_bytes_s + 4 * link.latency_s
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


def _transfer_bytes(
    architecture: Architecture, widths: Sequence[int], plain_bytes: int, recipe: Recipe, codecs: Codecs
) -> tuple[int, int, int]:
    """The most bytes of whole weights, of weights that are coded as a difference, and of an update; `plain_bytes` is
    the size of the weights' own file."""
    up_codec, down_codec = (None if text is None else Codec.parse(text) for text in codecs)
    whole_codec = None if down_codec is None else HALF_CODEC
    if up_codec is down_codec is whole_codec is None and not recipe.report_squares:
        return plain_bytes, plain_bytes, plain_bytes
    trained, weights = {t.name for t in architecture.trainable}, architecture.shapes(widths)
    sizes = {
        c: plain_bytes if c is None else max_update_bytes(c, weights, trained)
        for c in {whole_codec, down_codec, up_codec}
    }
    update_bytes = sizes[up_codec]
    if recipe.report_squares:
        update_shapes = weights | {step_contract.squares_name(n): s for n, s in weights.items() if n in trained}
        update_bytes = (
            file_bytes(update_shapes) if up_codec is None else max_update_bytes(up_codec, update_shapes, trained)
        )
    return sizes[whole_codec], sizes[down_codec], update_bytes


def _trained_widths(architecture: Architecture, widths: Sequence[int], recipe: Recipe) -> list[tuple[int, ...]]:
    """The widths at which steps train, all equally often. With ordered dropout some are narrower."""
    if not recipe.ordered_dropout:
        return [tuple(widths)]
    axes = TensorAxes(architecture.sizes, {t.name: t.axes for t in architecture.tensors})
    return axes.step_widths(widths, recipe.ordered_dropout)


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
    trained = _trained_share(architecture, widths, recipe, costs.parameters, frozen)
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


def _trained_share(
    architecture: Architecture, widths: Sequence[int], recipe: Recipe, parameters: int, frozen: Collection[str]
) -> float:
    """Share of the parameters that a recipe trains."""
    features = recipe.features
    if not (features.frozen or features.trainable or frozen):
        return 1.0
    moved_tensors = trained_tensors(architecture, features, frozen)
    return sum(math.prod(architecture.shape(t.name, widths)) for t in moved_tensors) / max(1, parameters)


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
