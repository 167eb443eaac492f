"""Reports in a real browser: nothing is wider than a phone, axe finds nothing, legends and searches work."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode
from fedprune.jobs.job import Job
from fedprune_export.cli.main import main
from fedprune_server.monitoring.round_rows import RoundRow
from fedprune_server.simulation.datasets.fleet_data import FleetData
from fedprune_server.simulation.digits import digits_model
from fedprune_server.simulation.results.comparison import write_comparison
from fedprune_server.simulation.results.record import DeviceRow, Record
from fedprune_server.simulation.results.report import write_report
from support.processes.machine import find_chromium

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
Axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed").Axe

pytestmark = pytest.mark.browser

GROUPS = (("stage1.block0.downsample.conv", 16), ("stage2.block1.conv2", 64))


def run(title: str, devices: int = 100) -> Record:
    names = [f"raspberry-pi-in-the-barn-{i:03}" for i in range(devices)]
    chance = random.Random(title)
    rounds = tuple(
        RoundRow(
            n, 30.0 * n, "a" * 64, {"accuracy": n / 10, "loss": 1.0}, {m: chance.random() for m in names},
            devices, 4_000_000 * n, 3_000_000 * n, updates=devices,
            coverage=[[devices // (1 + c) for c in range(s)] for _, s in GROUPS],
        )
        for n in range(1, 9)
    )  # fmt: skip
    rows = tuple(DeviceRow(n, "raspberry-pi-zero-2w", 100, (8, 32), 0.5, "memory", 12_345) for n in names)
    channels = {n: (tuple(range(8)), tuple(range(32))) for n in names}
    counts = {n: tuple(chance.randrange(50) for _ in range(10)) for n in names}
    return Record(title, Job().to_dict(), GROUPS, rows, rounds, channels, partition=FleetData("digits", (), counts))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    (folder / "digits.onnx").write_bytes(digits_model())
    words = ["--target", "raspberry-pi-5", "--density", "0.5", "--out", str(folder / "bundle")]
    assert main([str(folder / "digits.onnx"), *words]) == ExitCode.OK
    runs = [replace(run(f"run {i}", 3), title=f"run {i}") for i in range(25)]
    return {
        "export": folder / "bundle" / "report.html",
        "simulation": write_report(folder / "run", run("fedprune"), run("FedAvg")),
        "comparison": write_comparison(folder / "all", runs, (0.5,)),
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: sync_api.Browser) -> Iterator[sync_api.Page]:
    made, wrong = browser.new_page(viewport={"width": 390, "height": 800}), list[str]()
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.on("console", lambda said: wrong.append(said.text))
    yield made
    made.close()
    assert wrong == []


@pytest.mark.parametrize("name", ["export", "simulation", "comparison"])
def test_a_report_can_be_read_by_everybody_on_a_phone(pages: dict[str, Path], page: sync_api.Page, name: str) -> None:
    page.goto(pages[name].as_uri())
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        assert "dark" not in page.inner_text("main")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    cut = """[...document.querySelectorAll('.bars .name, .bars .note, h1, h2, .facts dd, button.key')]
        .filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline').length"""
    assert page.evaluate(cut) == 0
    overlaps = """[...document.querySelectorAll('ul.bars')].flatMap(list => {
        const boxes = [...list.children].map(e => e.getBoundingClientRect());
        return boxes.slice(1).filter((b, i) => b.top < boxes[i].bottom - 0.5);
    }).length"""
    assert page.evaluate(overlaps) == 0
    if name != "comparison":  # its tables have eight columns, and scroll
        beyond = """[...document.querySelectorAll('.table:not(.long, details *)')]
            .filter(e => e.scrollWidth > e.clientWidth).map(e => e.getAttribute('aria-label'))"""
        assert page.evaluate(beyond) == []
