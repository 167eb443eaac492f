"""Advice on a job: which of its variants (`job_variants`) to take, after short runs of each on the user's own fleet."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from fedprune.core.metrics import Metric
from fedprune.core.text import amount, first_few, quantity
from fedprune_server.simulation.job_variants import Variant
from fedprune_server.simulation.results.differences import board_gains, score_difference_text, standard_error
from fedprune_server.simulation.results.record import ALONE, Record, score_text
from fedprune_server.simulation.results.tables import ResultColumn, column_rows, finite_or_none, megabytes_text

# The score that decides: the global model's on the server's samples, the mean of what boards serve, or the worst of it.
Judge = Literal["global", "served", "worst"]

# How tables call what judges.
_SIDES: Mapping[str, Judge] = {"global": "global", "local": "served", "worst_local": "worst"}


@dataclass(frozen=True)
class VariantRuns:
    """A variant and its runs, one for each seed."""

    variant: Variant
    runs: tuple[Record, ...]

    def scores(self, judge: Judge, rounds: int | None = None) -> list[float]:
        """Each run's last score, or that at the end of the first rounds; NaN where it has none."""
        read = {"global": Record.global_values, "served": Record.mean_locals, "worst": Record.worst_locals}[judge]
        scores_of_runs = [[score for score in read(run)[:rounds] if score is not None] for run in self.runs]
        return [scores[-1] if scores else math.nan for scores in scores_of_runs]

    def score(self, judge: Judge, rounds: int | None = None) -> float:
        """The mean of the runs' scores; NaN if a run has none."""
        return statistics.fmean(self.scores(judge, rounds))

    def expected_score(self, judge: Judge, rounds: int) -> float:
        """The score after more rounds, extrapolated as if it approached its limit like 1 / rounds, at the pace of the
        last quarter. NaN after a single round."""
        round_count = len(self.runs[0].rounds)
        earlier_score, last_score = self.score(judge, 3 * round_count // 4), self.score(judge)
        if round_count < 2:
            return math.nan
        # Score(t) = end − c / t, with c from the last quarter, at t = rounds.
        return last_score + (last_score - earlier_score) * (1 / round_count - 1 / rounds) / (
            1 / (3 * round_count // 4) - 1 / round_count
        )

    def per_round(self, amount: Callable[[Record], float]) -> float:
        """What a round takes of an amount: a round's seconds are those of its slowest board."""
        return statistics.fmean(amount(run) / len(run.rounds) for run in self.runs)

    def bytes(self, rounds: int) -> float:
        """Bytes of so many rounds, both ways. What is sent once is in the first two only: graphs and whole weights,
        and the weights from which boards go on alone. A trial of two rounds or one can't tell that apart."""
        run_bytes = [[0, *(row.down + row.up for row in run.rounds)] for run in self.runs]  # after 0, 1, 2, … rounds
        made = min(map(len, run_bytes)) - 1
        settled = min(2, made - 1)
        first, last = (statistics.fmean(after[i] for after in run_bytes) for i in (settled, made))
        return first + (rounds - settled) * (last - first) / (made - settled)


@dataclass(frozen=True)
class Advice:
    """Which variant to take.

    Attributes:
        taken: None where no variant that all boards can train has a score.
        noise: Differences of scores up to this say nothing.
        reason: Why that variant, in a sentence.
        doubts: Why these runs are too few or too short to say, in sentences.
        gains: By how much each board's served model is better with that variant than if the board trains alone; of the
            best variant with a fleet, where training alone is taken.
        worth: For whom the fleet is worth it, in a sentence; empty where nothing was measured.
    """

    taken: Variant | None
    noise: float
    reason: str
    doubts: tuple[str, ...] = ()
    gains: Mapping[str, float] = field(default_factory=dict)
    worth: str = ""

    def to_dict(self) -> dict[str, Any]:
        chosen_variant = None if self.taken is None else {"variant": self.taken.name, "toml": self.taken.toml()}
        return {**vars(self), "taken": chosen_variant, "doubts": list(self.doubts)}


def advise(trials: Sequence[VariantRuns], rounds: int, samples: int = 0, judge: Judge | None = None) -> Advice:
    """The best of the variants that all boards can train. Of those within noise of the best it is the one with fewest
    bytes.

    `trials`: one or more, with equal seeds; `rounds`: those of the job; `samples`: the server's; `judge`: by default
    the global model's score or, where the server has no samples, that of the models that boards serve.
    """
    run = trials[0].runs[0]
    judge = judge or ("global" if samples else "served")
    sign = 1 if run.metric.higher_is_better else -1
    scores = {t.variant.name: sign * t.score(judge) for t in trials}
    trainable = [t for t in trials if not t.variant.misfit and math.isfinite(scores[t.variant.name])]
    if not trainable:
        return Advice(None, 0.0, f"No variant that all boards can train has a {judge} {run.measure}.")
    best = max(trainable, key=lambda t: scores[t.variant.name])
    noise = _noise(trials, judge)
    if judge == "global" and run.metric.is_share:
        # The standard error of a share measured on as many samples, which seeds on the same samples don't show.
        noise = max(noise, math.sqrt(best.score(judge) * (1 - best.score(judge)) / samples))
    gaps = {t.variant.name: scores[best.variant.name] - scores[t.variant.name] for t in trainable}
    # Within noise of the best the score says nothing more, and bytes are what boards pay.
    choice = min((t for t in trainable if gaps[t.variant.name] <= noise), key=lambda t: t.bytes(rounds))
    within_noise = [name for name, gap in gaps.items() if gap <= noise and name != choice.variant.name]

    def distance(value: float) -> str:
        return f"{100 * value:.1f} points" if run.metric.is_share else f"{value:.3g}"

    reason = f"Take {choice.variant.name}: {judge} {run.measure} {score_text(choice.score(judge), run.metric)}, "
    if len(trainable) == 1:
        reason += "and no other variant can be trained by all boards."
    elif within_noise:
        ties_text = (
            "all others that boards can train" if len(within_noise) == len(trainable) - 1 else first_few(within_noise)
        )
        reason += f"within noise ({distance(noise)}) of {ties_text}, and the fewest bytes of these."
    else:
        lead = min(gap for name, gap in gaps.items() if name != choice.variant.name)
        reason += f"the best that all boards can train, {distance(lead)} ahead where {distance(noise)} are noise."
    doubts = tuple(_doubts(trainable, choice, rounds, judge, noise))
    fleets = [t for t in trainable if t.variant.name != ALONE]
    fleet = choice if choice in fleets else max(fleets, key=lambda t: scores[t.variant.name], default=None)
    gains = {} if fleet is None else _mean_gains(fleet, trials)
    worth = "" if fleet is None else _worth(fleet.variant.name, gains, run.metric)
    return Advice(choice.variant, noise, reason, doubts, gains, worth)


def _mean_gains(fleet: VariantRuns, trials: Sequence[VariantRuns]) -> dict[str, float]:
    """Each board's mean gain over training alone, over the seeds."""
    runs = [run for trial in trials for run in trial.runs]
    gains_of_runs = [board_gains(run, runs) for run in fleet.runs]
    devices = sorted(set().union(*gains_of_runs))
    return {device: statistics.fmean(gains[device] for gains in gains_of_runs if device in gains) for device in devices}


def _worth(name: str, gains: Mapping[str, float], metric: Metric) -> str:
    parts = []
    for verb, is_gain in (("gain", True), ("don't gain", False)):
        if boards := {device: gain for device, gain in gains.items() if (gain > 0) == is_gain}:
            mean = score_difference_text(metric, statistics.fmean(boards.values())) + " points" * metric.is_share
            parts.append(f"{len(boards)} of {len(gains)} boards {verb}, on average {mean}: {first_few(list(boards))}")
    return f"With {name}, compared with training alone: {'; '.join(parts)}." if parts else ""


def _noise(trials: Sequence[VariantRuns], judge: Judge) -> float:
    """Twice the standard error, over the seeds, of a variant's distance from the first one.

    It is the median variant's: one that learns nothing must not make noise of all differences.
    """
    errors = [0.0]
    for trial in trials[1:]:
        gaps = [a - b for a, b in zip(trial.scores(judge), trials[0].scores(judge), strict=True)]
        if len(gaps) > 1 and all(map(math.isfinite, gaps)):
            # Distances within one seed: data and start of a seed move all variants alike, and cancel out.
            errors.append(standard_error(gaps))
    return 2 * statistics.median(errors[1:] or errors)


def _doubts(
    trainable: Sequence[VariantRuns], choice: VariantRuns, rounds: int, judge: Judge, noise: float
) -> Iterator[str]:
    if len(choice.runs) == 1:
        yield "One seed shows a part of the noise alone: give --seeds 2 or more."
    run = choice.runs[0]
    round_count = len(run.rounds)
    if round_count >= rounds:  # the job has no more
        return
    sign = 1 if run.metric.higher_is_better else -1
    expected_scores = {t.variant.name: sign * t.expected_score(judge, rounds) for t in trainable}
    leader, chosen_score = max(expected_scores, key=expected_scores.__getitem__), expected_scores[choice.variant.name]
    if not math.isfinite(chosen_score):
        doubt = f"{quantity(round_count, 'round')} can't show what is ahead after the job's {rounds}."
    elif expected_scores[leader] - chosen_score > noise:
        doubt = f"{quantity(round_count, 'round')} are too few to say: {leader} may be ahead after the job's {rounds}."
    else:
        return
    yield f"{doubt} Give --rounds {min(rounds, 2 * round_count)} and another --out."


def advice_figures(trials: Sequence[VariantRuns], rounds: int) -> list[dict[str, Any]]:
    """Scores and costs of variants as JSON types: bytes, hours and, if all boards' is known, energy of training of the
    job's rounds at the pace of the runs', MACs as a share of the first variant's."""
    measure, full_macs = trials[0].runs[0].measure, trials[0].per_round(Record.macs)
    return [
        {
            "variant": trial.variant.name,
            **{f"{side}_{measure}": finite_or_none(trial.score(judge)) for side, judge in _SIDES.items()},
            "macs_share": trial.per_round(Record.macs) / full_macs if full_macs else None,
            "bytes": trial.bytes(rounds),
            "joules": finite_or_none(trial.per_round(lambda run: sum(row.joules for row in run.rounds)) * rounds),
            "hours": trial.per_round(lambda run: run.last.elapsed_s) * rounds / 3600,
            "why_not": trial.variant.misfit,
            "job": dict(trial.variant.job),
        }
        for trial in trials
    ]


def advice_rows(trials: Sequence[VariantRuns], rounds: int) -> list[tuple[str, ...]]:
    """The same as a table; the first row is the header."""
    measure, score = trials[0].runs[0].measure, partial(score_text, metric=trials[0].runs[0].metric)
    columns = [ResultColumn("variant", "variant", str)]
    columns += [ResultColumn(f"{side}_{measure}", f"{side.replace('_', ' ')} {measure}", score) for side in _SIDES]
    columns += [ResultColumn("macs_share", "MACs", "{:.0%}".format), ResultColumn("bytes", "MB", megabytes_text)]
    columns += [ResultColumn("joules", "energy", partial(amount, unit="J"))]
    columns += [ResultColumn("hours", "time", _hours_text), ResultColumn("why_not", "why not", str)]
    return column_rows(columns, advice_figures(trials, rounds))


def _hours_text(hours: float) -> str:
    return f"{hours:.3g} h" if hours >= 1 else f"{60 * hours:.3g} min"
