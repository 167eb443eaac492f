"""Real data of the tasks, dealt out to boards, from `FEDPRUNE_DATA`."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core.errors import DataError
from fedprune_device.data.dataset import LocalData
from fedprune_server.simulation.datasets.source import DATA_FOLDER_VARIABLE

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Dealt:
    """Boards' samples, and those by which the server judges models."""

    boards: dict[str, LocalData]
    x: Array
    y: Array


def arrays(name: str) -> Any:
    """A data set by its name."""
    folder = os.environ.get(DATA_FOLDER_VARIABLE)
    if not folder:
        raise DataError(f"{DATA_FOLDER_VARIABLE} is not set", expected=f"a folder with {name}.npz")
    return np.load(Path(folder) / f"{name}.npz", allow_pickle=False)


def dealt(parts: dict[str, tuple[Array, Array]], x: Array, y: Array) -> Dealt:
    """Every board keeps a fifth of its samples, the last ones, for its own tests."""
    boards = {}
    for name, (inputs, labels) in parts.items():
        cut = len(inputs) - max(1, len(inputs) // 5)
        boards[name] = LocalData(inputs[:cut], labels[:cut], inputs[cut:], labels[cut:])
    return Dealt(boards, x, y)


def speech(seed: int) -> Dealt:
    """A board per speaker; takes 0 to 4 of all speakers are the server's, as usual for this set."""
    found = arrays("spoken_digits")
    offsets, size = found["offsets"], 6000
    sound = found["samples"].astype(np.float32) / 32768
    x = np.zeros((len(offsets) - 1, size), np.float32)
    for i, (begin, end) in enumerate(pairwise(offsets)):
        piece = sound[begin : min(end, begin + size)]
        x[i, : len(piece)] = piece / (np.abs(piece).max() + 1e-6)
    y, take, speaker = found["y"].astype(np.int64), found["take"], found["speaker"]
    order = np.random.default_rng(seed).permutation(len(y))
    parts = {}
    for number, name in enumerate(map(str, found["speakers"])):
        rows = [i for i in order if speaker[i] == number and take[i] >= 5]
        parts[name] = x[rows], y[rows]
    return dealt(parts, x[take < 5], y[take < 5])


def streets(seed: int) -> Dealt:
    """Eight boards with streets one after the other, as cameras of different places have them."""
    found = arrays("camvid")

    def sides(split: str) -> tuple[Array, Array]:
        pictures = found[f"x_{split}"].astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1
        return pictures, found[f"y_{split}"]

    x, y = sides("train")
    rng, parts = np.random.default_rng(seed), {}
    for number, rows in enumerate(np.array_split(np.arange(len(x)), 8)):
        rows = rng.permutation(rows)
        parts[f"camera-{number}"] = x[rows], y[rows]
    return dealt(parts, *sides("test"))


def objects(seed: int) -> Dealt:
    """Ten boards with 200 canvases each of one to three digits, mostly of four kinds that differ by board."""
    found, rng = arrays("mnist"), np.random.default_rng(seed)

    def canvases(split: str, count: int, kinds: list[int] | None) -> tuple[Array, Array]:
        digits, names = found[f"x_{split}"], found[f"y_{split}"]
        x, y = np.zeros((count, 1, 64, 64), np.float32), np.zeros((count, 15, 8, 8), np.float32)
        weight = np.ones(len(names)) if kinds is None else np.where(np.isin(names, kinds), 8.0, 1.0)
        for i in range(count):
            for which in rng.choice(len(names), rng.integers(1, 4), p=weight / weight.sum()):
                picture = digits[which]
                rows, columns = np.flatnonzero(picture.max(1)), np.flatnonzero(picture.max(0))
                piece = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] / 255
                high, wide = piece.shape
                top, left = rng.integers(0, 65 - high), rng.integers(0, 65 - wide)
                if x[i, 0, top : top + high, left : left + wide].any():
                    continue
                down, right = top + high / 2, left + wide / 2
                row, column = int(down // 8), int(right // 8)
                x[i, 0, top : top + high, left : left + wide] = piece
                y[i, :5, row, column] = 1, right / 8 - column, down / 8 - row, wide / 32, high / 32
                y[i, 5 + names[which], row, column] = 1
        return x, y

    parts = {f"table-{b}": canvases("train", 200, [(b + k) % 10 for k in range(4)]) for b in range(10)}
    return dealt(parts, *canvases("test", 500, None))


def transformer(seed: int) -> Dealt:
    """Six boards with two months of hours each; the usual split: 12 months to train, then 4 of which none is used, and
    4 to test. Windows of 336 hours, and the 96 that follow."""
    x = arrays("etth1")["x"].astype(np.float32)
    month, length, horizon = 30 * 24, 336, 96
    mean, scale = x[: 12 * month].mean(0), x[: 12 * month].std(0)
    x = ((x - mean) / scale).T

    def windows(begin: int, end: int, step: int) -> tuple[Array, Array]:
        at = range(begin, end - length - horizon + 1, step)
        inputs = np.stack([x[:, i : i + length] for i in at])
        return inputs, np.stack([x[:, i + length : i + length + horizon] for i in at])

    parts = {f"substation-{b}": windows(2 * b * month, 2 * (b + 1) * month, 4) for b in range(6)}
    return dealt(parts, *windows(16 * month - length, 20 * month, 1))


UNSEEN = 1
"""Walking upstairs: no board has it, and it is what must stand out."""


def _people() -> tuple[Array, Array, Array, Array]:
    """HAR: windows, normalised by the training set's, their activities, whose they are, and which are for tests."""
    found = arrays("har")
    x, test = found["x"], found["is_test"]
    mean, scale = x[~test].mean((0, 2), keepdims=True), x[~test].std((0, 2), keepdims=True)
    return ((x - mean) / scale).astype(np.float32), found["y"].astype(np.int64), found["subject"], test


def _groups(x: Array, y: Array, subject: Array, wanted: Array, seed: int) -> dict[str, tuple[Array, Array]]:
    """What is wanted of three people of the training set for each of seven boards."""
    rng, parts = np.random.default_rng(seed), {}
    for number, some in enumerate(np.array_split(np.unique(subject[wanted]), 7)):
        rows = rng.permutation(np.flatnonzero(np.isin(subject, some) & wanted))
        parts[f"group-{number}"] = x[rows], y[rows]
    return parts


def motion(seed: int) -> Dealt:
    """Seven boards with three people each of the training set, without one activity; labels are the inputs."""
    x, y, subject, test = _people()
    usual = x[test & (y != UNSEEN)]
    return dealt(_groups(x, x, subject, ~test & (y != UNSEEN), seed), usual, usual)


def unusual() -> tuple[Array, Array]:
    """The test set's windows of all activities, and whether each is the one that no board has."""
    x, y, _, test = _people()
    return x[test], y[test] == UNSEEN


def sensors(seed: int) -> Dealt:
    """Seven boards with three people each of the training set; the test set's nine people are the server's."""
    x, y, subject, test = _people()
    turns = np.array(["gyro" in str(c) for c in arrays("har")["channels"]])
    row = np.concatenate([x[:, ~turns].reshape(len(x), -1), x[:, turns].reshape(len(x), -1)], 1)
    return dealt(_groups(row, y, subject, ~test, seed), row[test], y[test])


def clothes(seed: int) -> Dealt:
    """Ten boards with 400 pictures each, mostly of three kinds that differ by board; 2,000 of the test set."""
    found, rng = arrays("fashion_mnist"), np.random.default_rng(seed)

    def side(split: str, rows: Array) -> tuple[Array, Array]:
        return found[f"x_{split}"][rows, None].astype(np.float32) / 127.5 - 1, found[f"y_{split}"][rows].astype(
            np.int64
        )

    kinds, parts = found["y_train"], {}
    for board in range(10):
        weight = np.where(np.isin(kinds, [(board + k) % 10 for k in range(3)]), 8.0, 1.0)
        parts[f"shop-{board}"] = side("train", rng.choice(len(kinds), 400, replace=False, p=weight / weight.sum()))
    return dealt(parts, *side("test", np.arange(2000)))


MOST_SAID = 12
"""Roles with most text: a board each."""


def _play_text() -> str:
    return bytes(arrays("shakespeare")["text"]).decode("latin-1")


def _rows(text: str) -> Array:
    """65 characters after each other [n, 65], as numbers of the plays' characters; others are left out."""
    number = {c: i for i, c in enumerate(sorted(set(_play_text())))}
    tokens = np.array([number[c] for c in text if c in number], np.int64)
    rows = [tokens[i : i + 65] for i in range(0, len(tokens) - 65, 64)]
    return np.stack(rows) if rows else np.zeros((0, 65), np.int64)


def _roles() -> list[tuple[str, Array]]:
    """Roles, those with most text first, and 65 characters after each other of what they say [n, 65]."""
    roles: dict[str, str] = {}
    for name, said in re.findall(r"(?:^|\n\n)([A-Z][A-Za-z ]+):\n((?:.+\n?)+)", _play_text()):
        roles[name] = roles.get(name, "") + said
    return [(n.lower().replace(" ", "-"), _rows(roles[n])) for n in sorted(roles, key=lambda r: -len(roles[r]))]


def plays(seed: int) -> Dealt:
    """A board for each of twelve roles."""
    return _texts(dict(_roles()[:MOST_SAID]))


def chapters(seed: int) -> Dealt:
    """A board for each of the twelve longest chapters of Python's own manual, without what an earlier one says, too.

    `python_topics.npz` has `pydoc_data.topics.topics` of Python 3.11 as JSON, in bytes: `text`.
    """
    topics: dict[str, str] = json.loads(bytes(arrays("python_topics")["text"]))
    seen: set[str] = set()
    found = {}
    for name in sorted(topics, key=lambda t: (-len(topics[t]), t)):
        own = dict.fromkeys(p for p in topics[name].split("\n\n") if p not in seen)
        seen |= own.keys()
        found[name] = _rows("\n\n".join(own))
    most = sorted(found, key=lambda t: (-len(found[t]), t))[:MOST_SAID]
    return _texts({name: found[name] for name in most})


def _texts(found: dict[str, Array]) -> Dealt:
    """A board for each text; the last fifth of every text is the server's."""
    parts, tests = {}, []
    for name, rows in found.items():
        cut = len(rows) - len(rows) // 5
        parts[name] = rows[:cut, :-1], rows[:cut, 1:]
        tests.append(rows[cut:])
    whole = np.concatenate(tests)
    return dealt(parts, whole[:, :-1], whole[:, 1:])


def all_plays() -> Array:
    """What all roles say [n, 65]."""
    return np.concatenate([rows for _, rows in _roles()])
