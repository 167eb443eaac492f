"""The command: `python -m benchmarks.regions [--devices 100000]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from synthetic_nets import setting, write  # noqa: E402

from benchmarks.regions.page import page  # noqa: E402
from benchmarks.regions.run import Size, measure  # noqa: E402 - next to the tests
from benchmarks.swarm.__main__ import broker_version  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regions", description=__doc__)
    parser.add_argument("--devices", type=int, default=100_000, metavar="N", help="boards in all")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of predicted training times (default: 1)")
    parser.add_argument("--arrivals", type=float, default=250.0, help="boards that connect in a second (default: 250)")
    parser.add_argument("--moto", action="store_true", help="use the mock of S3, and not Ceph's gateway")
    parser.add_argument("--limit", type=float, default=1800.0, metavar="S", help="seconds after which a step fails")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="run the servers under cProfile")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in this folder, and leave everything there")
    parser.add_argument("--no-page", action="store_true", help="print the numbers and leave the results as they are")
    parser.add_argument("--note", metavar="TEXT", help="remark on the circumstances, for the page")
    options = parser.parse_args()
    profile = None if options.profile is None else options.profile.resolve()
    size = Size(
        options.devices,
        scale=options.scale,
        arrivals=options.arrivals,
        moto=options.moto,
        limit_s=options.limit,
        profile=profile,
    )
    if options.keep is not None:
        options.keep.mkdir(parents=True)
        row = measure(size, options.keep.resolve())
    else:
        with TemporaryDirectory() as name:
            row = measure(size, Path(name))
    about = setting("paho-mqtt", "SQLAlchemy", "boto3", "websockets") | {"broker": broker_version()}
    if options.note:
        about["note"] = options.note
    command = f"python -m benchmarks.regions --devices {options.devices} --arrivals {options.arrivals:g}"
    text = page(row, about, command if options.scale == 1 else f"{command} --scale {options.scale:g}")
    if options.no_page:
        print(text, json.dumps(row), sep="\n")
    else:
        write("regions", {"setting": about, **row}, text)
    return int(bool(row["audit"]["faults"]))


if __name__ == "__main__":
    sys.exit(main())
