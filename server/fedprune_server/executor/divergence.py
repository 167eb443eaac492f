"""Detect that a job's training diverged, and advise what to change."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from fedprune.coordination import events as on
from fedprune.jobs.failure_kind import FailureKind
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.model.trainable import frozen_tensors
from fedprune.output.log_lines import log_context

log = logging.getLogger("fedprune.server")

# The last loss over the first from which training counts as diverged; a smaller rise may be chance.
_MAX_LOSS_RISE = 1.1


def is_uncalibrated(
    architecture: Architecture, recipe: Recipe, calibration: object, frozen: Collection[str] = ()
) -> bool:
    """Whether the global model's batch-norm statistics remain averages of the boards', because there are no samples
    (`calibration`) on which the server measures them again. `frozen` tensors are the model's own."""
    frozen_names = frozen_tensors(architecture, recipe.features, frozen)
    return calibration is None and any(t.name not in frozen_names for t in architecture.statistics)


def diagnose_history(history: Sequence[Mapping[str, Any]], job: Mapping[str, Any], *, uncalibrated: bool) -> str:
    """The diagnosis of a coordinator's history; empty if training has not diverged. `job` are the job's settings as
    JSON, and `uncalibrated` is the result of `is_uncalibrated`."""
    has_narrow = any(device_row.get("density", 1.0) < 1 for row in history for device_row in row["devices"].values())
    measured = [row["metrics"] for row in history if row["metrics"].get("samples")]
    kinds = [str(device_row.get("kind", "")) for row in history[-1:] for device_row in row["devices"].values()]
    return diagnose_losses([m.get("loss") for m in measured], kinds, job, mixed=uncalibrated and has_narrow)


def diagnose_losses(
    losses: Sequence[float | None], kinds: Iterable[str], job: Mapping[str, Any], *, mixed: bool = False
) -> str:
    """The diagnosis of the losses of the global model after every round that measured it (None where a loss was not
    finite); empty if training has not diverged.

    Args:
        kinds: Kinds of failure of boards that took no part in the last round; empty for each that did.
        job: The job's settings, as JSON.
        mixed: Whether the global model's batch-norm statistics are averages over boards of different widths.
    """
    all_kinds = list(kinds)
    diverged_count = all_kinds.count(FailureKind.DIVERGED)
    first_loss, last_loss = (losses[0], losses[-1]) if losses else (0.0, 0.0)
    if last_loss is None or not math.isfinite(last_loss):
        symptom = "the global model's loss is no longer finite"
    elif diverged_count and _is_majority(all_kinds):
        symptom = f"{diverged_count} of the devices ended with numbers that are not finite, or far too large"
    elif first_loss is not None and last_loss > _MAX_LOSS_RISE * first_loss:
        rise = f"from {first_loss:.4g} after the first round to {last_loss:.4g} after the last"
        symptom = f"the global model's loss rose, {rise}"
        if mixed and _has_noise(job):
            advice = f"{divergence_remedy(job)} If the loss rises then, too, look at {_CALIBRATION_ADVICE}"
            return f"training diverged: {symptom}. {advice}"
        if mixed:
            symptom = f"{symptom}. The most likely cause is {_CALIBRATION_ADVICE} If the loss still rises:"
            return f"training diverged: {symptom} {divergence_remedy(job)}"
    else:
        return ""
    return f"training diverged: {symptom}. {divergence_remedy(job)}"


def warn_of_rejection(event: on.UpdateRejected, job: Job, prefix: str, kinds: Iterable[str]) -> None:
    """Log that an update doesn't count, and what to change if training diverged on most of the round's devices. `kinds`
    are the failures of the round's devices so far, this one included; empty for devices without one."""
    with log_context(job=job.name, round=event.round, device=event.device):
        log.warning("%supdate of %s in round %d doesn't count: %s", prefix, event.device, event.round, event.reason)
        if event.kind == FailureKind.DIVERGED and _is_majority(list(kinds)):
            log.warning("%s%s", prefix, divergence_remedy(job.to_dict()))


_CALIBRATION_ADVICE = (
    "the model's batch-norm statistics: averages over boards of different widths suit none of these widths, least of "
    "all the whole model. Set data in [calibration] to a file of some 100 unlabelled samples like the boards' "
    "(docs/configure-a-job.md); a simulation can set them aside with calibration = 0.1 in [data]."
)


def _is_majority(kinds: Sequence[str]) -> bool:
    """Whether training diverged on at least half of the devices. If on fewer, those devices are the cause."""
    return 2 * kinds.count(FailureKind.DIVERGED) >= len(kinds)


def divergence_remedy(job: Mapping[str, Any]) -> str:
    """Advice for a job whose training diverges."""
    recipe, privacy = (_table(job.get(key)) for key in ("recipe", "privacy"))
    restart_text = "Start again in another folder: these weights are unusable."
    if _has_noise(job):
        noise, clip = (_current_value(privacy, key) for key in ("noise_multiplier", "clip"))
        return (
            f"The most likely cause is the noise of [job.privacy], whose deviation is noise_multiplier ({noise}) times "
            f"clip ({clip}): lower clip, which leaves ε as it is, have more boards in each round, or lower "
            "noise_multiplier, which raises ε. Whether training diverges without noise, too, a simulation with "
            f"noise_multiplier = 0 shows. {restart_text}"
        )
    momentum = f" or momentum ({_current_value(recipe, 'momentum')})" if recipe.get("momentum") else ""
    limit, clip_norm_text = recipe.get("clip_norm"), _current_value(recipe, "clip_norm")
    clipped = isinstance(limit, (int, float)) and 0 < limit <= 1
    clip = f"lower clip_norm ({clip_norm_text}; try a tenth)" if clipped else f"set clip_norm ({clip_norm_text}; try 1)"
    return (
        f"The most likely cause is a learning rate that is too high: in [job.recipe] lower lr "
        f"({_current_value(recipe, 'lr')}; try a tenth){momentum}, or {clip}. If that doesn't help, look at the "
        f"samples: scaled as the model expects, with the right labels. {restart_text}"
    )


def _has_noise(job: Mapping[str, Any]) -> bool:
    return bool(_table(job.get("privacy")).get("noise_multiplier"))


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _current_value(settings: Mapping[str, Any], key: str) -> str:
    value = settings.get(key)
    return f"now {value:g}" if isinstance(value, (int, float)) else "see the job"
