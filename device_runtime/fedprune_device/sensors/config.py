"""The settings of a board's sensors, from a TOML file: the broker, and which message is which channel of the model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fedprune.core import validation
from fedprune.core.errors import ConfigError, Subject, value_text
from fedprune.core.toml_file import read_toml
from fedprune.wire.urls import BrokerUrl
from fedprune_device.api.address import LocalAddress
from fedprune_device.sensors.payload import Path as ValuePath

_PERIODS_S = (0.05, 86_400.0)
_MAX_CHANNELS = 4096
_MAX_NAME = 200
_MAX_VALUES = 1000
_MAX_STEPS = 2**20  # as many numbers of one channel are the largest sample that a board's set takes by default

# The axes of a sample, and how a model's input may order them; an input of one axis has one channel, or one row.
_CHANNELS, _STEPS = "channels", "steps"
_LAYOUTS = ((_CHANNELS, _STEPS), (_STEPS, _CHANNELS), (_CHANNELS,), (_STEPS,))

_SOURCE_KEYS = ("topic", "path", "time", "max_age", "availability")
_TABLES = {
    "": ("broker", "ca", "board", "period", "steps", "layout", "channels", "label", *_SOURCE_KEYS),
    "channels": ("name", "range", "values", *_SOURCE_KEYS),
    "label": ("values", *_SOURCE_KEYS),
}


_MAX_TOPIC_LENGTH = 65_535  # bytes of a topic (MQTT 3.1.1, 1.5.3)


@dataclass(frozen=True)
class TopicFilter:
    """A topic, or several by `+` for one level and `#` for all further ones, or for some before the last."""

    text: str

    @classmethod
    def parse(cls, text: object, what: Subject) -> TopicFilter:
        """Raises `ConfigError`, which names `what`, if it is no filter of MQTT 3.1.1 (4.7) with # anywhere."""
        expected = "an MQTT topic, with + or # only as a whole level, and # only once"
        if not isinstance(text, str) or not 0 < len(text.encode(errors="replace")) <= _MAX_TOPIC_LENGTH:
            raise ConfigError(what, expected=expected, got=value_text(text))
        levels = text.split("/")
        is_valid = all(level in ("+", "#") or not set(level) & set("+#\0") for level in levels)
        if not is_valid or levels.count("#") > 1:
            raise ConfigError(what, expected=expected, got=value_text(text))
        return cls(text)

    @property
    def subscription(self) -> str:
        """What a broker knows of it: there # is only the last level."""
        return self.text.partition("#/")[0] + "#" * ("#/" in self.text)

    @cached_property
    def one_level_deeper(self) -> TopicFilter | None:
        """The topics of names with a slash, where the last level stands for a name without one."""
        return TopicFilter(f"{self.text}/+") if self.text.endswith("/+") else None

    @property
    def wildcards(self) -> int:
        return sum(level in ("+", "#") for level in self.text.split("/"))

    def captures(self, topic: str) -> tuple[str, ...] | None:
        """What each wildcard stands for in a topic; None if the topic is another one."""
        match = self._pattern.fullmatch(topic)
        # Wildcards at the beginning leave out the broker's own topics (4.7.2).
        if match is None or (topic.startswith("$") and self.text[0] in "+#"):
            return None
        return tuple(text or "" for text in match.groups())

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        pattern = "/".join("([^/]*)" if level == "+" else re.escape(level) for level in self.text.split("/"))
        pattern = pattern.replace(re.escape("#") + "/", "(.+)/")
        if pattern == re.escape("#"):
            return re.compile("(.*)", re.DOTALL)
        if self.text.endswith("/#"):  # which also stands for no level at all
            pattern = pattern.removesuffix("/" + re.escape("#")) + "(?:/(.*))?"
        return re.compile(pattern, re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class SensorValue:
    """One value of the messages of a topic.

    Attributes:
        name: Its name, for the log.
        topic: The topic or, by wildcards, those of several devices alike.
        path: Where the value is in a JSON object; empty if the message is the value.
        time: Where the message's own time is, by which late messages are left out; empty to take them as they come.
        max_age_s: Seconds for which the last value holds; infinite if a value holds until the next one.
        availability: Topics that say whether the device, or a bridge before it, is online.
        values: What texts stand for.
    """

    name: str
    topic: TopicFilter
    path: ValuePath = ()
    time: ValuePath = ()
    max_age_s: float
    availability: tuple[TopicFilter, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SensorChannel(SensorValue):
    """A value that is a channel of the model's inputs; numbers outside `low` to `high` are left out."""

    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True, kw_only=True)
class SensorConfig:
    """What is read from which broker, and how it becomes samples.

    Attributes:
        broker: Its URL.
        ca: The file of the authorities that certified it; None for the system's.
        board: The address of the board's local interface.
        period_s: Seconds between two rows of a sample.
        steps: Rows of a sample until the board knows what its model takes; None to hand nothing in until then.
        layout: The axes of a sample, in their order.
        channels: The channels of the model's inputs, in their order.
        label: The value that is a sample's class, if there is one.
    """

    broker: str
    ca: Path | None
    board: str
    period_s: float
    steps: int | None
    layout: tuple[str, ...]
    channels: tuple[SensorChannel, ...]
    label: SensorValue | None

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """The shape of a sample by the settings, if they say it."""
        if self.steps is None:
            return None
        sizes = {_CHANNELS: len(self.channels), _STEPS: self.steps}
        return tuple(sizes[axis] for axis in self.layout)

    @property
    def has_channels_first(self) -> bool:
        return self.layout[0] == _CHANNELS

    @property
    def sources(self) -> tuple[SensorValue, ...]:
        """All values: the channels, then the label."""
        return (*self.channels, *(() if self.label is None else (self.label,)))

    @property
    def subscriptions(self) -> tuple[str, ...]:
        """The topics to subscribe to, each once, with those of names with a slash, which are counted."""
        filters = [f for source in self.sources for f in (source.topic, *source.availability)]
        texts = [f.subscription for f in filters]
        texts += [f.one_level_deeper.text for f in filters[: len(self.sources)] if f.one_level_deeper is not None]
        # Of overlapping subscriptions brokers may send a message once for each.
        wide = [text.removesuffix("#") for text in texts if text.endswith("#")]
        return tuple(dict.fromkeys(t for t in texts if not any(t.startswith(w) and t != f"{w}#" for w in wide)))


def read_sensor_config(file: Path) -> SensorConfig:
    """Raises `ConfigError`, which names the file and the setting, if one is missing or can't be."""
    body = read_toml(file, ConfigError)
    where = str(file)
    validation.check_keys(_TABLES[""], body, where)
    for name in ("broker", "board", "period"):
        if name not in body:
            raise ConfigError(f"{where}: {name} is missing", hint="docs/board-data.md has an example.")
    BrokerUrl.parse(validation.check_text(f"{where}: broker", body["broker"], 1000))
    LocalAddress.parse(validation.check_text(f"{where}: board", body["board"], 1000))
    ca = body.get("ca")
    tables = validation.check_items(f"{where}: channels", body.get("channels"), _MAX_CHANNELS, "tables", min_items=1)
    channels = tuple(_channel(body, table, f"{where}: channel {i}") for i, table in enumerate(tables, 1))
    label = None if "label" not in body else _label(body, body["label"], f"{where}: label")
    layout = body.get("layout", list(_LAYOUTS[0]))
    if not isinstance(layout, list) or tuple(layout) not in _LAYOUTS:
        expected = " or ".join(str(list(each)) for each in _LAYOUTS)
        raise ConfigError(f"{where}: layout", expected=expected, got=value_text(layout))
    config = SensorConfig(
        broker=body["broker"],
        ca=None if ca is None else Path(validation.check_text(f"{where}: ca", ca, 4096)),
        board=body["board"],
        period_s=validation.check_number(f"{where}: period", body["period"], *_PERIODS_S),
        steps=None if "steps" not in body else validation.check_whole(f"{where}: steps", body["steps"], 1, _MAX_STEPS),
        layout=tuple(layout),
        channels=channels,
        label=label,
    )
    # An input of one axis has either one channel or one row.
    for axis, count in {_CHANNELS: len(config.channels), _STEPS: config.steps or 1}.items():
        if axis not in config.layout and count != 1:
            raise ConfigError(f"{where}: layout", expected=f"both axes, as there are {count} {axis}", got=config.layout)
    _check_wildcards(config, where)
    return config


def _check_wildcards(config: SensorConfig, where: str) -> None:
    names = [channel.name for channel in config.channels]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{where}: names of channels", expected="different ones", got=f"{twice!r} twice")
    counts = sorted({channel.topic.wildcards for channel in config.channels} - {0})
    other = [] if config.label is None else [config.label.topic.wildcards]
    if len(counts) > 1 or any(count not in (0, *counts) for count in other):
        raise ConfigError(
            f"{where}: wildcards of topics",
            expected="equally many in all topics that have some, also of the label",
            got=", ".join(map(str, dict.fromkeys((*counts, *other)))),
            hint="What a wildcard stands for is a device: rows are joined of messages for which it is the same.",
        )
    for source in config.sources:
        for availability in source.availability:
            if availability.wildcards not in (0, source.topic.wildcards):
                raise ConfigError(
                    f"{where}: availability of {source.name}",
                    expected=f"{source.topic.wildcards} wildcards as in its topic, or none",
                    got=availability.text,
                    hint="A channel with a topic of another kind needs an availability of its own, or [].",
                )


def _channel(defaults: Mapping[str, Any], table: object, where: str) -> SensorChannel:
    body = _checked_table(table, "channels", where)
    name = body.get("name") or ".".join(map(str, _path(body.get("path", ()), f"{where}: path")))
    name = validation.check_text(f"{where}: name", name, _MAX_NAME)
    where = f"{where} ({name})" if name else where
    if not name:
        raise ConfigError(f"{where}: name is missing")
    values = _values(body, where)
    for text, number in values.items():
        validation.check_number(f"{where}: values.{text}", number)
    low, high = -math.inf, math.inf
    if "range" in body:
        limits = validation.check_items(f"{where}: range", body["range"], 2, "numbers", min_items=2)
        low, high = (validation.check_number(f"{where}: range", limit) for limit in limits)
        if low > high:
            raise ConfigError(f"{where}: range", expected="the lowest number, then the highest", got=f"{low}, {high}")
    return SensorChannel(**_source_settings(defaults, body, where), name=name, values=values, low=low, high=high)


def _label(defaults: Mapping[str, Any], table: object, where: str) -> SensorValue:
    body = _checked_table(table, "label", where)
    # A topic of its own is another device's, whose messages say neither the channels' time nor their availability.
    defaults = {} if "topic" in body else defaults
    # States are published when they change, and hold until then.
    settings = _source_settings({**defaults, "max_age": math.inf}, body, where)
    values = _values(body, where)
    for text, label in values.items():
        if not (isinstance(label, str) and label) and not validation.is_whole(label):
            raise ConfigError(
                f"{where}: values.{text}", expected="a class, by its name or number", got=value_text(label)
            )
    return SensorValue(**settings, name="label", values=values)


def _checked_table(table: object, kind: str, where: str) -> Mapping[str, Any]:
    if not isinstance(table, dict):
        raise ConfigError(where, expected="a table", got=value_text(table))
    validation.check_keys(_TABLES[kind], table, where)
    return table


def _source_settings(defaults: Mapping[str, Any], body: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings that channels and the label share. Those of the file's top hold where a table has none."""
    settings = {**{key: defaults[key] for key in _SOURCE_KEYS if key in defaults}, **body}
    for key in ("topic", "max_age"):
        if key not in settings:
            raise ConfigError(f"{where}: {key} is missing", hint="It is set here, or once at the top for all channels.")
    age, topics = settings["max_age"], settings.get("availability", ())
    if age != math.inf:
        age = validation.check_number(f"{where}: max_age", age, 0, above=True)
    return {
        "topic": TopicFilter.parse(settings["topic"], f"{where}: topic"),
        "path": _path(settings.get("path", ()), f"{where}: path"),
        "time": _path(settings.get("time", ()), f"{where}: time"),
        "max_age_s": age,
        "availability": tuple(
            TopicFilter.parse(topic, f"{where}: availability")
            for topic in ([topics] if isinstance(topics, str) else validation.check_texts(where, topics))
        ),
    }


def _path(value: object, where: str) -> ValuePath:
    """`AM2301.Temperature`, or the list of names where one of them has a dot in it."""
    names = value.split(".") if isinstance(value, str) and value else value or ()
    if isinstance(names, (list, tuple)) and all(isinstance(n, str) and 0 < len(n) <= _MAX_NAME for n in names):
        return tuple(names)
    raise ConfigError(where, expected="names with dots between them, or a list of names", got=value_text(value))


def _values(body: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    values = body.get("values", {})
    if not isinstance(values, dict) or len(values) > _MAX_VALUES:
        raise ConfigError(
            f"{where}: values", expected="a table, such as {open = 1, closed = 0}", got=value_text(values)
        )
    return values
