"""Kills server, boards and broker at flushes to the disk, and compares what counted with what boards say they sent.

`python benchmarks/kills.py [--kills 500]`: needs Mosquitto and a C compiler. Every job has two boards that train and
goes through the rounds that one without any kill went through; each of its models must be that one's, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from kill_points import BOARDS, Doomed, Kills, check, run, undisturbed
from real_site import write_material
from synthetic_nets import setting, write

JOBS = 5


def main() -> int:
    """Run the jobs; returns 1 where a ledger is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500, metavar="N", help="processes to kill (default: 500)")
    parser.add_argument("--no-page", action="store_true", help="print the numbers and leave the results as they are")
    options = parser.parse_args()
    done, ledgers = [], []
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_material(folder, dict.fromkeys(BOARDS, 200))
        rounds = options.kills  # more than there will be: a round takes several lives
        calm = _site(folder, "calm", rounds)
        undisturbed(calm)
        for job in range(JOBS):
            site = _site(folder, f"job{job}", rounds)
            try:
                done.append(run(site, rounds, -(-options.kills // JOBS), seed=job))
            finally:
                site.stop_all()
            ledgers.append(check(site, calm, 1))
            print(json.dumps({"kills": done[-1].total, "seconds": done[-1].seconds, **ledgers[-1]}), flush=True)
    text = page(done, ledgers)
    if options.no_page:
        print(text)
    else:
        body = {"jobs": [{"broker": d.broker, "lives": [vars(x) for x in d.lives]} for d in done], "ledgers": ledgers}
        write("kills", {"setting": setting("paho-mqtt", "SQLAlchemy", "onnxruntime"), **body}, text)
    return 0


def _site(folder: Path, name: str, rounds: int) -> Doomed:
    (folder / name).mkdir()
    return Doomed(folder, folder / name, rounds)


def page(done: list[Kills], ledgers: list[dict[str, int]]) -> str:
    """The results as a page."""
    about = setting("paho-mqtt", "SQLAlchemy", "onnxruntime")
    places = Counter((x.who if x.who == "server" else "board", x.file, x.after) for d in done for x in d.lives)
    rows = sorted({(who, file) for who, file, _ in places})
    machine = (
        f"{about['date']}, {about['cpu']}, {about['cores']} cores (load {about['load']}), Python {about['python']}, "
        f"paho-mqtt {about['paho-mqtt']}, SQLAlchemy {about['SQLAlchemy']}, onnxruntime {about['onnxruntime']}. "
        "`python benchmarks/kills.py`"
    )
    what = (
        f"{sum(d.total for d in done)} processes were killed in {len(done)} jobs of two boards that train, "
        f"{sum(d.broker for d in done)} of them brokers at any time, the others at a flush to the disk. "
        "Every job's rounds are those of one that nobody disturbed: the same models, bit for bit. No update was lost, "
        "none counted twice."
    )
    why = (
        "Boards announce an update again after every death of theirs, the server's or the broker's, and the server "
        "tells them again that it counts; a board that dies in between is told no more."
    )
    kills = [f"| {who} | {file} | {places[who, file, False]} | {places[who, file, True]} |" for who, file in rows]
    kills.append(f"| broker | (any time) | {sum(d.broker for d in done)} | |")
    jobs = [
        f"| {n} | {x['rounds']} | {x['counted']} | {x['sent']} | {x['accepted']} |" for n, x in enumerate(ledgers, 1)
    ]
    lines = ["# Kills", "", machine, "", what, ""]
    lines += ["| process | what it was flushing | killed before | killed after |", "|---|---|---:|---:|", *kills, ""]
    lines += ["| job | rounds | updates counted | announced by boards | told that they count |"]
    lines += ["|---:|---:|---:|---:|---:|", *jobs, "", why]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
