"""Give every board a person of the UCI HAR data set: data/person-NNN.npz each, data/newcomers.npz for the server.

    python people.py

Windows of the set overlap by half, so a random split would test a board on what it has trained on. Here they are
joined to recordings first: a board trains on one recording of each activity, and is tested on all others of its person.
The people of the set's own test part have no board: they are what the server measures the global model on.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from fedprune.core.errors import FedpruneError
from fedprune_server.simulation.datasets.npz_files import npz_arrays
from fedprune_server.simulation.datasets.source import find_source

UCI = Path("UCI HAR Dataset")
SIGNALS = [f"{kind}_{axis}" for kind in ("body_acc", "body_gyro", "total_acc") for axis in "xyz"]
WHERE = f"Unzip https://archive.ics.uci.edu/dataset/240 here, so that there is a folder {str(UCI)!r}."


def read() -> tuple[np.ndarray, ...]:
    """Windows [n, 9, 128], activities 0 to 5, people 1 to 30, and who is in the set's own test part."""
    if not UCI.is_dir():
        arrays = npz_arrays(find_source("har"))
        return tuple(arrays[name] for name in ("x", "y", "subject", "is_test"))
    parts = []
    for part in ("train", "test"):
        signals = [np.loadtxt(UCI / part / "Inertial Signals" / f"{s}_{part}.txt", np.float32) for s in SIGNALS]
        y, people = (np.loadtxt(UCI / part / f"{name}_{part}.txt", int) for name in ("y", "subject"))
        parts.append((np.stack(signals, 1), y - 1, people, np.full(len(y), part == "test")))
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def recordings(windows: np.ndarray) -> list[list[int]]:
    """Windows of one person that follow each other: the second half of one is the first half of the next."""
    first = {w[:, :64].tobytes(): i for i, w in enumerate(windows)}
    after = {i: first[half] for i, w in enumerate(windows) if (half := w[:, 64:].tobytes()) in first}
    found = [[i] for i in range(len(windows)) if i not in set(after.values())]
    for recording in found:
        while recording[-1] in after:
            recording.append(after[recording[-1]])
    return found


def samples(device: str) -> dict[str, np.ndarray]:
    """The samples of one board. fleet.toml names this function, which is called with each board's name."""
    return npz_arrays(Path("data") / f"{device}.npz")


def main() -> None:
    try:
        x, y, people, newcomers = read()
    except FedpruneError as error:
        sys.exit(f"{error}\n{WHERE}")
    x = np.asarray(x, np.float32) - np.float32([0, 0, 0, 0, 0, 0, 0.8, 0, 0])[:, None]  # gravity is mostly along x
    y = np.asarray(y, np.int64)
    folder = Path("data")
    folder.mkdir(exist_ok=True)
    trained: list[int] = []
    for number, person in enumerate(np.unique(people[~newcomers]), 1):
        own = np.flatnonzero(people == person)
        train: dict[int, list[int]] = {}
        test: list[int] = []
        for recording in recordings(x[own]):
            rows = own[recording].tolist()
            if train.setdefault(y[rows[0]], rows) is not rows:
                test += rows
        rows = [row for recording in train.values() for row in recording]
        trained += rows
        board = f"person-{number:03}"
        np.savez(folder / board, x_train=x[rows], y_train=y[rows], x_test=x[test], y_test=y[test])
        print(f"{board}: {len(rows)} windows to train on, {len(test)} to test on")
    np.savez(folder / "newcomers", x=x[newcomers], y=y[newcomers])
    some = np.random.default_rng(0).choice(trained, 256, replace=len(trained) < 256)
    np.savez(folder / "calibration", x=x[some])


if __name__ == "__main__":
    main()
