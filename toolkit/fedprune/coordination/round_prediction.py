"""Predicts the time, memory and bytes that a round of a job would cost a device."""

from __future__ import annotations

from collections.abc import Collection

from fedprune.jobs.job import Job
from fedprune.jobs.state import JobDevice
from fedprune.model.architecture import Architecture
from fedprune.planning.correction import NO_CORRECTION, Correction
from fedprune.planning.cost_prediction import predict_costs
from fedprune.planning.prediction import Prediction
from fedprune.planning.probe_report import ProbeReport
from fedprune.planning.profile import HardwareProfile
from fedprune.strategies import Strategy


def predict_round(
    job: Job,
    strategy: Strategy,
    architecture: Architecture,
    name: str,
    device: JobDevice,
    widths: tuple[int, ...],
    density: float,
    samples: int,
    *,
    accumulate: int = 1,
    correction: Correction = NO_CORRECTION,
    frozen: Collection[str] = (),
) -> Prediction:
    """The costs of a round at some widths, which are `density` of the model, by a device's profile and measurements.

    `accumulate` is the number of parts in which the device works through a batch, unless the recipe asks for more;
    `frozen` are the tensors that the model's author froze. Raises `FedpruneError` if profile or probe can't be read, or
    the strategy has no recipe for the device.
    """
    profile = HardwareProfile.from_dict(device.profile)
    return predict_costs(
        architecture,
        widths,
        profile,
        strategy.planned_recipe(job, name, widths, density, samples).with_micro_batches(accumulate),
        samples,
        probe=None if device.probe is None else ProbeReport.from_dict(device.probe),
        correction=correction,
        frozen=frozen,
        codecs=strategy.codecs(job, profile.name, device.codecs),
    )
