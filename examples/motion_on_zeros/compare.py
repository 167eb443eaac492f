"""Each person's accuracy in the runs of a sweep, in order of the last: a table people.md and a picture people.png.

python compare.py runs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def last_accuracies(run: Path) -> dict[str, float]:
    """What each board was found to serve when it was last measured, on its own person's other recordings."""
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
    figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for (name, run), mark in zip(runs.items(), "os^D", strict=False):
        axis.plot(people, [100 * run[person] for person in people], mark, label=f"{name}: mean {means[name]:.1%}")
    axis.tick_params("x", rotation=90)
    axis.set_ylabel("accuracy, own other recordings, %")
    axis.grid(axis="y", alpha=0.3)
    axis.legend()
    figure.savefig(folder / "people.png", dpi=120)


if __name__ == "__main__":
    main()
