"""Rules for all tests: what is skipped where, and how loudly."""

import gc
import os
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from support.push_ring import RingRecorder, slow_tests

_SYSTEM = Path(__file__).parent / "system"


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until all tests are collected: little of what that makes is garbage
    if path := os.environ.get("FEDPRUNE_RECORD"):
        config.pluginmanager.register(RingRecorder(Path(path), writes=not hasattr(config, "workerinput")))
    # Tests kill processes, never the machine: nothing has to reach the disk.
    os.fsync = os.fdatasync = lambda descriptor: None
    if find_spec("hypothesis"):
        import hypothesis

        # An example's time says more about its neighbours than about the code.
        hypothesis.settings.register_profile("no deadline", deadline=None)
        hypothesis.settings.load_profile("no deadline")


@pytest.hookimpl(tryfirst=True)  # before anything changes their order
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _leave_to_soaks(items)
    if most := os.environ.get("FEDPRUNE_EXAMPLES"):
        _limit_examples(items, int(most))
    slow = slow_tests()
    for item in items:
        if item.nodeid in slow or _SYSTEM in item.path.parents:
            item.add_marker(pytest.mark.slow)
    if os.environ.get("FEDPRUNE_DATA"):
        return
    for item in items:
        if item.get_closest_marker("data"):
            item.add_marker(pytest.mark.skip(reason="FEDPRUNE_DATA is not set: no real data here"))


def pytest_collection_finish() -> None:
    """Leave the collected tests out of what the garbage collector goes through again and again."""
    gc.freeze()
    gc.enable()


def pytest_sessionstart(session: pytest.Session) -> None:
    if getattr(session.config.option, "numprocesses", 0):  # this process leaves collecting to its workers
        gc.enable()


def _leave_to_soaks(items: list[pytest.Item]) -> None:
    """Mark the cases of a test beyond those that a push runs."""
    counts = Counter[str]()
    for item in items:
        if (mark := item.get_closest_marker("at_push")) is not None:
            test = item.nodeid.partition("[")[0]
            counts[test] += 1
            if counts[test] > mark.args[0]:
                item.add_marker(pytest.mark.soak)


def _limit_examples(items: list[pytest.Item], most: int) -> None:
    """Try no property with more examples than these: where all of them are tried elsewhere, as under another Python."""
    import hypothesis

    def limited(held: hypothesis.settings) -> hypothesis.settings:
        return hypothesis.settings(held, max_examples=min(held.max_examples, most))

    for item in items:
        if not isinstance(item, pytest.Function) or not hypothesis.is_hypothesis_test(item.obj):
            continue
        if item.cls is not None and hasattr(item.cls, "settings"):  # the test of a state machine
            item.cls.settings = limited(item.cls.settings)
        else:  # Hypothesis has no public place for the settings of what is decorated already
            item.function._hypothesis_internal_use_settings = limited(item.function._hypothesis_internal_use_settings)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("torch") and find_spec("torch") and find_spec("onnxscript"):
        from support.nets.exporter import keep_translations

        keep_translations()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    missing = [name for name, why in _skips(terminalreporter) if "FEDPRUNE_DATA" in why]
    if missing:
        terminalreporter.section("tests that need real data did not run")
        terminalreporter.line(f"{len(missing)} tests need FEDPRUNE_DATA:")
        for name in missing:
            terminalreporter.line(f"  {name}")


# A test may be skipped for these reasons even where everything is meant to be there.
_MAY_BE_MISSING = ("FEDPRUNE_DATA", "can be mounted here", "can't be had here")


def _skips(reporter: pytest.TerminalReporter) -> Iterator[tuple[str, str]]:
    for report in reporter.stats.get("skipped", []):
        longrepr = report.longrepr
        yield report.nodeid, str(longrepr[2] if isinstance(longrepr, tuple) else longrepr)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a skipped test is a failed one: an oracle that isn't installed must not go unnoticed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("CI") or reporter is None:
        return
    lost = [(n, why) for n, why in _skips(reporter) if not any(m in why for m in _MAY_BE_MISSING)]
    for name, why in lost:
        reporter.write_line(f"SKIPPED IN CI: {name}: {why}", red=True)
    if lost and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def data_dir() -> Path:
    """Where the real data sets lie; only for tests marked `data`."""
    return Path(os.environ["FEDPRUNE_DATA"])
