"""The figures of all tasks' runs, on the first page of `docs/tasks`."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.tasks.runs import BUDGET, DEFAULT, EQUAL_TIME, METHODS, REFERENCE, TORCH
from benchmarks.tasks.tasks import TASKS, Task
from fedprune.core.metrics import METRICS

Runs = Mapping[str, Mapping[str, Any]]
"""The runs of a task: by method, then by seed."""

_MISSING = "–"


def summary(runs: Mapping[str, Runs], pages: Mapping[str, str]) -> list[str]:
    """The mean scores of all tasks, what `fedprune` cost, how many tasks keep what is promised, and where all was run;
    `pages` are the tasks' files."""
    links = {n: f"[{task.title.partition(': the language')[0]}]({pages[n]})" for n, task in TASKS.items()}
    shown = [m for m in (TORCH, *METHODS) if any(_scores(runs[name].get(m, {})) for name in TASKS)]
    lines = [f"| | score | {' | '.join(shown)} |", f"|---|---|{'---:|' * len(shown)}"]
    for name, task in TASKS.items():
        cells = [_mean_score(task, runs[name].get(method, {})) for method in shown]
        lines.append(f"| {links[name]} | {METRICS[task.recipe.judged_by].title} | {' | '.join(cells)} |")
    if BUDGET in shown:
        lines += ["", f"What `{DEFAULT}` and, behind it, `{BUDGET}` cost, of `{REFERENCE}`'s:", ""]
        lines += ["| | rounds | MACs | bytes | time | rounds | MACs | bytes | time |", f"|---|{'---:|' * 8}"]
        for name in TASKS:
            cells = []
            for method in (DEFAULT, BUDGET):
                cells.append(_mean((len(run["curve"]) for run in runs[name].get(method, {}).values()), ".0f"))
                cells += [_mean(shares(runs[name], method, what), ".0%") for what in ("macs", "bytes", "at")]
            lines.append(f"| {links[name]} | {' | '.join(cells)} |")
    return [*lines, *_promises(runs), "", *_provenance(runs)]


def shares(runs: Runs, method: str, what: str) -> list[float]:
    """What a method's runs cost, as shares of the reference's of the same seeds."""
    whole = runs.get(REFERENCE, {})
    pairs = [(run, whole[seed]) for seed, run in runs[method].items() if seed in whole] if method in runs else []
    return [run[what][-1] / other[what][-1] for run, other in pairs if what in run and what in other]


def docs_pages(results: Mapping[str, Any], folder: Path) -> dict[Path, str]:
    """The folder's first page with the figures of these results between their marks."""
    texts = {path.name: path.read_text() for path in sorted(folder.glob("*.md"))}
    pages = {task: name for name, text in texts.items() for task in re.findall(r"<!-- task: ([\w-]+) -->", text)}
    first = folder / "README.md"
    filled = "\n".join(["<!-- figures -->", *summary(results["runs"], pages), "<!-- end -->"])
    return {first: re.sub(r"<!-- figures -->\n.*?<!-- end -->", lambda _: filled, first.read_text(), flags=re.DOTALL)}


def _scores(runs: Mapping[str, Any]) -> list[float]:
    """The scores after the last round."""
    return [run["curve"][-1] for run in runs.values() if run["curve"]]


def _at_equal_time(runs: Runs, method: str) -> list[tuple[float, float]]:
    """A method's scores and those of `EQUAL_TIME` of the same seeds, when the first of the two had ended."""
    others, pairs = runs.get(EQUAL_TIME, {}), []
    for seed, run in runs[method].items():
        if "at" in run and seed in others:
            until = min(run["at"][-1], others[seed]["at"][-1])
            own, other = (
                [score for at, score in zip(r["at"], r["curve"], strict=False) if at <= until]
                for r in (run, others[seed])
            )
            pairs += zip(own[-1:], other[-1:], strict=False)
    return pairs


def _promises(runs: Mapping[str, Runs]) -> list[str]:
    """In how many tasks `fedprune` is as good as others at its budget; nothing unless all tasks were run."""
    full = [name for name in TASKS if {REFERENCE, EQUAL_TIME, BUDGET} <= runs[name].keys()]
    if len(full) < len(TASKS):
        return []

    def kept(is_kept: Callable[[Task, Runs], bool]) -> str:
        failed = [name for name in full if not is_kept(TASKS[name], runs[name])]
        return f"{len(full) - len(failed)} of {len(full)} tasks" + (f" (not: {', '.join(failed)})" if failed else "")

    def as_good(task: Task, some: Runs) -> bool:
        reference = _scores(some[REFERENCE])
        return _ahead(task, _scores(some[BUDGET]), reference, max(reference) - min(reference))

    def ahead_in_time(task: Task, some: Runs) -> bool:
        pairs = _at_equal_time(some, BUDGET)
        return bool(pairs) and _ahead(task, [own for own, _ in pairs], [other for _, other in pairs], 0.0)

    return [
        "",
        (
            f"The mean score of `{BUDGET}` is worse than `{REFERENCE}`'s by at most the range of `{REFERENCE}`'s seeds "
            f"in {kept(as_good)}. At the time at which the shorter of the two runs ends on the fleet, its score is at "
            f"least as good as `{EQUAL_TIME}`'s in {kept(ahead_in_time)}."
        ),
    ]


def _ahead(task: Task, scores: list[float], others: list[float], room: float) -> bool:
    """Whether a mean score is not worse than another's by more than some room."""
    gain = statistics.fmean(scores) - statistics.fmean(others)
    return (gain if METRICS[task.recipe.judged_by].higher_is_better else -gain) >= -room


def _mean_score(task: Task, runs: Mapping[str, Any]) -> str:
    scores = _scores(runs)
    return METRICS[task.recipe.judged_by].value_text(statistics.fmean(scores)) if scores else _MISSING


def _mean(values: Iterable[float], form: str) -> str:
    numbers = list(values)
    return f"{statistics.fmean(numbers):{form}}" if numbers else _MISSING


def _provenance(runs: Mapping[str, Runs]) -> list[str]:
    """Where, when and with which versions the runs were made."""
    counts = Counter(
        f"{run['made']['date']}, {', '.join(f'{k} {v}' for k, v in run['made'].items() if k != 'date')}"
        for methods in runs.values()
        for seeds in methods.values()
        for run in seeds.values()
    )
    return [f"- {count} runs: {made}".replace("machine ", "") for made, count in sorted(counts.items())]
