"""The table [[devices]] of a `fleet.toml`: each row describes one simulated device, or several of a kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedprune.core import validation as setting_checks
from fedprune.core.errors import ConfigError, KeyPath, dotted_path, value_text
from fedprune.model.lengths import Shape
from fedprune.planning import profile_store
from fedprune.planning.profile import HardwareProfile
from fedprune.wire.topics import check_device
from fedprune_device.data.array_source import load_data
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.labels import Targets
from fedprune_device.data.splits import SplitShares
from fedprune_device.data.table_options import MISSING, TableOptions
from fedprune_device.data.table_windows import TableFile, is_table
from fedprune_server.config.layers import name_source
from fedprune_server.simulation.datasets.federation import Federation
from fedprune_server.simulation.fleet.virtual_device import StoredData, VirtualDevice, samples_digest

MEGABYTE = 1e6

MAX_LOADED_FLEET = 32  # fleets of up to this size hold their samples in memory; larger ones read them on use

_ROW_KEYS = ("name", "count", "profile", "data", "link", "validation", "missing", "step", "columns")
_DATA_KEYS = ("data", "validation", "missing", "step", "columns")  # of rows with samples of their own

_MAX_WINDOWS = 10_000  # of a table: as many as a board takes by default
_LINK_KEYS = ("down_mb_s", "up_mb_s", "latency_s")

# Speeds in MB/s and latency in seconds that differ from the profile's.
LinkSettings = Mapping[str, float]


@dataclass(frozen=True)
class _Row:
    """One future device, and its row in the file."""

    where: KeyPath
    name: str
    profile: str
    data: str
    link: LinkSettings
    validation: float
    table: TableOptions


def read_devices(
    rows: object,
    seed: int,
    folder: Path,
    federation: Federation | None = None,
    links: Sequence[LinkSettings] = (),
    *,
    check: Callable[[LocalData], object] = lambda data: None,
    form: tuple[Shape, Targets] | None = None,
) -> tuple[VirtualDevice, ...]:
    """The fleet that a file's [[devices]] describe.

    Args:
        seed: The job's seed, which keys the split of samples.
        folder: What relative paths count from.
        federation: The split data set of the table [data]; None if every row names its own.
        links: Links for devices without their own, in turn.
        check: Raises `DataError` if a device's samples don't fit the model.
        form: The model's input and labels, which decide what the windows of a table are.

    Raises:
        ConfigError: A key is missing, unknown or wrong; the message names row and key.
        FedpruneError: A profile or data can't be read; the message names row and key.
    """
    device_rows = list(_expand_rows(rows, federation))
    rows_by_name: dict[str, KeyPath] = {}
    for row in device_rows:
        if row.name in rows_by_name:
            expected, got = "another one for each device", f"{row.name!r} as {dotted_path(rows_by_name[row.name])}"
            raise ConfigError((*row.where, "name"), expected=expected, got=got)
        rows_by_name[row.name] = row.where
    if federation is not None and len(device_rows) != len(federation.names):
        raise ConfigError(
            ("devices",), expected=f"as many devices as [data] deals out: {len(federation.names)}", got=len(device_rows)
        )
    profiles: dict[tuple[str, str], HardwareProfile] = {}  # devices of one kind share one
    devices = []
    data: LocalData | StoredData
    for number, row in enumerate(device_rows):
        link = row.link or (links[number % len(links)] if links else {})
        profile_key = (row.profile, repr(sorted(link.items())))
        if profile_key not in profiles:
            with name_source((*row.where, "profile")):
                # Shipped profiles go by a bare name, so a name with a slash or an ending is a path.
                is_path = "/" in row.profile or row.profile.endswith((".toml", ".json"))
                source = str(folder / row.profile) if is_path else row.profile
                profiles[profile_key] = with_link(profile_store.find_typed_profile(source), link)
        with name_source((*row.where, "data") if federation is None else ("data", row.name)):
            load, data = _read_samples(row, seed, folder, federation, number, check, form)
            if len(device_rows) > MAX_LOADED_FLEET:
                digest = (
                    samples_digest(data) if federation is None else federation.fingerprint(federation.names[number])
                )
                data = StoredData(data.samples, digest, load)
        devices.append(VirtualDevice(row.name, profiles[profile_key], data))
    return tuple(devices)


def _expand_rows(rows: object, federation: Federation | None) -> Iterator[_Row]:
    needed = ("name", "profile", "data") if federation is None else ("profile",)
    needed_text = f"{', '.join(needed[:-1])} and {needed[-1]}" if len(needed) > 1 else needed[0]
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        expected = f"a table [[devices]] with {needed_text} per device"
        raise ConfigError(("devices",), expected=expected, got=value_text(rows))
    name_count = 0
    for index, row in enumerate(rows):
        row_path: KeyPath = ("devices", index)
        setting_checks.check_mapping(row_path, row)
        allowed_keys = _ROW_KEYS if federation is None else [k for k in _ROW_KEYS if k not in _DATA_KEYS]
        setting_checks.check_keys(allowed_keys, row, row_path)
        for key in needed:
            if key not in row:
                raise ConfigError((*row_path, key), expected=needed_text, got="nothing")
        names = _names(row, row_path, federation, name_count, is_only_row=len(rows) == 1)
        names_of_profiles = row["profile"] if isinstance(row["profile"], list) and row["profile"] else [row["profile"]]
        profiles = [_checked_text(name, (*row_path, "profile")) for name in names_of_profiles]
        data = "" if federation is not None else _checked_text(row["data"], (*row_path, "data"))
        links = _links(row.get("link", {}), (*row_path, "link"))
        share = setting_checks.check_number((*row_path, "validation"), row.get("validation", 0.0), 0, 0.9)
        missing = setting_checks.check_word((*row_path, "missing"), row.get("missing", MISSING[0]), MISSING)
        step = row.get("step")
        if step is not None:
            step = setting_checks.check_number((*row_path, "step"), step, 1e-9, 1e9)
        columns = setting_checks.check_texts((*row_path, "columns"), row.get("columns", []))
        table = TableOptions(missing, step, columns)
        for i, name in enumerate(names):
            yield _Row(row_path, name, profiles[i % len(profiles)], data, links[i % len(links)], share, table)
        name_count += len(names)


def _names(
    row: Mapping[str, Any], row_path: KeyPath, federation: Federation | None, name_count: int, *, is_only_row: bool
) -> tuple[str, ...]:
    """Names of a row's devices: its own, numbered ones, or those of the data."""
    count = row.get("count")
    if count is not None:
        setting_checks.check_whole((*row_path, "count"), count, 1, 10**6)
    if "name" not in row:
        if federation is None or (count is None and not is_only_row):
            raise ConfigError((*row_path, "name"), expected="a text", got="nothing")
        return federation.names[name_count:][: count if count is not None else None]
    name = _checked_text(row["name"], (*row_path, "name"))
    if count is None:
        return (check_device(name, (*row_path, "name"), error=ConfigError),)
    # As many digits as sorting by name needs.
    digits = max(3, len(str(count)))
    names = tuple(f"{name}-{i:0{digits}}" for i in range(1, count + 1))
    # The last name is the longest: if it is valid, so are the others.
    check_device(names[-1], (*row_path, "name"), error=ConfigError)
    return names


def _links(value: object, path: KeyPath) -> list[LinkSettings]:
    """Links of a row's devices: one, or several in turn."""
    tables = value if isinstance(value, list) and value else [value]
    links: list[LinkSettings] = []
    for body in tables:
        table = setting_checks.check_mapping(path, body)
        setting_checks.check_keys(_LINK_KEYS, table, path)
        limits = {k: (0.0, 3600.0) if k == "latency_s" else (1e-6, 1e6) for k in table}
        links.append({k: setting_checks.check_number((*path, k), v, *limits[k]) for k, v in table.items()})
    return links


def with_link(profile: HardwareProfile, link: LinkSettings) -> HardwareProfile:
    """The same board on another link; missing values stay."""
    units = {"latency_s": 1.0, "down_mb_s": MEGABYTE, "up_mb_s": MEGABYTE}
    figures: dict[str, Any] = {key.replace("mb_s", "bytes_s"): units[key] * value for key, value in link.items()}
    return replace(profile, link=replace(profile.link, **figures))


def _read_samples(
    row: _Row,
    seed: int,
    folder: Path,
    federation: Federation | None,
    device_index: int,
    check: Callable[[LocalData], object],
    form: tuple[Shape, Targets] | None,
) -> tuple[Callable[[], LocalData], LocalData]:
    """The function that reads a device's samples, and the samples, which are checked."""
    if federation is not None:
        load = partial(federation.load, federation.names[device_index])
        data = load()
        check(data)
        return load, data
    is_file = row.data.endswith(".npz") or is_table(Path(row.data))
    source = str(folder / row.data) if is_file else row.data
    load = partial(load_data, source, seed, row.name, row.validation)
    if is_table(Path(source)) and form is not None:
        shares = SplitShares(validation=row.validation, seed=seed, device=row.name)
        load = partial(_read_windows, Path(source), shares, row.table, *form)
    data = load()
    with name_source(source):
        check(data)
    return load, data


def _read_windows(path: Path, shares: SplitShares, options: TableOptions, shape: Shape, targets: Targets) -> LocalData:
    return TableFile(path, shares, _MAX_WINDOWS, options=options).snapshot(shape, targets)


def _checked_text(value: object, path: KeyPath) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(path, expected="a text", got=repr(value))
    return value
