"""Pictures of every report and of every console page, and among them those of the documentation.

    python -m benchmarks.screens [--only REGEX] [--demo FOLDER] [--docs]

Every page is taken as a whole at the widths of a desk, a tablet and a phone, light and dark, with 3 and with 100
boards whose numbers are made up, into `build/screens`. `--docs` writes those that the documentation shows into
docs/images, cut at the bottom. `--demo` redraws the report of a finished demo from its records. It needs the extra
`dev` and a chromium.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from benchmarks.harness import ROOT
from benchmarks.shown_fleet import ShownFleet, made_up_run
from fedprune_export.cli.main import main as export
from fedprune_server.simulation.digits import digits_model
from fedprune_server.simulation.results.comparison import write_comparison
from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.results.report import write_report
from support.fakes.served_console import ServedConsole

MARGIN = 6
WIDTHS = {"desk": 1280, "tablet": 768, "phone": 390}
SCHEMES = ("light", "dark")
FLEETS = (3, 100)
CONSOLE = {
    "login": "/login", "overview": "/", "fleet": "/fleet", "device": "/devices/{busy}", "waiting": "/devices/{waiting}",
    "rounds": "/rounds", "rollouts": "/rollouts", "alerts": "/alerts", "audit": "/audit", "missing": "/devices/nobody",
}  # fmt: skip
"""Pages of the console."""

AUDITED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("login", {}, "ok"),
    ("approve", {"device": "mill-02", "key": "ab12-cd34-ef56-7890"}, "mill-02 is approved"),
    ("rollout_start", {"release": "release-12"}, "rollout 2 begins"),
)

DOCS = {
    **{
        f"console-{page}{suffix}": (f"console-{page}-100-{screen}", height)
        for page, heights in {
            "login": (420, 520, 520), "overview": (800, 900, 640), "fleet": (760, 760, 640),
            "device": (1100, 1100, 900),
            "rounds": (1440, 900, 900), "rollouts": (520, 620, 640),
            "alerts": (620, 700, 640), "audit": (420, 520, 640),
        }.items()
        for (suffix, screen), height in zip(
            (("", "desk-light"), ("-tablet", "tablet-dark"), ("-phone", "phone-light")), heights, strict=True
        )
    },
    "report-export": ("report-export-1-desk-light", 1600), "report-export-phone": ("report-export-1-phone-dark", 1000),
    "report-simulation": ("report-simulation-100-desk-dark", 1600),
    "report-simulation-phone": ("report-simulation-100-phone-light", 1000),
}  # fmt: skip
"""Pictures that docs/console.md, docs/export.md and docs/simulate.md show: of which page, and how much of it."""


def shoot(
    page: Path, to: Path, part: str = "main", *, width: int = 1100, dark: bool = False, most: float = 1600.0
) -> None:
    """Save a part of a page.

    Args:
        page: The HTML file.
        to: The picture.
        part: CSS selector of the part.
        width: Of the window, in pixels.
        dark: Whether in dark mode.
        most: Height of the picture, in pixels.
    """
    with chromium() as browser:
        window = browser.new_page(viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light")
        window.goto(page.resolve().as_uri())
        box = window.locator(part).first.bounding_box()
        if box is None:
            raise LookupError(f"{page} has no {part}")
        height = min(box["height"] + 2 * MARGIN, most)
        clip = {"x": max(0, box["x"] - MARGIN), "y": max(0, box["y"] - MARGIN), "width": box["width"] + 2 * MARGIN}
        raw = window.screenshot(full_page=True, clip={**clip, "height": height})
    save(raw, to)


def save(picture: bytes, to: Path, most: int | None = None) -> None:
    """Save a picture with a palette of 256 colours, cut to `most` rows."""
    with Image.open(io.BytesIO(picture)) as image:
        cut = image.crop((0, 0, image.width, min(image.height, most or image.height))).convert("RGB")
        cut.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(to, optimize=True)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


def logged_in(
    served: ServedConsole, browser: Browser, width: int, height: int, scheme: Any, known: bool = True
) -> Page:
    """A page of a browser in which the admin has logged in or, unless `known`, no operator."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
    )
    operator = served.console.accounts.get("admin")
    assert operator is not None
    if known:
        token = served.console.sessions.begin(operator, "127.0.0.1")
        context.add_cookies([{"name": served.console.around.cookie, "value": token, "url": served.url}])
    return context.new_page()


def console_screens(browser: Browser, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """Pictures of the console's pages, by name."""
    for devices in FLEETS:
        fleet = ShownFleet(devices)
        waiting = [n for n, row in fleet.rows.items() if row["status"] == "waiting"]
        names = {"busy": list(fleet.rows)[min(devices - 1, 8)], "waiting": waiting[0] if waiting else ""}
        pages = [page for page in CONSOLE if waiting or page != "waiting"]
        shots = [s for s in _screens("console", pages, devices) if wanted.search(s[0])]
        if not shots:
            continue
        with tempfile.TemporaryDirectory() as place, ServedConsole(Path(place), fleet) as served:
            for action, order, outcome in AUDITED:
                served.console.audit.note("ann", "192.0.2.7", action, order, outcome)
            for name, what, width, scheme in shots:
                page = logged_in(served, browser, width, 800, scheme, what != "login")
                served.write()  # else, on a slow machine, the server seems to be silent
                page.goto(served.url + CONSOLE[what].format(**names))
                if what not in ("login", "missing"):
                    page.wait_for_selector("#live[data-state=open]")
                expect(page.get_by_text("Asking the server")).to_have_count(0)
                page.wait_for_timeout(300)
                yield name, page.screenshot(full_page=True)
                page.context.close()


def report_screens(browser: Browser, wanted: re.Pattern[str], demo: Path | None) -> Iterator[tuple[str, bytes]]:
    """Pictures of the reports, by name."""
    with tempfile.TemporaryDirectory() as place:
        for (what, devices), path in reports(Path(place), demo).items():
            for name, _, width, scheme in _screens("report", (what,), devices):
                if wanted.search(name):
                    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
                    page.goto(path.as_uri())
                    yield name, page.screenshot(full_page=True)
                    page.close()


def reports(folder: Path, demo: Path | None) -> dict[tuple[str, int], Path]:
    """Every kind of report, by kind and number of boards."""
    (folder / "digits.onnx").write_bytes(digits_model())
    words = ["--target", "raspberry-pi-zero-2w", "--bytes-per-round", "300000", "--out", str(folder / "bundle")]
    if export([str(folder / "digits.onnx"), *words]):
        raise SystemExit("the export failed")
    made = {("export", 1): folder / "bundle" / "report.html"}
    for devices in FLEETS:
        run, whole = made_up_run("fedprune", devices), made_up_run("FedAvg", devices, whole=True)
        made["simulation", devices] = write_report(folder / f"run-{devices}", run, whole).html
        made["single", devices] = write_report(folder / f"single-{devices}", run).html
        runs = [run, whole, *(made_up_run(f"{n}, seed {s}", devices) for n in ("HeteroFL", "FedRolex") for s in (0, 1))]
        made["comparison", devices] = write_comparison(folder / f"all-{devices}", runs, (0.5, 0.8))
    if demo is not None:
        run, whole = Record.load(demo / "metrics.json"), Record.load(demo / "metrics-reference.json")
        made["demo", len(run.devices)] = write_report(folder / "demo", run, whole).html
    return made


def _screens(kind: str, pages: Iterable[str], devices: int) -> Iterator[tuple[str, str, int, Any]]:
    for what in pages:
        for screen, width in WIDTHS.items():
            for scheme in SCHEMES:
                yield f"{kind}-{what}-{devices}-{screen}-{scheme}", what, width, scheme


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="pictures whose names match this regular expression")
    parser.add_argument("--demo", type=Path, help="folder of a finished demo")
    parser.add_argument("--docs", action="store_true", help="only the documentation's, into docs/images")
    args = parser.parse_args()
    folder = ROOT / "build" / "screens"
    folder.mkdir(parents=True, exist_ok=True)
    shown = {of: (ROOT / "docs" / "images" / f"{name}.png", most) for name, (of, most) in DOCS.items()}
    wanted = re.compile("|".join(f"^{of}$" for of in shown) if args.docs else args.only)
    with chromium() as browser:
        for screens in (console_screens(browser, wanted), report_screens(browser, wanted, args.demo)):
            for name, picture in screens:
                to, most = shown[name] if args.docs else (folder / f"{name}.png", None)
                save(picture, to, most)
                print(f"{to}: {to.stat().st_size:,} bytes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
