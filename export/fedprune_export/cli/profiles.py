"""`profiles list | show | check | identify`: lists, shows, checks and identifies hardware profiles."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedprune.core.cli import add_json_option, byte_count, positive_integer, print_json
from fedprune.core.errors import ProfileError
from fedprune.output.tables import Column, print_table
from fedprune.planning import profile_store
from fedprune.planning.identification import BoardFacts, identify
from fedprune.planning.latency_model import GPU_SHARE
from fedprune.planning.profile import HardwareProfile


def register(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "profiles", help="hardware profiles: list, show, check, identify"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="all profiles, one line each")
    listing.set_defaults(function=list_profiles)
    showing = actions.add_parser("show", help="one profile, every figure with its source")
    showing.add_argument("name", help="a profile's name, or a TOML or JSON file")
    showing.set_defaults(function=show_profile)
    checking = actions.add_parser("check", help="check files of profiles")
    checking.add_argument("files", nargs="+", type=Path, metavar="FILE")
    checking.set_defaults(function=check_profiles)
    finding = actions.add_parser("identify", help="the profile for a board, from what the board reports about itself")
    finding.add_argument("--model", default="", help="the content of its /proc/device-tree/model")
    finding.add_argument(
        "--compatible",
        action="append",
        default=[],
        metavar="ENTRY",
        help="an entry of its /proc/device-tree/compatible (can be repeated)",
    )
    finding.add_argument("--l4t", default="", metavar="RELEASE", help="a Jetson's L4T release, such as 36.4.3")
    finding.add_argument("--memory", type=byte_count, metavar="BYTES", help="its MemTotal")
    finding.add_argument("--clock", type=positive_integer, metavar="HZ", help="the highest clock of its processor")
    finding.add_argument("--machine", default="aarch64", help="the output of uname -m (default: aarch64)")
    finding.set_defaults(function=identify_profile)
    for action in (listing, showing, checking, finding):
        add_json_option(action)
    for action in (listing, showing, finding):
        action.add_argument(
            "--folder", type=Path, action="append", default=[], help="a folder of own profiles (can be repeated)"
        )


def list_profiles(arguments: argparse.Namespace) -> None:
    """Print all profiles, the sound ones before the first error is raised."""
    profiles: list[HardwareProfile] = []
    errors: list[ProfileError] = []
    # One wrong file must not hide the others.
    names = profile_store.profile_names(arguments.folder)
    for name in names:
        try:
            profiles.append(profile_store.find_profile(name, arguments.folder))
        except ProfileError as error:  # noqa: PERF203
            errors.append(error)
    if arguments.json:
        print_json([p.to_dict() for p in profiles])
    else:
        _print_profiles(profiles)
    _raise_errors(errors, len(names))


_PROFILE_COLUMNS = (
    Column("name"),
    Column("board", drop_order=1, min_width=20),
    Column("cores", drop_order=3),
    Column("memory", is_right_aligned=True),
    Column("for training", is_right_aligned=True),
    Column("trains on", drop_order=2),
    Column("trains at", is_right_aligned=True, drop_order=2),
    Column("per round", is_right_aligned=True, drop_order=4),
)
_FIGURE_COLUMNS = Column("figure"), Column("value", min_width=12), Column("source", min_width=20)


def _print_profiles(profiles: Sequence[HardwareProfile]) -> None:
    rows = [
        (
            p.name,
            p.title if p.support == "full" else f"{p.title} (limited support)",
            f"{p.cpu.cores} x {p.cpu.clock_hz / 1e9:g} GHz",
            _byte_text(p.memory.total_bytes),
            _byte_text(p.training_memory_bytes),
            *_training_columns(p),
            _byte_text(p.link.bytes_per_round),
        )
        for p in profiles
    ]
    print_table(_PROFILE_COLUMNS, rows)


def _training_columns(profile: HardwareProfile) -> tuple[str, str]:
    """The unit that trains, and the rate at which plans count its products."""
    gpu = profile.training_gpu
    peak = None if gpu is None else gpu.peak_flops
    # A GPU's peak is never reached in training: plans count with a share of it, and so does this table.
    unit, rate = ("CPU", profile.train_rate) if peak is None else ("GPU", GPU_SHARE * peak)
    return unit, f"{rate / 1e9:,.1f} GFLOP/s"


def _raise_errors(errors: Sequence[ProfileError], total: int) -> None:
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ProfileError(f"{len(errors)} of {total} profiles are not sound: " + "; ".join(map(str, errors)))


def show_profile(arguments: argparse.Namespace) -> None:
    """Print one profile."""
    profile = profile_store.find_typed_profile(arguments.name, arguments.folder)
    if arguments.json:
        print_json(profile.to_dict())
        return
    print(f"{profile.name}: {profile.title} ({profile.family}, {profile.arch})")
    if profile.identify:
        print(f"device tree: {', '.join(profile.identify)}")
    if profile.advice:
        print(f"limited support: {profile.advice}")
    rows = [(key, _figure_text(key, value), profile.sources[key]) for key, value in profile.figures().items()]
    print_table(_FIGURE_COLUMNS, rows)


def check_profiles(arguments: argparse.Namespace) -> None:
    """Check files, all of them before the first error is raised."""
    sound: list[tuple[Path, HardwareProfile]] = []
    failures: list[tuple[Path, ProfileError]] = []
    for path in arguments.files:
        try:
            sound.append((path, profile_store.read_profile(path)))
        except ProfileError as error:  # noqa: PERF203
            failures.append((path, error))
    if arguments.json:
        rows = [{"file": str(f), "ok": True, "name": p.name} for f, p in sound]
        rows += [{"file": str(f), "ok": False, "error": str(e)} for f, e in failures]
        print_json(rows)
    else:
        for path, profile in sound:
            expected_path = path.with_name(f"{profile.name}{path.suffix}")
            note = "" if path == expected_path else f"; as a profile of a folder it must be called {expected_path.name}"
            print(f"{path}: ok ({profile.name}, {len(profile.sources)} figures with sources{note})")
    _raise_errors([e for _, e in failures], len(arguments.files))


def identify_profile(arguments: argparse.Namespace) -> None:
    """Print which profile fits a board, and why."""
    facts = BoardFacts(
        model=arguments.model,
        compatible=tuple(arguments.compatible),
        l4t=arguments.l4t,
        machine=arguments.machine,
        memory_total=arguments.memory,
        clock_hz=arguments.clock,
    )
    identification = identify(facts, arguments.folder)
    if arguments.json:
        print_json(identification.to_dict())
    else:
        print(identification.describe())


# Units by the ending of a figure's name; the first that fits, so that `_bytes_s` stands before `_s`.
_UNITS = {"_hz": "Hz", "_flops": "FLOP/s", "_bytes_s": "bytes/s", "_s": "s", "_w": "W", "bytes": "bytes"}


def _figure_text(key: str, value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    # Otherwise the name would end in `_round`, which has no unit.
    name = key.replace("bytes_per_round", "bytes")
    unit = next((unit for end, unit in _UNITS.items() if name.endswith(end)), "")
    if unit == "bytes":
        return _byte_text(value)
    for step, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if unit in ("Hz", "FLOP/s", "bytes/s") and value >= step:
            return f"{value / step:g} {prefix}{'B/s' if unit == 'bytes/s' else unit}"
    return f"{value:g} {unit}" if unit in ("W", "s") else f"{value:g}"


def _byte_text(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
