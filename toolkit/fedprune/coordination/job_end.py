"""Why a job ends before its last round: a total or its budget of privacy is spent, or its strategy ends it."""

from __future__ import annotations

from fedprune.core.text import amount
from fedprune.jobs.job import Job
from fedprune.jobs.state import Phase, State

# Metric of an evaluation: the ε that a device would have after another round like its most expensive one.
EPSILON_NEXT = "epsilon_next"


def early_end_reason(job: Job, state: State) -> str:
    """Why a finished job has fewer rounds than it may have; empty if it has all of them, or isn't finished."""
    if state.phase is not Phase.FINISHED or state.round >= job.rounds:
        return ""
    reason = spent_total_reason(job, state) or _spent_privacy_reason(job, state) or "the strategy ended the job"
    end_text = f"after round {state.round} of {job.rounds}" if state.round else "without a finished round"
    return f"ended {end_text}: {reason}"


def spent_total_reason(job: Job, state: State, now: float | None = None) -> str:
    """Which of the job's totals its fleet has spent; empty if none.

    Args:
        now: The end of the round, on the shell's clock; None for that of the last finished one. Time after it doesn't
            count, so that a finished job stays finished, and no other is ended by a pause between its rounds.
    """
    hours = _hours_since_start(state, now)
    if job.total_bytes and state.spent_bytes >= job.total_bytes:
        return f"{amount(state.spent_bytes, 'bytes')} have been sent, of total_bytes = {job.total_bytes}"
    if job.total_macs and state.spent_macs >= job.total_macs:
        return f"{state.spent_macs:.4g} MACs have been computed, of total_macs = {job.total_macs}"
    if job.total_hours and hours >= job.total_hours:
        return f"{hours:.4g} hours have passed, of total_hours = {job.total_hours:g}"
    return ""


def spent_share_after_round(job: Job, state: State) -> float:
    """The share of a job's total that will be spent after the present round, if that takes as much as the finished ones
    did on average: the greatest share where a job has several totals, 0 in a first round and without a total."""
    if not state.history:  # what updates that couldn't be used have cost says nothing of rounds
        return 0.0
    hours, finished_rounds = _hours_since_start(state, None), max(1, state.round - 1)
    used_of_total = ((state.spent_bytes, job.total_bytes), (state.spent_macs, job.total_macs), (hours, job.total_hours))
    spent_share = max((used / total for used, total in used_of_total if total), default=0.0)
    return spent_share * (finished_rounds + 1) / finished_rounds


def _hours_since_start(state: State, now: float | None) -> float:
    if now is None and state.history:
        now = state.history[-1]["at"]
    return 0.0 if now is None or state.began_at is None else (now - state.began_at) / 3600


def _spent_privacy_reason(job: Job, state: State) -> str:
    budget = job.privacy.epsilon_budget
    next_epsilon = state.history[-1]["metrics"].get(EPSILON_NEXT, 0.0) if state.history else 0.0
    if budget and next_epsilon > budget:
        return f"another round would cost ε {next_epsilon:.3g} > {budget:g}, the budget of a board's privacy"
    if budget:  # shared noise, whose cost is known when a round closes
        return f"the updates that came in the next round would have cost more than the budget of ε {budget:g}"
    return ""
