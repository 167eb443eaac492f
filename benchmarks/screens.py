"""The documentation's pictures of reports and of the console: `python -m benchmarks.screens [--only REGEX]`.

Numbers of 100 boards are made up. Every page is taken as a whole, cut at the bottom, and written into docs/images. It
needs the extra `dev` and a chromium.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from benchmarks.harness import ROOT
from benchmarks.shown_fleet import ShownFleet, made_up_run
from fedprune_export.cli.main import main as export
from fedprune_server.simulation.digits import digits_model
from fedprune_server.simulation.results.report import write_report
from support.fakes.served_console import ServedConsole

MARGIN, BOARDS = 6, 100
IMAGES = ROOT / "docs" / "images"
SCREENS = {"": (1280, "light"), "-tablet": (768, "dark"), "-phone": (390, "light")}
"""Width in pixels and colour scheme, by what pictures' names end with."""

CONSOLE = {
    "login": ("/login", (420, 520, 520)), "overview": ("/", (800, 900, 640)), "fleet": ("/fleet", (760, 760, 640)),
    "device": ("/devices/{busy}", (1100, 1100, 900)), "rounds": ("/rounds", (1440, 900, 900)),
    "rollouts": ("/rollouts", (520, 620, 640)), "alerts": ("/alerts", (620, 700, 640)),
    "audit": ("/audit", (420, 520, 640)),
}  # fmt: skip
"""Pages of the console, with the heights of their pictures."""

REPORTS = {
    "report-export": ("export", 1280, "light", 1600), "report-export-phone": ("export", 390, "dark", 1000),
    "report-simulation": ("simulation", 1280, "dark", 1600),
    "report-simulation-phone": ("simulation", 390, "light", 1000),
}  # fmt: skip
"""Pictures of reports: of which, width, colour scheme and height."""

AUDITED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("login", {}, "ok"),
    ("approve", {"device": "mill-02", "key": "ab12-cd34-ef56-7890"}, "mill-02 is approved"),
    ("rollout_start", {"release": "release-12"}, "rollout 2 begins"),
)


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


def console_screens(browser: Browser, wanted: re.Pattern[str]) -> None:
    """Take pictures of the console's pages."""
    fleet = ShownFleet(BOARDS)
    with tempfile.TemporaryDirectory() as place, ServedConsole(Path(place), fleet) as served:
        for action, order, outcome in AUDITED:
            served.console.audit.note("ann", "192.0.2.7", action, order, outcome)
        for what, (path, heights) in CONSOLE.items():
            for (suffix, (width, scheme)), height in zip(SCREENS.items(), heights, strict=True):
                name = f"console-{what}{suffix}"
                if not wanted.search(name):
                    continue
                page = logged_in(served, browser, width, 800, scheme, what != "login")
                served.write()  # else, on a slow machine, the server seems to be silent
                page.goto(served.url + path.format(busy=list(fleet.rows)[8]))
                if what != "login":
                    page.wait_for_selector("#live[data-state=open]")
                expect(page.get_by_text("Asking the server")).to_have_count(0)
                page.wait_for_timeout(300)
                save(page.screenshot(full_page=True), IMAGES / f"{name}.png", height)
                page.context.close()


def report_screens(browser: Browser, wanted: re.Pattern[str]) -> None:
    """Take pictures of the reports."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "digits.onnx").write_bytes(digits_model())
        words = ["--target", "raspberry-pi-zero-2w", "--bytes-per-round", "300000", "--out", str(folder / "bundle")]
        if export([str(folder / "digits.onnx"), *words]):
            raise SystemExit("the export failed")
        run, reference = made_up_run("fedprune", BOARDS), made_up_run("FedAvg", BOARDS, whole=True)
        simulation = write_report(folder / "run", run, reference).html
        pages = {"export": folder / "bundle" / "report.html", "simulation": simulation}
        for name, (what, width, scheme, height) in REPORTS.items():
            if wanted.search(name):
                page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
                page.goto(pages[what].as_uri())
                save(page.screenshot(full_page=True), IMAGES / f"{name}.png", height)
                page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=re.compile, default="", help="pictures whose names match this expression")
    wanted = re.compile(parser.parse_args().only)
    with chromium() as browser:
        console_screens(browser, wanted)
        report_screens(browser, wanted)


if __name__ == "__main__":
    main()
