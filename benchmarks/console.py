"""The console in a browser: how long people wait for it.

`python -m benchmarks.console` serves a fleet that isn't there to a real Chromium, while a round runs on it, and
measures from the click to the frame that shows its effect. It needs the extra `dev` and a chromium.
"""

from __future__ import annotations

import random
import tempfile
import threading
from pathlib import Path

from playwright.sync_api import Page

from benchmarks.harness import parser, save, setting
from benchmarks.screens import chromium, logged_in
from support.fakes.console_fleet import ConsoleFleet
from support.fakes.served_console import ServedConsole

DEVICES = 10_000
TIMES = 60
STEP_S = 0.5
"""A server tells a console twice a second what has changed."""

SHOT = """(act) => new Promise((done) => {
  const began = performance.now();
  const drawn = () => requestAnimationFrame(() => setTimeout(() => done(performance.now() - began)));
  document.addEventListener("shown", drawn, { once: true });
  act();
})"""
"""Runs `act`, and says how many milliseconds later the frame was drawn that shows its effect."""


class RunningRound:
    """Tells a console twice a second what a fleet with a running round would."""

    def __init__(self, served: ServedConsole) -> None:
        self._served = served
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> RunningRound:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(STEP_S):
            self._served.fleet.step(self._served.writer)


def measure(devices: int, times: int) -> dict[str, list[float]]:
    """Milliseconds that each thing takes, one after the other, while a round runs."""
    fleet, chance, found = ConsoleFleet(devices), random.Random(0), {}
    with (
        tempfile.TemporaryDirectory() as folder,
        ServedConsole(Path(folder), fleet) as served,
        chromium() as browser,
    ):
        page = logged_in(served, browser, 1280, 800, "light")
        names = sorted(fleet.rows)
        page.goto(served.url + "/fleet")
        page.wait_for_selector("#live[data-state=open]")
        with RunningRound(served):
            columns = ["density", "measured", "seconds", "temperature_c", "seen_at", "state", "bytes_down"]
            found["sort"] = [shot(page, f"click('thead a[href*={chance.choice(columns)}]')") for _ in range(times)]
            states = ["training", "folded", "offline", ""]
            found["filter"] = [shot(page, f"choose('#f-state', {states[i % 4]!r})") for i in range(times)]
            page.goto(served.url + "/fleet")
            page.wait_for_selector("#live[data-state=open]")
            found["page"] = [shot(page, "click('a[rel=next]')") for _ in range(times)]
            found["search"] = [shot(page, f"fill('#f-q', {chance.choice(names)[:-1]!r})") for _ in range(times)]
            found["open"] = [opened(page, served.url, chance.choice(names)) for _ in range(times)]
    return found


def shot(page: Page, act: str) -> float:
    """Milliseconds from an act to the frame that shows what came of it."""
    helpers = """
      const one = (where) => document.querySelector(where);
      const click = (where) => one(where).click();
      const choose = (where, value) => {
        one(where).value = value;
        one(where).dispatchEvent(new Event("input", { bubbles: true }));
      };
      const fill = choose;
    """
    return float(page.evaluate(f"() => {{ {helpers} return ({SHOT})(() => {act}); }}"))


def opened(page: Page, url: str, name: str) -> float:
    """Milliseconds from the beginning of the way to a device's page until something of it is drawn."""
    page.goto(f"{url}/devices/{name}", wait_until="load")
    script = """() => new Promise((done) => {
      const seen = () => performance.getEntriesByName("first-contentful-paint")[0];
      const look = () => seen() ? done(seen().startTime) : setTimeout(look, 5);
      look();
    })"""
    return float(page.evaluate(script))


def quantile(values: list[float], share: float) -> float:
    """The value that so many are at most."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--devices", type=int, default=DEVICES)
    command.add_argument("--times", type=int, default=TIMES)
    options = command.parse_args()
    ms = measure(options.devices, options.times)
    rows = [{"what": what, "p50": quantile(v, 0.5), "p95": quantile(v, 0.95), "most": max(v)} for what, v in ms.items()]
    body = {"setting": setting(), "devices": options.devices, "times": options.times, "rows": rows}
    save(options.out or "console", {**body, "ms": {k: [round(x, 1) for x in v] for k, v in ms.items()}})


if __name__ == "__main__":
    main()
