"""Reads the kernel's reports on this board and this process: memory, clock, temperature, voltage."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

from fedprune.planning.identification import BoardFacts
from fedprune.planning.jetpack_releases import TEGRA_RELEASE, l4t_release

# Bit 0 of `firmware_flags`.
UNDER_VOLTAGE = 1

# A device tree comes with the board's firmware: its entries and their number are bounded before they are sent or shown.
_MAX_ENTRY_LENGTH = 200
_MAX_ENTRIES = 20

_STATUS = Path("/proc/self/status")


def read_board_facts(root: Path = Path("/")) -> BoardFacts:
    total, _ = memory(root)
    entries = _text(root / "proc/device-tree/compatible").split("\0")
    return BoardFacts(
        model=board_model(root),
        compatible=tuple(e.strip()[:_MAX_ENTRY_LENGTH] for e in entries if e.strip())[:_MAX_ENTRIES],
        l4t=l4t_release(_text(root / TEGRA_RELEASE.relative_to("/"))),
        memory_total=total,
        clock_hz=clock_hz(root),
    )


def memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes of main memory, in all and available; a control group's limit counts as memory."""
    rows = dict(line.partition(":")[::2] for line in _text(root / "proc/meminfo").splitlines())
    total, available = (int((rows.get(k, "").split() or ["0"])[0]) * 1024 for k in ("MemTotal", "MemAvailable"))
    limit = _text(root / "sys/fs/cgroup/memory.max")
    if limit.isdigit() and int(limit) < total:
        used = _text(root / "sys/fs/cgroup/memory.current")
        total = int(limit)
        available = min(available, total - int(used) if used.isdigit() else total)
    return max(total, 2**20), max(available, 0)


def board_model(root: Path = Path("/")) -> str:
    return _text(root / "proc/device-tree/model").rstrip("\0")[:200]


def clock_hz(root: Path = Path("/")) -> int | None:
    """The highest clock of any core, from the kernel and not from the board's name. A 1.25 GHz edition of the Raspberry
    Pi 4 looks like the others: https://github.com/geerlingguy/sbc-reviews/issues/110."""
    # PCs' virtual machines have no cpufreq: there /proc/cpuinfo says the clock at this moment.
    files = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/cpuinfo_max_freq")
    clocks = [int(text) * 1000 for text in map(_text, files) if text.isdigit()]
    if not clocks:
        lines = _text(root / "proc/cpuinfo").splitlines()
        texts = [line.partition(":")[2].strip() for line in lines if line.startswith("cpu MHz")]
        clocks = [int(float(text) * 1e6) for text in texts if text.replace(".", "", 1).isdigit()]
    top = max(clocks, default=0)
    return top if 10**6 <= top <= 10**11 else None


def temperature_c(root: Path = Path("/")) -> float | None:
    """The hottest thermal zone of the processor or, without one, of the board; None if none can be read."""
    zones: dict[bool, list[float]] = {True: [], False: []}
    for zone in (root / "sys/class/thermal").glob("thermal_zone*"):
        text = _text(zone / "temp")
        # Sensors that are off report impossible values.
        if text.lstrip("-").isdigit() and -80_000 <= int(text) <= 200_000:
            zones["cpu" in _text(zone / "type").lower()].append(int(text) / 1000)
    return max(zones[True] or zones[False], default=None)


def is_throttled(root: Path = Path("/")) -> bool:
    """Whether the kernel reports that heat or low voltage slows the board down now."""
    if firmware_flags(root) & 0xF:
        return True
    for cooler in (root / "sys/class/thermal").glob("cooling_device*"):
        state = _text(cooler / "cur_state")
        if "cpufreq" in _text(cooler / "type") and state.isdigit() and int(state) > 0:
            return True
    return False


def firmware_flags(root: Path = Path("/")) -> int:
    """The faults that a Raspberry Pi's firmware reports, now and since boot (`get_throttled`); 0 on other boards.

    Bits 0 to 3: low voltage, clock capped, throttled, soft temperature limit; bits 16 to 19 the same since boot:
    https://www.raspberrypi.com/documentation/computers/os.html#vcgencmd.
    """
    path = root / "sys/devices/platform/soc/soc:firmware/get_throttled"
    try:
        return int(path.read_text(encoding="ascii", errors="replace").strip().removeprefix("0x")[:8] or "0", 16)
    except (OSError, ValueError):
        return 0


def power_mode(root: Path = Path("/")) -> int | None:
    """The number of a Jetson's power mode, as nvpmodel keeps it; None on other boards."""
    try:
        text = (root / "var/lib/nvpmodel/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    digits = text.partition("pmode:")[2][:4]
    return int(digits) if digits.isdigit() else None


def condition_text(root: Path = Path("/")) -> str:
    temperature, flags, mode = temperature_c(root), firmware_flags(root), power_mode(root)
    texts = ["temperature unknown" if temperature is None else f"{temperature:.0f} °C"]
    texts += ["slowed down"] if is_throttled(root) else []
    texts += ["low voltage since boot"] if flags >> 16 & UNDER_VOLTAGE else []
    texts += [] if mode is None else [f"power mode {mode}"]
    return ", ".join(texts)


def peak_memory() -> float:
    """The peak memory of this process in bytes, from its start or from `reset_peak_memory` on.

    getrusage, the fallback, also counts the process before it became this program: the size of whatever started it.
    """
    peak = _status_bytes("VmHWM")
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if peak is None else peak)


def reset_peak_memory() -> None:
    """Reset the peak to the present memory, so that a round's peak is its own and not an earlier round's.

    A kernel without `clear_refs` goes on counting from the process's start: then a peak may be too high.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def unreclaimable_memory() -> int:
    """Bytes of this process that the kernel can't take back, as it can pages of files."""
    return _status_bytes("RssAnon") or 0


def resident_memory() -> int | None:
    """Bytes of memory of this process; None where the kernel doesn't report it."""
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
