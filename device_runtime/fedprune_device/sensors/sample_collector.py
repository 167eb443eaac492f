"""Joins the newest values of several topics into rows, and rows into samples, separately for each device."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fedprune_device.sensors.config import SensorChannel, SensorConfig, SensorValue
from fedprune_device.sensors.payload import NoReadingError, Payload, ReadingError, label_of, number_of

# Devices that wildcards stand for. Each takes the memory of its channels' values and of one sample.
_MAX_DEVICES = 256

# A message that is older than the one before by more than this is no late one: its clock was set back. It is less than
# the hour that comes twice when summer ends.
_MAX_LATENESS_S = 1800.0

Device = tuple[str, ...]  # what the wildcards of its topics stand for; empty for topics without any


_MAX_NAMES = 6  # of one reason that a line lists


@dataclass(frozen=True)
class SensorSample:
    """The rows [steps, channels] of a sample, and its class by number or name, if there is one."""

    rows: list[list[float]]
    label: str | int | None


@dataclass
class _HeldValue:
    value: Any
    received_at: float


@dataclass
class _Source:
    """A value's settings, and what its devices last sent."""

    settings: SensorValue
    values: dict[Device, _HeldValue] = field(default_factory=dict)
    newest_times: dict[Device, float] = field(default_factory=dict)  # of the messages themselves, in seconds
    # Topics of availability that said so last, and of which device; of all devices with an empty one.
    offline: set[tuple[str, Device]] = field(default_factory=set)

    def current(self, device: Device, now: float) -> _HeldValue | None:
        value = self.values.get(device if self.settings.topic.wildcards else ())
        return None if value is None or now - value.received_at > self.settings.max_age_s else value

    def is_offline(self, device: Device) -> bool:
        return any(other in (device, ()) for _, other in self.offline)


class SampleCollector:
    """Rows of the values that hold at a time: each device's own, joined with those of topics without wildcards.

    Samples share no rows, so that none is trained and tested on, and none spans a time without values.
    """

    def __init__(self, config: SensorConfig, drops: DropCounts) -> None:
        self._drops = drops
        self._channels = [_Source(channel) for channel in config.channels]
        self._label = None if config.label is None else _Source(config.label)
        self._sources = [*self._channels, *(() if self._label is None else (self._label,))]
        self._has_devices = any(channel.topic.wildcards for channel in config.channels)
        self._rows: dict[Device, list[list[float]]] = {} if self._has_devices else {(): []}

    @property
    def is_between_samples(self) -> bool:
        """Whether some device's next row begins a sample."""
        return any(not rows for rows in self._rows.values())

    def receive(self, topic: str, body: bytes, now: float, *, is_retained: bool = False) -> None:
        """Take a message that came at `now`, in seconds of a monotonic clock.

        Nobody knows how old a retained message is: it counts for availability, and for values that hold without end
        unless their device is offline.
        """
        payload = Payload(body)
        is_matched = False
        for source in self._sources:
            device, is_availability = source.settings.topic.captures(topic), False
            for availability in source.settings.availability:
                if (devices := availability.captures(topic)) is not None:
                    self._note_availability(source, availability.text, devices, payload)
                    is_availability = True
            is_matched |= is_availability or device is not None
            # With # a topic stands for those of availability, too.
            if device is not None and not (is_availability and "#" in source.settings.topic.text):
                if is_retained and source.settings.max_age_s < math.inf:
                    self._drops.add("retained messages, whose age nobody knows", source.settings.name)
                elif is_retained and source.is_offline(device):
                    self._drops.add("retained messages of devices that are offline", source.settings.name)
                else:
                    self._take_value(source, device, payload, now, is_retained=is_retained)
        if not is_matched:
            self._count_missed_name(topic, payload)

    def collect(self, now: float, steps: int) -> list[SensorSample]:
        """Add a row for each device, and return the samples that are complete with it: `steps` rows each."""
        samples = []
        for device, rows in self._rows.items():
            values = [channel.current(device, now) for channel in self._channels]
            if None in values:
                name = self._channels[values.index(None)].settings.name
                self._drops.add("times without a value that is young enough", name)
                if rows:
                    self._drops.add("rows of samples that a gap ended", number=len(rows))
                    rows.clear()
                continue
            rows.append([held.value for held in values if held is not None])
            if len(rows) >= steps:
                label = None if self._label is None else self._label.current(device, now)
                # The last rows, should a new model take shorter samples than those that were begun.
                samples.append(SensorSample(rows[-steps:], None if label is None else label.value))
                self._rows[device] = []
        return samples

    def drop_rows(self) -> None:
        """Begin all samples anew: rows were missed."""
        if count := sum(map(len, self._rows.values())):
            self._drops.add("rows of samples that a gap ended", number=count)
        for rows in self._rows.values():
            rows.clear()

    def _count_missed_name(self, topic: str, payload: Payload) -> None:
        """Count a value of a device whose name has a slash, where + stands for names without one."""
        for channel in self._channels:
            deeper = channel.settings.topic.one_level_deeper
            if deeper is not None and deeper.captures(topic) is not None:
                with suppress(ReadingError):
                    number_of(payload.value(channel.settings.path), channel.settings.values)
                    wide = channel.settings.topic.text[:-1] + "#"
                    self._drops.add(f"values of names with a slash: topic = {wide!r} takes them", channel.settings.name)

    def _take_value(self, source: _Source, device: Device, payload: Payload, now: float, *, is_retained: bool) -> None:
        settings = source.settings
        try:
            self._check_order(source, device, payload, is_retained=is_retained)
            raw = payload.value(settings.path)
            value: Any
            if isinstance(settings, SensorChannel):
                value = number_of(raw, settings.values)
                if not settings.low <= value <= settings.high:
                    raise ReadingError("out of range")
            else:
                value = label_of(raw, settings.values)
            self._add_device(source, device)
        except NoReadingError as error:
            source.values.pop(device, None)  # the value before doesn't hold any longer
            self._drops.add(str(error), settings.name)
        except ReadingError as error:
            self._drops.add(str(error), settings.name)
        else:
            source.values[device] = _HeldValue(value, now)

    def _check_order(self, source: _Source, device: Device, payload: Payload, *, is_retained: bool) -> None:
        if not source.settings.time:
            return
        time_s, newest = payload.time(source.settings.time), source.newest_times.get(device, -math.inf)
        # A broker sends a topic's retained message after each reconnect, also where later ones weren't retained: that
        # an old one comes says nothing about the device's clock.
        max_lateness_s = math.inf if is_retained else min(source.settings.max_age_s, _MAX_LATENESS_S)
        # The same time again: Zigbee2MQTT repeats its devices' last messages when it restarts.
        if newest - max_lateness_s <= time_s <= newest:
            raise ReadingError("not newer than the one before")
        if device in source.values or len(source.newest_times) < _MAX_DEVICES:
            source.newest_times[device] = time_s

    def _add_device(self, source: _Source, device: Device) -> None:
        if source is self._label:
            if device not in source.values and len(source.values) >= _MAX_DEVICES:
                raise ReadingError(f"of more than {_MAX_DEVICES} devices")
        elif source.settings.topic.wildcards and device not in self._rows:
            if len(self._rows) >= _MAX_DEVICES:
                raise ReadingError(f"of more than {_MAX_DEVICES} devices")
            self._rows[device] = []

    def _note_availability(self, source: _Source, topic: str, devices: Device, payload: Payload) -> None:
        try:
            if payload.is_online():
                source.offline.discard((topic, devices))
                return
        except ReadingError as error:
            self._drops.add(str(error), source.settings.name)
            return
        if len(source.offline) < _MAX_DEVICES:
            source.offline.add((topic, devices))
        gone: Iterable[Device] = [devices] if devices else list(source.values)
        if sum(source.values.pop(device, None) is not None for device in gone):
            self._drops.add("values of devices that went offline", source.settings.name)


class DropCounts:
    """Counts by the reason and by the channel."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}

    def add(self, reason: str, name: str = "", number: int = 1) -> None:
        self._counts.setdefault(reason, Counter())[name] += number

    def take(self) -> str:
        """What was counted since the last call, as a text; empty if nothing was."""
        counts, self._counts, texts = self._counts, {}, []
        for reason, names in counts.items():
            most = [f"{name} {n}" if len(names) > 1 else name for name, n in names.most_common(_MAX_NAMES) if name]
            more = "" if len(names) <= _MAX_NAMES else " and others"
            listed = f" ({', '.join(most)}{more})" if most else ""
            texts.append(f"{names.total()} {reason}{listed}")
        return "; ".join(texts)
