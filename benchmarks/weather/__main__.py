"""The command: `python -m benchmarks.weather [--minutes 30] [--devices 20]`."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness import parser, save, setting
from benchmarks.weather.run import SQUALL, STORM, compare, verdict

NOISE = 0.03
"""By how much an accuracy of 449 digits may differ: one and a half standard errors."""

FETCHED = 1.3


def main() -> int:
    """Run both jobs; returns 1 where something is not as it should be."""
    command = parser(__doc__)
    command.set_defaults(minutes=30.0)  # how long the bad weather lasts
    command.add_argument("--devices", type=int, default=20, metavar="N", help="boards (default: 20)")
    command.add_argument("--squall", action="store_true", help="a milder one that shows something in a minute or two")
    options = command.parse_args()
    with TemporaryDirectory() as folder:
        weather = SQUALL if options.squall else STORM
        found = compare(Path(folder), options.devices, 60 * options.minutes, weather)
    faults = verdict(found, NOISE, FETCHED)
    save(options.out or "weather", {"setting": setting("onnxruntime", "paho-mqtt"), "found": found, "faults": faults})
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
