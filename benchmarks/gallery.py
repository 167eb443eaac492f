"""The gallery: every command of the examples' pages, as it stands there, and what comes of it.

    FEDPRUNE_DATA=... OMP_NUM_THREADS=1 python -m benchmarks.gallery

Each example's folder is copied, and its README's commands run in the copy, one indented block after the other. Lines
that begin with a name and `$`, such as `jetson$`, are for another machine. The pictures that docs/gallery.md shows are
taken from the copies. With `--work FOLDER` the copies stay there, and the same command continues where it was cut off.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from benchmarks.harness import RESULTS, ROOT, parser, save, setting
from manual.pictures import stamp

EXAMPLES = ("clothes_on_pis", "motion_on_zeros", "vit_on_orins")
OWN = ("README.md", "*.py", "*.toml", "engine-*.json")
"""An example's own files."""

PICTURES = {
    "clothes_on_pis": {"data/boards.html": "clothes-boards", "runs/comparison.html": "clothes-curves"},
    "motion_on_zeros": {"runs/people.html": "motion-people"},
    "vit_on_orins": {"runs/comparison.html": "vit-curves"},
}
"""What docs/gallery.md shows, by where a run leaves it."""

MARGIN, MOST_ROWS, COLOURS = 6, 1600, 256
"""Of a picture: pixels around the part of a page that it shows, its height at most, and its palette."""

LAST = 3
"""Accuracies of global models are means over so many of the last rounds."""


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
    """Run a block of commands with bash, and this Python's programs; the first that fails ends it, by a RuntimeError
    with all that was printed. Returns that."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command, pipe = ["bash", "-c", f"set -euo pipefail\n{block}"], subprocess.PIPE
    done = subprocess.run(command, cwd=folder, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)
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
        "seconds": rounds[-1]["elapsed_s"],
        "devices": [
            {k: device[k] for k in ("name", "profile", "samples", "density", "bound", "parameters")}
            | {"memory_mb": device["compared"].get("peak_memory_bytes", [0])[0] / 1e6}
            | {"accuracy": local.get(device["name"])}
            for device in record["devices"]
        ],
    }


def shoot(page: Path, picture: Path, part: str) -> None:
    """Save the part of an HTML page that a CSS selector names, as Chromium shows it."""
    with sync_playwright() as playwright:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": 1100, "height": 800}, color_scheme="light")
        window.goto(page.resolve().as_uri())
        box = window.locator(part).first.bounding_box()
        if box is None:
            raise LookupError(f"{page} has no {part}")
        place = {"x": max(0, box["x"] - MARGIN), "y": max(0, box["y"] - MARGIN), "width": box["width"] + 2 * MARGIN}
        clip = {**place, "height": min(box["height"] + 2 * MARGIN, MOST_ROWS)}
        raw = window.screenshot(full_page=True, clip=clip)
        browser.close()
    with Image.open(io.BytesIO(raw)) as image:
        small = image.convert("RGB").quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        small.save(picture, optimize=True)


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


def main() -> None:
    command = parser(__doc__)
    command.add_argument("examples", nargs="*", default=EXAMPLES, help=f"of {', '.join(EXAMPLES)}; all by default")
    command.add_argument("--work", type=Path, help="keep the copies there, and continue with what it holds")
    options = command.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    stored = RESULTS / "gallery.json"
    kept = json.loads(stored.read_text())["examples"] if stored.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        for example in options.examples:
            kept[example] = measured(example, options.work or Path(scratch))
            body = {"setting": setting("onnxruntime", "torch"), "examples": {e: kept[e] for e in EXAMPLES if e in kept}}
            save(options.out or "gallery", body)


if __name__ == "__main__":
    main()
