"""The gallery: every command of the examples' pages, as it stands there, and what comes of it.

    FEDPRUNE_DATA=... OMP_NUM_THREADS=1 python -m benchmarks.gallery

Each example's folder is copied, and its README's commands run in the copy, one indented block after the other. Lines
that begin with a name and `$`, such as `jetson$`, are for another machine. The pictures that docs/gallery.md shows are
taken from the copies. With `--work FOLDER` the copies stay there, and the same command continues where it was cut off.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.screens import shoot
from benchmarks.synthetic_nets import setting, write
from manual.pictures import stamp

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ("clothes_on_pis", "motion_on_zeros", "vit_on_orins")
OWN = ("README.md", "*.py", "*.toml", "engine-*.json")
"""An example's own files."""

PICTURES = {
    "clothes_on_pis": {"data/boards.html": "clothes-boards", "runs/comparison.html": "clothes-curves"},
    "motion_on_zeros": {"runs/people.html": "motion-people"},
    "vit_on_orins": {"runs/comparison.html": "vit-curves"},
}
"""What docs/gallery.md shows, by where a run leaves it."""

FIRST = ("fedprune-0", "shared-0", "frozen-0")
"""The runs of what an example shows; the others are there to be compared with."""

LAST = 3
"""Accuracies of global models are means over so many of the last rounds."""

_ABOUT = """
Accuracies in percent: *global*, of the server's model on the server's samples, mean of the last {last} rounds; *local*,
of the boards' own models on their own test samples, each as measured last, mean over those that delivered; *worst*, the
least of these. MB: both ways, all boards and rounds. s: simulated. `docs/gallery.md` says what all of it means.
"""


def blocks(page: str) -> list[str]:
    """The commands of a page: its indented blocks, in order, without those that change the folder or run elsewhere."""
    found = (re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in re.findall(r"(?:^    .*\n)+", page, re.M))
    return [block for block in found if not re.match(r"cd |[a-z]+\$ ", block)]


def commands(block: str) -> list[str]:
    """A block's commands one by one, or all at once where they belong together, as those of a loop do."""
    if re.search(r"^for |&$", block, re.M):
        return [block]
    return [line + "\n" for line in re.split(r"(?<!\\)\n", block) if line]


def copied(example: str, work: Path) -> Path:
    """A copy of an example's own files to run it with; what a user's runs have left beside them is not copied."""
    folder = work / example
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in OWN:
        for file in (ROOT / "examples" / example).glob(pattern):
            shutil.copyfile(file, folder / file.name)
    return folder


def run(block: str, folder: Path) -> str:
    """Run a block of commands with bash, and this Python's programs; the first that fails ends it.

    Returns:
        What it printed.

    Raises:
        RuntimeError: A command failed; the message has all that was printed.
    """
    script = f"set -euo pipefail\n{block}"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode} in {folder}:\n{block}\n{done.stdout}")
    return done.stdout


def outcome(record: dict[str, Any]) -> dict[str, Any]:
    """What a run came to, from its metrics.json."""
    rounds, local = record["rounds"], {}
    for row in rounds:
        local.update(row["local"])
    last = [row["accuracy"] for row in rounds[-LAST:]]
    return {
        "rounds": len(rounds),
        "global": sum(last) / len(last),
        "local": sum(local.values()) / len(local),
        "worst": min(local.values()),
        "delivered": len(local),
        "mb": (rounds[-1]["down"] + rounds[-1]["up"]) / 1e6,
        "seconds": rounds[-1]["at"],
        "devices": [_device(device, local) for device in record["devices"]],
    }


def _device(device: dict[str, Any], local: dict[str, float]) -> dict[str, Any]:
    planned = {k: device[k] for k in ("name", "profile", "samples", "density", "bound", "parameters")}
    memory = device["compared"].get("peak_memory_bytes", [0])[0] / 1e6
    return {**planned, "memory_mb": memory, "accuracy": local.get(device["name"])}


def measured(example: str, work: Path) -> dict[str, Any]:
    """Run an example; what was printed per command, and the outcome of every simulation."""
    folder = copied(example, work)
    done = folder / "done.json"
    told = json.loads(done.read_text()) if done.exists() else {}
    for block in blocks((folder / "README.md").read_text()):
        for command in commands(block):
            if command not in told:
                told[command] = run(command, folder).splitlines()
                done.write_text(json.dumps(told))
                print(command, *told[command], sep="\n", flush=True)
    records = {p.parent.name: json.loads(p.read_text()) for p in sorted(folder.glob("runs/*/metrics.json"))}
    runs = {name: outcome(record) for name, record in records.items()}
    for source, name in PICTURES[example].items():
        part = "#curves" if source == "runs/comparison.html" else "main"
        picture = ROOT / "docs" / "images" / f"gallery-{name}.png"
        shoot(folder / source, picture, part)
        stamp(picture, runs)
    return {"said": told, "runs": runs}


def page(body: dict[str, Any]) -> str:
    """The results as Markdown."""
    at = body["setting"]
    lines = [
        "# The gallery's examples",
        "",
        f"{at['date']}, {at['cpu']}, {at['cores']} cores (one used; load {at['load']} at the end),",
        f"Python {at['python']}, numpy {at['numpy']}, onnxruntime {at['onnxruntime']}, torch {at['torch']}.",
        "`python -m benchmarks.gallery`: the simulations of the examples' pages, one seed.",
        _ABOUT.format(last=LAST).rstrip(),
    ]
    for example, found in body["examples"].items():
        lines += ["", f"## {example}", "", *_runs(found["runs"]), "", *_boards(found["runs"])]
    return "\n".join(lines) + "\n"


def _runs(runs: dict[str, Any]) -> list[str]:
    lines = ["| run | rounds | boards that delivered | global | local | worst | MB | s |", "|---" * 8 + "|"]
    for name, row in runs.items():
        shares = " | ".join(f"{100 * row[k]:.1f}" for k in ("global", "local", "worst"))
        boards = f"{row['delivered']} of {len(row['devices'])}"
        lines.append(f"| {name} | {row['rounds']} | {boards} | {shares} | {row['mb']:.1f} | {row['seconds']:.0f} |")
    return lines


def _boards(runs: dict[str, Any]) -> list[str]:
    """Every board's plan in the example's own run, and its accuracy in all."""
    titles = ["board", "profile", "samples", "density", "bound by", "memory, MB", *runs]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    own = next(runs[name] for name in FIRST if name in runs)
    for place, device in enumerate(own["devices"]):
        planned = [device["name"], device["profile"], device["samples"], f"{device['density']:.2f}", device["bound"]]
        accuracies = [run["devices"][place]["accuracy"] for run in runs.values()]
        shown = ["–" if a is None else f"{100 * a:.1f}" for a in accuracies]
        memory = f"{device['memory_mb']:.0f}"
        lines.append(f"| {' | '.join(map(str, [*planned, memory, *shown]))} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the gallery's examples and write what came of them.")
    parser.add_argument("examples", nargs="*", default=EXAMPLES, help=f"of {', '.join(EXAMPLES)}; all by default")
    parser.add_argument("--work", type=Path, help="keep the copies there, and continue with what it holds")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    where = ROOT / "benchmarks" / "results" / "gallery.json"
    kept = json.loads(where.read_text())["examples"] if where.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        for example in chosen.examples:
            kept[example] = measured(example, chosen.work or Path(scratch))
            body = {"setting": setting("onnxruntime", "torch"), "examples": {e: kept[e] for e in EXAMPLES if e in kept}}
            write("gallery", body, page(body))
    return 0


if __name__ == "__main__":
    sys.exit(main())
