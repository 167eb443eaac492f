"""The command: `python -m benchmarks.swarm [--devices 100 1000 10000]`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness import save, setting
from benchmarks.swarm.run import Size, measure
from benchmarks.swarm.site import find_mosquitto

SIZES = (100, 1_000, 10_000)


def main() -> int:
    """Run the sizes; returns 1 where an update was lost or counted twice."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.swarm", description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=SIZES, metavar="N", help="sizes of the fleet")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="rounds of each (default: 1)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of predicted training times (default: 1)")
    parser.add_argument("--arrivals", type=float, default=500.0, help="devices that connect in a second (default: 500)")
    parser.add_argument("--pulls", type=int, default=4, metavar="N", help="the server's setting `pulls` (default: 4)")
    parser.add_argument("--limit", type=float, default=3600.0, metavar="S", help="give a size up after so long")
    parser.add_argument("--engines", action="store_true", help="PostgreSQL has the state, and a bucket the updates")
    parser.add_argument("--signed", action="store_true", help="each size once more, with signatures and TLS")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the records there, and leave the results alone")
    options = parser.parse_args()
    rows = []
    for devices in options.devices:
        timing = options.scale, options.arrivals, options.pulls, options.limit
        for signed in (False, True) if options.signed else (False,):
            size = Size(devices, options.rounds, *timing, engines=options.engines, signed=signed)
            with TemporaryDirectory() as folder:
                rows.append(measure(size, Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
    said = subprocess.run([find_mosquitto(), "-h"], capture_output=True, text=True, check=False).stdout.split()
    about = setting("paho-mqtt", "SQLAlchemy") | {"broker": f"Mosquitto {said[2]}"}
    settings = {name: getattr(options, name) for name in ("devices", "scale", "arrivals", "pulls", "engines", "signed")}
    save(options.out or "swarm", {"setting": about, "settings": settings, "rows": rows})
    return int(any(row["audit"]["faults"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
