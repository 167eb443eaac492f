"""Training waits while the board is hot, and no longer; a stop is heard at any time."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import ConfigError
from fedprune_device.hardware.thermal_guard import ThermalGuard

pytestmark = pytest.mark.board


def board(root: Path, celsius: float | None = None, flags: str | None = None) -> Path:
    zone, firmware = root / "sys/class/thermal/thermal_zone0", root / "sys/devices/platform/soc/soc:firmware"
    for folder in (zone, firmware):
        folder.mkdir(parents=True, exist_ok=True)
    if celsius is not None:
        (zone / "type").write_text("cpu-thermal\n")
        (zone / "temp").write_text(f"{int(celsius * 1000)}\n")
    if flags is not None:
        (firmware / "get_throttled").write_text(flags)
    return root


class Weather:
    """Time that passes by waiting, and a temperature that follows a list."""

    def __init__(self, root: Path, later: list[float]) -> None:
        self.root = root
        self.later = later
        self.now = 0.0
        self.waits = 0

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.waits += 1
        if self.later:
            board(self.root, self.later.pop(0))

    def care(self) -> ThermalGuard:
        return ThermalGuard(80, 70, root=self.root, clock=lambda: self.now, sleep=self.sleep)


def test_training_waits_above_the_limit_and_goes_on_below_the_other(tmp_path: Path) -> None:
    weather = Weather(board(tmp_path, 81), [79, 75, 70, 69.9, 20])
    care = weather.care()
    assert not care.pause(lambda: False)
    assert weather.waits == 4, "79, 75 and 70 °C are still too warm to go on"
    assert care.paused_seconds == 4
    assert care.pause_reason == ""


@pytest.mark.parametrize("flags", ["50001", "0x50001\n"])
def test_low_voltage_waits_and_what_was_once_does_not(tmp_path: Path, flags: str) -> None:
    weather = Weather(board(tmp_path, 40, flags), [])
    care = weather.care()
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        if len(asked) == 5:
            board(tmp_path, flags="50000")
        return False

    assert not care.pause(stop)
    assert weather.waits >= 1
    weather.now += 10
    before = weather.waits
    assert not care.pause(stop)
    assert weather.waits == before


@given(st.integers(1, 50))
def test_a_stop_ends_the_wait_at_once(tmp_path_factory: pytest.TempPathFactory, after: int) -> None:
    weather = Weather(board(tmp_path_factory.mktemp("hot"), 95), [])
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > after

    assert weather.care().pause(stop) is (len(asked) > after)
    assert weather.waits <= after


@pytest.mark.parametrize(("hot", "cool"), [(80, 80), (0, -1), (200, 20), (float("nan"), 20)])
def test_limits_that_would_flutter_or_never_end_are_refused(hot: float, cool: float) -> None:
    with pytest.raises(ConfigError, match="pause training"):
        ThermalGuard(hot, cool)
