"""What code may weigh: the lines of each room of the product, and of the folders of tests, benchmarks and docs.

    python tests/support/room_lines.py check     compares tests/room_lines.json with the lines that there are
    python tests/support/room_lines.py record    writes the figures anew; totals fall to what was reached

A room has exactly the lines of its figure, so that a change which adds to one room takes as much from another, or from
the same, within the total of its kind. Totals only fall: `check` compares them with the committed file before.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORD = "tests/room_lines.json"

# Which files each kind counts, by the folder that they lie in.
KINDS = {
    "product": (("toolkit", "export", "device_runtime", "server"), "*.py"),
    "tests": (("tests",), "*.py"),
    "benchmarks": (("benchmarks",), "*.py"),
    "docs": (("docs",), "*.md"),
}

Rooms = dict[str, dict[str, int]]


def room_lines(root: Path = ROOT) -> Rooms:
    """Lines of each room, by kind. A room is a folder of the folders above; what lies beside it counts as `NAME/`."""
    rooms: Rooms = {}
    for kind, (folders, pattern) in KINDS.items():
        counts = Counter[str]()
        for path in (p for folder in folders for p in (root / folder).rglob(pattern) if "__pycache__" not in p.parts):
            names = path.relative_to(root).parts[1 if kind == "product" else 0 :]
            counts[f"{names[0]}/{names[1] if len(names) > 2 else ''}"] += len(path.read_bytes().splitlines())
        rooms[kind] = dict(sorted(counts.items()))
    return rooms


def differences(record: dict[str, Any], rooms: Rooms, before: dict[str, Any] | None = None) -> list[str]:
    """Where the rooms and their record, or its totals and those `before`, break the rules; a line each."""
    lines = []
    for kind, total in record["totals"].items():
        figures, counts = record["rooms"][kind], rooms[kind]
        for room in sorted(figures.keys() | counts.keys()):
            count, figure = counts.get(room, 0), figures.get(room, 0)
            if count > figure:
                lines.append(
                    f"{room}: {count} lines, its figure is {figure}: take {count - figure} away, here or elsewhere"
                )
            elif count < figure:
                lines.append(f"{room}: {count} lines, {figure - count} fewer than its figure: record it")
        if sum(figures.values()) > total:
            lines.append(f"{kind}: the rooms' figures add up to {sum(figures.values())}, at most {total} are allowed")
        if before is not None and total > before["totals"].get(kind, total):
            lines.append(f"{kind}: the total was {before['totals'][kind]} and may not rise to {total}")
    return lines


def new_record(record: dict[str, Any], rooms: Rooms) -> dict[str, Any]:
    """The record of these rooms, whose totals are at most those of `record`."""
    totals = {kind: min(record["totals"].get(kind, sum(r.values())), sum(r.values())) for kind, r in rooms.items()}
    return {"totals": totals, "rooms": rooms}


def committed_record(text: str) -> dict[str, Any] | None:
    """The newest committed record that is not `text`; None without git or without such a commit."""
    command = ["git", "-C", str(ROOT), "log", "-n", "2", "--format=%H", "--", RECORD]
    for commit in subprocess.run(command, capture_output=True, text=True, check=False).stdout.split():
        shown = subprocess.run(["git", "-C", str(ROOT), "show", f"{commit}:{RECORD}"], capture_output=True, check=False)
        if shown.returncode == 0 and shown.stdout.decode() != text:
            return dict(json.loads(shown.stdout))
    return None


def main(arguments: list[str]) -> int:
    path, rooms = ROOT / RECORD, room_lines()
    text = path.read_text() if path.exists() else '{"totals": {}, "rooms": {}}'
    if arguments == ["record"]:
        path.write_text(json.dumps(new_record(json.loads(text), rooms), indent=1) + "\n")
        arguments, text = ["check"], path.read_text()
    if arguments != ["check"]:
        print(__doc__)
        return 2
    lines = differences(json.loads(text), rooms, committed_record(text))
    print("\n".join(lines), end="\n" if lines else "")
    if lines:
        print(f"{RECORD} doesn't fit: a new line is paid by an old one. When it is, `{Path(sys.argv[0]).name} record`.")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
