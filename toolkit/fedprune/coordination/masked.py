"""The coordinator of synchronous jobs whose devices mask their updates, so that only sums of them are ever known.

A device that has trained says so, and keeps its update. When the round closes, devices that were sent the same are
divided into cohorts, each of which sums its masked updates; the round closes with these sums. A sum that is false shows
that a board of its cohort is at fault, but not which: `coordination.suspects` finds it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from msgspec import convert

from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.base import Commands, counted_steps, is_based_on_offer
from fedprune.coordination.patience import MAX_SUM_FAILURES
from fedprune.coordination.stragglers import BEFORE_OFFER
from fedprune.coordination.suspects import divide_into_cohorts, narrow_suspects
from fedprune.coordination.synchronous import SynchronousCoordinator
from fedprune.core.metrics import credible_metrics
from fedprune.core.rng import keyed_generator
from fedprune.core.text import first_few, quantity
from fedprune.jobs.failure_kind import FailureKind
from fedprune.jobs.state import Phase, Progress
from fedprune.secure_aggregation.session import task_digest
from fedprune.secure_aggregation.vector_form import SECURE_FIELD, MaskedForm

_LEFT_OUT_REASON = "it was left out of this round's sums, to find out which board has spoilt one"


class MaskedCoordinator(SynchronousCoordinator):
    """Synchronous rounds that close with the sums of cohorts instead of with single updates."""

    is_masked = True

    def handle(self, event: on.Event, now: float) -> Commands:
        if isinstance(event, on.Unmasked):
            return self._on_unmasked(event, now) + self._request_next_look(now)
        return super().handle(event, now)

    def _admit(self, event: on.DeviceBorn) -> bool:
        admitted = super()._admit(event)
        if admitted and event.device in self.state.at_fault:
            self._exclude_at_fault(event.device)
        return admitted

    def _mark_all_offline(self) -> None:
        super()._mark_all_offline()
        for name in self.state.at_fault:
            self._exclude_at_fault(name)

    def _is_continued_from(self, offer: Mapping[str, Any]) -> bool:
        return super()._is_continued_from(offer) or MaskedForm.from_json(offer[SECURE_FIELD]).has_codes

    def _on_update_announced(self, event: on.UpdateAnnounced, now: float) -> Commands:
        """Count a device that has an update to mask as part of the round's sum."""
        state, task = self.state, self.state.tasks.get(event.device)
        if (
            task is None
            or (event.round, event.attempt) != (state.round, task.attempt)
            or not is_based_on_offer(event, task)
        ):
            if task is not None and event.round == state.round and task.progress in BEFORE_OFFER:
                return []  # the offer that it gets in a moment says whether this update still counts
            return self._cancel_late_answer(event, "the round is over", now)
        if task.progress is Progress.FOLDED and state.phase in (Phase.TRAINING, Phase.CLOSING):
            return []  # the shell tells it what is next
        if task.progress is not Progress.OFFERED or state.phase is not Phase.TRAINING:
            return self._cancel_late_answer(event, task.reason or "the round is over", now)
        self._note_answer(event.device, task, now)
        task.seconds = None if task.offered_at is None else now - task.offered_at
        task.steps, task.metrics = counted_steps(event, task), credible_metrics(event.metrics)
        # Its update is not here, but settled: it is in the round's sum unless the device drops out of that.
        task.progress = Progress.STORED
        device, failures = self.state.devices[event.device], self.state.devices[event.device].failures
        commands = self._on_folded(on.Folded(event.device, event.round, event.attempt), now)
        device.failures = failures  # until its update is in a sum
        return commands

    def _close_command(self) -> do.Close | do.SumMasked:
        """The command that sums the masked updates or, once their sums are known, closes the round."""
        closing = self.state.closing or {}
        if "sums" in closing:
            return self._close_with(convert(closing["sums"], tuple[do.CohortSum, ...]))
        # Divided once and stored: a second division, after a restart, would leave out more boards, since those that
        # the first has left out are no longer among the done.
        self.state.closing = closing or {"division": self._divide_into_cohorts(self._counted_tasks())}
        return do.SumMasked(self.state.round, tuple(map(tuple, self.state.closing["division"])))

    def _divide_into_cohorts(self, names: Iterable[str]) -> list[list[str]]:
        """Cohorts of devices that were asked for the same; a device that no cohort takes loses its part."""
        state = self.state
        groups: dict[str, list[str]] = {}
        for name in names:
            offer = state.tasks[name].offer or {}
            digest = task_digest(offer["selection"], offer["weights"]["sha256"], offer["recipe"], offer[SECURE_FIELD])
            # Boards sign this digest, so that no sum can hold boards that were asked for something else.
            groups.setdefault(digest, []).append(name)
        cohorts: list[list[str]] = []
        for digest, members in sorted(groups.items()):
            attempt = max(state.tasks[name].attempt for name in members)
            rng = keyed_generator(self.job.seed, state.round, "cohorts", attempt, digest)
            divided, left_out = divide_into_cohorts(members, state.suspects, rng)
            cohorts += map(list, divided)
            for name in left_out:
                state.tasks[name].refuse(_LEFT_OUT_REASON, FailureKind.LEFT_OUT)
        return cohorts

    def _on_unmasked(self, event: on.Unmasked, now: float) -> Commands:
        """Close the round with the sums of masked updates; without any, start it again."""
        state = self.state
        if state.phase is not Phase.CLOSING or event.round != state.round or "sums" in (state.closing or {}):
            return []
        state.closing = None
        absent = {name for cohort in event.cohorts for names in cohort["lost"].values() for name in names}
        for name in event.dropped.keys() & state.tasks.keys():
            state.tasks[name].refuse(event.dropped[name], FailureKind.LOST if name in absent else FailureKind.OTHER)
        for name in event.answer_s.keys() & state.devices.keys():
            for step, seconds in event.answer_s[name].items():
                self._patience.note_answer(state.devices[name], step, seconds)
        for name in [name for cohort_sum in event.sums for name in cohort_sum["devices"]]:
            state.devices[name].failures *= name in event.silent
        for name, step in sorted(event.silent.items()):
            reason = f"no answer at the step of {step} of a secure sum"
            self._count_failure(state.devices[name], FailureKind.LOST, reason, now, MAX_SUM_FAILURES)
        if not event.sums:
            retry_at_once = self._note_suspects((), event.false) or bool(event.silent)
            return self._repeat_round(now) if retry_at_once else self._restart_after_unusable_updates(now)
        state.closing = {"sums": event.sums, "cohorts": event.cohorts, "false": event.false}
        return [self._close_command()]

    def _judge_cohort_sums(self, event: on.Closed) -> tuple[list[list[str]], bool]:
        closing = self.state.closing or {}
        false_cohorts: list[list[str]] = [[*cohort] for cohort in closing.get("false", ())]
        true_cohorts: list[list[str]] = []
        for cohort_sum in closing.get("sums", ()):
            members: list[str] = cohort_sum["devices"]
            is_spoilt = any(event.kinds.get(name) == FailureKind.FALSE_SUM for name in members)
            (false_cohorts if is_spoilt else true_cohorts).append(members)
        self.state.closing = {"cohorts": closing["cohorts"]} if closing.get("cohorts") else None  # for the summary
        return true_cohorts, self._note_suspects(true_cohorts, false_cohorts)

    def _round_summary(self, metrics: Mapping[str, float], now: float) -> dict[str, Any]:
        reports = (self.state.closing or {}).get("cohorts", ())
        return {**super()._round_summary(metrics, now), "notes": [cohort_sum_line(report) for report in reports]}

    def _note_suspects(self, true_cohorts: Collection[Sequence[str]], false_cohorts: Collection[Sequence[str]]) -> bool:
        """Learn from a round's sums which devices may have spoilt one. Returns whether fewer are suspected than before,
        so that the next attempt needs no pause."""
        state, former_suspects = self.state, self.state.suspects
        state.suspects, at_fault = narrow_suspects(former_suspects, true_cohorts, false_cohorts)
        for name in sorted(at_fault):
            state.at_fault = sorted({*state.at_fault, name})
            self._exclude_at_fault(name)
        return bool(false_cohorts) and state.suspects != former_suspects

    def _exclude_at_fault(self, name: str) -> None:
        device = self.state.devices[name]
        device.excluded_by, device.asked_again_at = FailureKind.FALSE_SUM.value, None  # for good, silent or not
        device.excluded = (
            "it has spoilt sums of masked updates: each sum with it was false, and those of others were not"
        )


def cohort_sum_line(report: Mapping[str, Any]) -> str:
    """How the sum of a cohort went (`events.Unmasked`), as one line."""
    lost = "".join(f"; lost at the step of {step}: {first_few(names)}" for step, names in report["lost"].items())
    return f"secure sum of {quantity(report['boards'], 'board')}: {report['summed']} summed{lost}"
