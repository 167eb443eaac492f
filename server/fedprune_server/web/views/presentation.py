"""Makes rows, charts and maps for the console's pages from the records that the server has published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedprune.core.metrics import ACCURACY, BLEND, METRICS, Metric
from fedprune.core.text import round_text
from fedprune.output.chart import Chart, Strip, coverage_strip, lay_out_chart
from fedprune_server.web.state.fleet_view import FleetView
from fedprune_server.web.state.record_page import MAX_PAGE_SIZE
from fedprune_server.web.views import formatting as phrases

WORKING_STATES = ("extracting", "offered", "training", "pulling", "stored")
_FINISHED_STATES = ("folded", "refused")
_PROGRESS_STATES = ("queued", "extracting", "offered", "training", "pulling", "stored", "folded", "refused")
_MAX_CURVES = 4
# Ranges of channels that are written out for readers of the screen; more are counted, since thousands would be read.
MAX_RANGES = 60

_FIGURE_TEXTS = {
    "round": "An update", "step": "A training step", "train": "All its steps", "transfer": "Transfer",
    "latency": "A prediction", "memory": "Peak memory in training", "serving_memory": "Memory to predict",
    "storage": "Storage", "download": "Download", "upload": "Upload", "step_energy": "Energy of a step",
    "round_energy": "Energy of a round", "latency_energy": "Energy of a prediction",
}  # fmt: skip

Row = dict[str, Any]
# The curves of a chart, by name: a value for each round, None where there is none.
Series = Mapping[str, Sequence[float | None]]


def round_progress(job: Row) -> Row | None:
    """Progress of a job's round: devices, finished ones, and each kind for people."""
    counts = {k: n for k, n in job["parts"].items() if n and k in _PROGRESS_STATES}
    if not counts:
        return None
    finished = sum(counts.get(k, 0) for k in _FINISHED_STATES)
    texts = [(phrases.state_word(k), counts[k]) for k in _PROGRESS_STATES if k in counts]
    return {"asked": sum(counts.values()), "over": finished, "each": texts}


def job_rows(jobs: Sequence[Row]) -> list[Row]:
    """Jobs with finished rounds and a summary of the current one."""
    rows = []
    for job in jobs:
        done = job["rounds"] if job["phase"] == "finished" else max(0, min(job["round"] - 1, job["rounds"]))
        now = round_progress(job)
        summary = f"{now['over']:,} of {phrases.plural_text(now['asked'], 'client update')} finished" if now else ""
        number_text = round_text(job["round"], job["rounds"])
        rows.append({**job, "done": done, "round_text": number_text, "told": summary})
    return rows


def fold_alert_rows(rows: Sequence[Row]) -> list[Row]:
    """One row for the alerts of one kind and severity about boards: the first, with the names of the others."""
    groups = dict[Any, list[Row]]()
    for row in rows:
        groups.setdefault((row["alert"], row["severity"]) if row["device"] else row["id"], []).append(row)
    return [{**first, "others": [row["device"] for row in others]} for first, *others in groups.values()]


def plan_row(body: Row | None) -> Row | None:
    """A plan's density, its binding limit, and each limit's need, value and used share."""
    if body is None:
        return None
    limits = []
    for limit in body["limits"].values():
        format_value = phrases.seconds_text if limit["unit"] == "s" else phrases.size_text
        used = limit["value"] / limit["limit"] if limit["limit"] > 0 else 1.0
        limits.append(
            {
                "name": limit["name"],
                "used": min(max(used, 0.0), 1.0),
                "need": format_value(limit["value"]),
                "limit": format_value(limit["limit"]),
                "binds": limit["name"] == body["binding"],
            }
        )
    return {"density": body["density"], "bound": body["binding"] or "nothing", "limits": limits}


def figure_rows(details: Row | None) -> list[Row]:
    """Predictions next to measurements, where either is known."""
    formats = {"s": phrases.seconds_text, "bytes": phrases.size_text, "J": phrases.energy_text}
    rows = []
    for figure in () if details is None else details["figures"]:
        predicted, measured, format_value = figure["predicted"], figure["measured"], formats[figure["unit"]]
        ratio = f"{measured / predicted:.2f}" if predicted and measured is not None else phrases.UNKNOWN
        texts = {"predicted": format_value(predicted), "measured": format_value(measured), "ratio": ratio}
        rows.append({"what": _FIGURE_TEXTS[figure["what"]], **texts})
    return rows


def channel_maps(details: Row | None) -> list[ChannelMap]:
    rows = () if details is None else details["widths"]
    return [make_channel_map(w["group"], w["kept"], w["of"], w["which"]) for w in rows]


def rounds_of(view: FleetView, job: str) -> list[Row]:
    """All published rounds of a job, oldest first."""
    first = view.rounds(job, size=MAX_PAGE_SIZE)
    rows = list(first.items)
    for page in range(2, first.pages + 1):
        rows += view.rounds(job, page=page, size=MAX_PAGE_SIZE).items
    return rows[::-1]


def job_charts(rounds: Sequence[Row]) -> list[Chart]:
    """Curves of a job: metrics, updates, bytes, round lengths and staleness."""
    if not rounds:
        return []
    round_numbers = [float(r["round"]) for r in rounds]
    names = {k for r in rounds for k in r["metrics"]} - {"samples"}
    charts: list[Chart | None] = []

    def add_chart(key: str, title: str, series: Series, format_value: Any, **options: Any) -> None:
        charts.append(lay_out_chart(key, title, round_numbers, series, format_value, **options))

    order = {name: i for i, name in enumerate(METRICS)}
    for i, name in enumerate(sorted(names, key=lambda n: (order.get(n, len(order)), n))[:_MAX_CURVES]):
        values, metric = {name: [r["metrics"].get(name) for r in rounds]}, METRICS.get(name)
        key, title = f"metric-{i}", f"Global {name if metric is None else metric.title}"
        if metric is not None and metric.is_share:
            add_chart(key, title, values, phrases.share_text, unit=(0.01, "%"), top=100.0)
        else:
            add_chart(key, title, values, phrases.number_text)
    # Numbers from before the server's start are None.
    updates = {"counted": [r["counted"] for r in rounds], "asked": [r["devices"] for r in rounds]}
    add_chart("updates", "Updates", updates, phrases.number_text, from_zero=True)
    byte_counts = {direction: [r[f"bytes_{direction}"] for r in rounds] for direction in ("down", "up")}
    unit, name = phrases.axis_of_sizes(max((b or 0 for counts in byte_counts.values() for b in counts), default=0))
    add_chart("bytes", "Bytes of all devices", byte_counts, phrases.size_text, unit=(unit, f" {name}"), from_zero=True)
    unit, name = phrases.axis_of_lengths(max((r["seconds"] or 0.0 for r in rounds), default=0.0))
    lengths = {"length": [r["seconds"] for r in rounds]}
    add_chart("seconds", "Length of a round", lengths, phrases.seconds_text, unit=(unit, f" {name}"), from_zero=True)
    staleness = [r["staleness"] or {} for r in rounds]
    if any(s.get("max") for s in staleness):
        series = {"mean": [s.get("mean") for s in staleness], "most": [s.get("max") for s in staleness]}
        add_chart("staleness", "Staleness of updates, in rounds", series, "{:.3g}".format, from_zero=True)
    return [c for c in charts if c is not None]


def device_charts(history: Sequence[Row]) -> list[Chart]:
    """Curves of what a device measured in its rounds, given newest first."""
    rows = [h for h in reversed(history) if h["metrics"]]
    round_numbers = [float(h["round"]) for h in rows]
    drawn_charts = []
    for key, title, names, format_value, kind in _DEVICE_CHARTS:
        series = {label: [h["metrics"].get(name) for h in rows] for label, name in names.items()}
        series = {label: values for label, values in series.items() if any(v is not None for v in values)}
        if not series:
            continue
        unit, top = (1.0, ""), None
        highest = max(v for values in series.values() for v in values if v is not None)
        if kind == "share":
            unit, top = (0.01, "%"), 100.0
        elif kind in ("bytes", "s"):
            size, name = phrases.axis_of_sizes(highest) if kind == "bytes" else phrases.axis_of_lengths(highest)
            unit = size, f" {name}"
        options: dict[str, Any] = {"unit": unit, "top": top, "from_zero": kind != "", "bridges_gaps": True}
        drawn_charts.append(lay_out_chart(key, title, round_numbers, series, format_value, **options))
    return [c for c in drawn_charts if c is not None]


def local_measure(metrics: Mapping[str, float]) -> str:
    """The score of the model that a device serves, on the device's data; the number alone if it is the accuracy.

    The suffixes are in the order of what a device serves: the average, the trained model, the received one.
    """
    for metric in METRICS.values():
        for suffix in ("_average", "_after", "_last", "_before", ""):
            if (value := metrics.get(metric.name + suffix)) is not None:
                return metric.value_text(value) if metric is ACCURACY else metric.titled_value(value)
    return phrases.UNKNOWN


def measurements_text(metrics: Mapping[str, float]) -> str:
    """Every measurement of a device's model, as one line."""
    return ", ".join(METRICS[n].titled_value(v) for n, v in metrics.items() if n in METRICS) or phrases.UNKNOWN


def _metric_chart(metric: Metric) -> tuple[str, str, dict[str, str], Any, str]:
    """The chart of a metric."""
    moments = {"received": "_before", "trained": "_after", "average": "_average", "measured": ""}
    curves = {label: metric.name + suffix for label, suffix in moments.items()}
    format_value, kind = (phrases.share_text, "share") if metric.is_share else (phrases.number_text, "")
    return metric.name, f"Local {metric.title}", curves, format_value, kind


# Charts of a device: key, title, metrics by the names of their curves, how a value is written, and its kind. A chart
# without any value is left out, so that this lists all that boards can measure.
_DEVICE_CHARTS: tuple[tuple[str, str, dict[str, str], Any, str], ...] = (
    *map(_metric_chart, METRICS.values()),
    (BLEND, "Received weights in the served model", {"share": BLEND}, phrases.share_text, "share"),
    ("times", "Time of a round's training", {"training": "train_seconds"}, phrases.seconds_text, "s"),
    ("step", "Time of a step and of a prediction", {"step": "step_seconds", "prediction": "latency_seconds"},
     phrases.seconds_text, "s"),
    ("memory", "Peak memory", {"peak": "peak_memory_bytes"}, phrases.size_text, "bytes"),
)  # fmt: skip


def coverage_strips(coverage: Row | None) -> list[Strip]:
    return [coverage_strip(g["name"], g["channels"], g["held"]) for g in (coverage or {}).get("groups", ())]


@dataclass(frozen=True)
class ChannelMap:
    """The `kept` channels, of `of`, of a group that a device holds.

    Attributes:
        known: Whether it is known which; otherwise the shape shows the first `kept`.
        path: The shape, in channels, as SVG.
        words: The channels as ranges, such as `0-3, 7`; empty if they are not known.
    """

    group: str
    kept: int
    of: int
    known: bool
    path: str
    words: str


def make_channel_map(group: str, kept: int, of: int, which: str | None) -> ChannelMap:
    """Lay out the channels of a group. `which` has a bit for each channel, the first bit highest, as hex; None if it is
    not known which are kept."""
    runs = None if which is None else list(_channel_runs(which, of))
    if runs is None or sum(n for _, n in runs) != kept:
        return ChannelMap(group, kept, of, known=False, path=_svg_path([(0, kept)] if kept else []), words="")
    words = [f"{first}-{first + n - 1}" if n > 1 else str(first) for first, n in runs[:MAX_RANGES]]
    if len(runs) > MAX_RANGES:
        words.append(f"and {len(runs) - MAX_RANGES} more ranges")
    return ChannelMap(group, kept, of, known=True, path=_svg_path(runs), words=", ".join(words))


def _channel_runs(which: str, of: int) -> Iterator[tuple[int, int]]:
    """Begin and length of each run of held channels."""
    bits = "".join(f"{int(digit, 16):04b}" for digit in which)[:of]
    at = bits.find("1")
    while at >= 0:
        end = bits.find("0", at)
        end = len(bits) if end < 0 else end
        yield at, end - at
        at = bits.find("1", end)


def _svg_path(runs: list[tuple[int, int]]) -> str:
    return "".join(f"M{at} 0h{n}v1h-{n}z" for at, n in runs)
