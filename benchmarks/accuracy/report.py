"""What a table's runs come to: figures of its rows, paired differences, and whether `fedprune` keeps its promises.

Pages show these records (`benchmarks.tables`); what they mean is written there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.accuracy.protocol import FULL, SAME_LOSS, Protocol
from fedprune_server.simulation.results.differences import difference_text, standard_error

Run = dict[str, Any]
Read = Callable[[dict[str, Any]], "float | None"]
Value = Callable[[Run], "float | None"]

OURS = "fedprune"
NEAR = 2.0
"""Points by which the global model may be behind that of the same loss at full width."""

MOST = {"bytes": 15.0, "MACs": 80.0}
"""Percent of full-width float32 FedAvg's bytes, and of its multiplications."""

TUNED_SEED = 0
"""The seed on which fedprune's own settings were chosen."""

MODELS = {"after": "trained model", "average": "average", "before": "received model"}


def figure(protocol: Protocol, run: Run, read: Read, last: int = 0) -> float | None:
    """A run's figure: the mean over what the protocol reads, of the first `last` rounds (0: all).

    Shares are of the run's rounds; of simulated time where that ends the runs, so that the same times are read of all.
    """
    rounds, timed = run["rounds"][: last or None], bool(protocol.until_s)
    end = rounds[-1]["at"] if timed else rounds[-1]["round"]
    if timed and not last:
        end = max(end, protocol.until_s)  # a run that ended by itself stays what it was
    found = []
    for share in protocol.reads:
        # The last round at or before that share in which it was measured.
        upto = [r for r in rounds if (r["at"] <= share * end if timed else r["round"] <= round(share * end))]
        value = next((v for v in map(read, reversed(upto or rounds[:1])) if v is not None), None)
        if value is None:
            return None
        found.append(value)
    return statistics.fmean(found)


def own(metric: str) -> Read:
    """Reads the mean over devices of what they measured, in percent."""
    return lambda row: _percent(row["own"].get(metric, {}).get("mean"))


def measured(name: str) -> Read:
    """Reads what was measured of the global model, in percent."""
    return lambda row: _percent(row["measured"].get(name))


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def served(protocol: Protocol, run: Run, last: int = 0) -> float | None:
    """Accuracy of the models that boards serve, on their own test data, in percent."""
    return figure(protocol, run, own(f"accuracy_{protocol.method(run['method']).served_model}"), last)


def cost(run: Run, last: int = 0) -> dict[str, float]:
    """Bytes of all devices, both ways, and multiplications of all training, in the first `last` rounds (0: all)."""
    end = run["rounds"][: last or None][-1]
    return {"bytes": float(end["down"] + end["up"]), "MACs": float(end["macs"])}


def share(runs: Sequence[Run], run: Run, what: str, last: int = 0) -> float | None:
    """A run's `bytes` or `MACs`, in percent of those of the full-width float32 row of its seed."""
    full = run_of(runs, FULL, run["seed"])
    return 100 * cost(run, last)[what] / cost(full)[what] if full is not None and cost(full)[what] else None


def run_of(runs: Sequence[Run], method: str, seed: int) -> Run | None:
    return next((r for r in runs if r["method"] == method and r["seed"] == seed), None)


def current(protocol: Protocol, runs: Sequence[Run]) -> list[Run]:
    """The runs that count: of a row whose settings have changed, those that were made since, if there are any."""
    fresh = {r["method"] for r in runs if not r.get("stale")}
    names = {m.name for m in protocol.methods}
    return [r for r in runs if r["method"] in names and (not r.get("stale") or r["method"] not in fresh)]


def differences(runs: Sequence[Run], method: str, other: str, value: Value) -> list[float]:
    """Differences of two rows, seed by seed, in runs that differ in nothing but their row."""
    found = []
    for run in (r for r in runs if r["method"] == method):
        partner = run_of(runs, other, run["seed"])
        if partner is None or ((run.get("stale") or partner.get("stale")) and _origin(run) != _origin(partner)):
            continue
        pair = value(run), value(partner)
        if pair[0] is not None and pair[1] is not None:
            found.append(pair[0] - pair[1])
    return found


def _origin(run: Run) -> tuple[Any, Any]:
    return run.get("code"), run.get("machine")


def mean(runs: Sequence[Run], name: str, value: Value) -> float | None:
    found = [v for r in runs if r["method"] == name and (v := value(r)) is not None]
    return statistics.fmean(found) if found else None


def reached(protocol: Protocol, runs: Sequence[Run]) -> str | None:
    """Simulated seconds until the global model reached the target, and in how many of the runs."""
    times = [
        next((r["at"] for r in run["rounds"] if r["measured"].get("global", 0) >= protocol.target), None)
        for run in runs
    ]
    found = [at for at in times if at is not None]
    if not protocol.target or not found:
        return "never" if protocol.target else None
    return f"{statistics.fmean(found):,.0f}" + (f" ({len(found)} of {len(times)})" if len(found) < len(times) else "")


def rows(protocol: Protocol, runs: Sequence[Run], *, equal_bytes: bool = False) -> list[dict[str, Any]]:
    """The table; at equal bytes each run ends where it has sent what the reference sends in all."""

    def last(run: Run) -> int:
        same = run_of(runs, protocol.reference, run["seed"])
        if not equal_bytes or same is None:
            return 0
        budget = 1.005 * cost(same)["bytes"]
        return max(1, sum(r["down"] + r["up"] <= budget for r in run["rounds"]))

    def at_end(run: Run) -> dict[str, Any]:
        end: dict[str, Any] = run["rounds"][: last(run) or None][-1]
        return end

    def read(reader: Read) -> Value:
        return lambda run: figure(protocol, run, reader, last(run))

    def active(run: Run) -> float | None:
        end = at_end(run)
        return end["active_macs"] / 1e12 if end.get("active_macs", end["macs"]) != end["macs"] else None

    values: dict[str, Value] = {
        "serves": lambda run: served(protocol, run, last(run)),
        "after": read(own("accuracy_after")),
        "average": read(own("accuracy_average")),
        "before": read(own("accuracy_before")),
        "global": read(measured("global")),
        "mb": lambda run: cost(run, last(run))["bytes"] / max(1, len(run["devices"])) / 1e6,
        "bytes_share": lambda run: share(runs, run, "bytes", last(run)),
        "tmac": lambda run: cost(run, last(run))["MACs"] / 1e12,
        "active": active,
        "macs_share": lambda run: share(runs, run, "MACs", last(run)),
        "rounds": lambda run: float(at_end(run)["round"]),
    }
    table = []
    for method in protocol.methods:
        made = [r for r in runs if r["method"] == method.name]
        if not made or (equal_bytes and method.name != protocol.reference and not _costlier(protocol, made, runs)):
            continue
        row: dict[str, Any] = {"method": method.name + _mark(made, runs)}
        row |= {name: mean(made, method.name, value) for name, value in values.items()}
        for name in ("serves", "average", "global"):
            other = method.name != protocol.reference
            gaps = differences(runs, method.name, protocol.reference, values[name]) if other else []
            row[f"{name}_gap"] = difference_text(gaps)
        submodels = [f"{d:g}" for d in protocol.densities if d < 1]
        row["sub"] = {d: mean(made, method.name, read(measured(f"sub@{d}"))) for d in submodels}
        row["reached"] = reached(protocol, made)
        last_measured = [at_end(run)["measured"] for run in made]
        personal = dict.fromkeys(n for found in last_measured for n in found if n.startswith("personal@"))
        row["personal"] = {n.removeprefix("personal@"): statistics.fmean(f[n] for f in last_measured) for n in personal}
        table.append(row)
    return table


def _mark(made: Sequence[Run], runs: Sequence[Run]) -> str:
    """A row's seeds, where the page has more, and † for other code or settings."""
    seeds, everyones = ({r["seed"] for r in found} for found in (made, runs))
    some = f" (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, sorted(seeds)))})" if seeds < everyones else ""
    return some + (" †" if any(r.get("stale") for r in made) else "")


def _costlier(protocol: Protocol, made: Sequence[Run], runs: Sequence[Run]) -> bool:
    pairs = [(run, run_of(runs, protocol.reference, run["seed"])) for run in made]
    return any(same is not None and cost(run)["bytes"] > 1.05 * cost(same)["bytes"] for run, same in pairs)


def verdicts(protocol: Protocol, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """All promises of a table, with the figures and the verdict; none of a table without their rows."""
    runs = [r for r in current(protocol, runs) if not r.get("stale")]
    if not {OURS, FULL, SAME_LOSS} <= {m.name for m in protocol.methods}:
        return []
    published = [m.name for m in protocol.methods if m.published]
    boards, model = partial(served, protocol), partial(figure, protocol, read=measured("global"))
    found = [
        _against(protocol, runs, "served, published", boards, published, None),
        _against(protocol, runs, "served, same loss", boards, [SAME_LOSS], None),
        _against(protocol, runs, "global, published", model, published, 0.0),
        _against(protocol, runs, "global, same loss", model, [SAME_LOSS], NEAR),
    ]
    for what, most in MOST.items():
        used = mean(runs, OURS, partial(share, runs, what=what))
        whole = all(run_of(runs, row, seed) for row in (OURS, FULL) for seed in protocol.seeds)
        text = None if used is None else f"{used:.1f} % of {FULL}'s; at most {most:g} %"
        found.append(_verdict(what, text, None if used is None or not whole else used - most))
    return found


def _verdict(promise: str, text: str | None, miss: float | None) -> dict[str, Any]:
    word = "open" if miss is None else "true" if miss <= 0 else f"false, by {miss:.1f}"
    return {"promise": promise, "word": word, "found": text, "kept": miss is not None and miss <= 0}


def _against(
    protocol: Protocol, runs: Sequence[Run], promise: str, value: Value, rivals: Sequence[str], margin: float | None
) -> dict[str, Any]:
    """fedprune against the best of some rows; by default it may be behind by the standard error of the difference."""
    means = {name: found for name in (OURS, *rivals) if (found := mean(runs, name, value)) is not None}
    best = max((n for n in rivals if n in means), key=lambda n: means[n], default=None)
    gaps = differences(runs, OURS, best, value) if best is not None else []
    if best is None or OURS not in means or not gaps:
        return _verdict(promise, None, None)
    allowed = standard_error(gaps) if margin is None else margin
    beyond = f"; may be behind by {allowed:.1f}" if allowed else ""
    whole = all(run_of(runs, name, seed) for name in (OURS, *rivals) for seed in protocol.seeds)
    text = f"{means[OURS]:.1f}, {best} {means[best]:.1f}: {difference_text(gaps)}{beyond}"
    return _verdict(promise, text, -statistics.fmean(gaps) - allowed if whole else None)


def at_best(protocol: Protocol, runs: Sequence[Run]) -> str | None:
    """What fedprune serves against the best model that a board has by any other method: fedprune serves an average,
    which costs no bytes and which a board of every method could serve."""
    runs = [r for r in current(protocol, runs) if not r.get("stale")]
    mine = mean(runs, OURS, partial(served, protocol))
    values: dict[tuple[str, str], Value] = {
        (m.name, model): partial(figure, protocol, read=own(f"accuracy_{model}"))
        for m in protocol.methods
        if m.published
        for model in MODELS
    }
    means = {key: found for key, value in values.items() if (found := mean(runs, key[0], value)) is not None}
    if mine is None or not means:
        return None
    best = max(means, key=lambda key: means[key])

    def value(run: Run) -> float | None:
        return served(protocol, run) if run["method"] == OURS else values[best](run)

    gap = difference_text(differences(runs, OURS, best[0], value)) or "–"
    return f"{mine:.1f}, {best[0]}'s {MODELS[best[1]]} {means[best]:.1f}: {gap}"


def figures(protocol: Protocol, runs: Sequence[Run]) -> dict[str, Any]:
    """All that a table's page shows."""
    counted = current(protocol, runs)
    equal = rows(protocol, counted, equal_bytes=True)
    return {
        "table": rows(protocol, counted),
        "at_equal_bytes": equal if len(equal) > 1 else [],
        "verdicts": verdicts(protocol, runs),
        "best": at_best(protocol, runs),
    }


def summary(tables: Mapping[str, tuple[Protocol, Sequence[Run]]]) -> dict[str, Any]:
    """The verdicts of several tables, with all seeds and without the one on which settings were chosen."""
    found = []
    for name, (protocol, runs) in tables.items():
        unseen = replace(protocol, seeds=tuple(s for s in protocol.seeds if s != TUNED_SEED))
        without = verdicts(unseen, [r for r in runs if r["seed"] != TUNED_SEED])
        found.append(
            {
                "name": name,
                "verdicts": {v["promise"]: v for v in verdicts(protocol, runs)},
                "best": at_best(protocol, runs),
                "unseen": {v["promise"]: v for v in without},
            }
        )
    kept = sum(bool(row["verdicts"]) and all(v["kept"] for v in row["verdicts"].values()) for row in found)
    return {"tables": found, "kept": kept}
