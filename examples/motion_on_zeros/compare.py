"""Each person's accuracy in the runs of a sweep, in order of the last: a table people.md and a page people.html.

python compare.py runs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedprune.output.chart import series_classes
from fedprune.output.page import Bar, bars_html, colour_legend, page_html


def last_accuracies(run: Path) -> dict[str, float]:
    """Accuracy of each board's served model at its last measurement, on its own person's other recordings."""
    found: dict[str, float] = {}
    for row in json.loads((run / "metrics.json").read_text())["rounds"]:
        found.update(row["local"])
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    runs = {run.name.removesuffix("-0"): last_accuracies(run) for run in sorted(folder.glob("*-0"))}
    alone = runs["alone"]
    people = sorted(alone, key=lambda person: alone[person])
    lines = [f"| person | {' | '.join(runs)} |", "|---|" + "---:|" * len(runs)]
    lines += [f"| {person} | {' | '.join(f'{run[person]:.1%}' for run in runs.values())} |" for person in people]
    means = {name: sum(run.values()) / len(run) for name, run in runs.items()}
    lines.append(f"| mean | {' | '.join(f'{mean:.1%}' for mean in means.values())} |")
    (folder / "people.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    rows = [
        Bar(
            person,
            [
                (f"part {series_classes(i)}", max(0.0, run[person] - 0.006), run[person])
                for i, run in enumerate(runs.values())
            ],
            ", ".join(f"{run[person]:.0%}" for run in runs.values()),
        )
        for person in people
    ]
    legend = colour_legend([f"{name}: mean {mean:.1%}" for name, mean in means.items()])
    page = page_html("Accuracy of each person", [legend, bars_html(rows, "Accuracy of each person")])
    (folder / "people.html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
