"""FedAvg, the reference that narrow models are held against (McMahan et al., arXiv:1602.05629)."""

from __future__ import annotations

from dataclasses import replace

from fedprune.jobs.job import Job

TITLE = "FedAvg"


def fedavg(job: Job) -> Job:
    """The job that trains the whole model on every device, with plain local training and the plain mean.

    Seed, rounds, devices, participation and deadline are those of the given job; of its recipe so are steps, the batch
    and its parts (`accumulate`), the loss with `label_smoothing`, the optimiser with `clip_norm`, what is frozen, and
    how often boards measure themselves.
    """
    plain = replace(
        job.recipe,
        proximal=0.0,
        logit_adjustment=False,
        mask_absent_classes=False,
        balance_classes=False,
        ordered_dropout=(),
        average=0.0,
        blend=0.0,
        mixup=0.0,
        calibrate=False,
        personal=(),
        scale=1.0,
        mask="none",
        mask_threshold=0.0,
        patience=0,
        report_squares=False,
    )
    return replace(
        job,
        name="fedavg",
        strategy="plain",
        options={},
        density=1.0,
        byte_budget=0,
        scorer="ordered",
        rule="coverage",
        server_momentum=0.0,
        warmup_rounds=0,
        recipe=plain,
    )
