"""MQTT topic filters that tell what their wildcards stand for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from fedprune.core.errors import ConfigError, Subject, value_text

_MAX_LENGTH = 65_535  # bytes of a topic (MQTT 3.1.1, 1.5.3)


@dataclass(frozen=True)
class TopicFilter:
    """A topic, or several by `+` for one level and `#` for all further ones, or for some before the last."""

    text: str

    @classmethod
    def parse(cls, text: object, what: Subject) -> TopicFilter:
        """Raises `ConfigError`, which names `what`, if it is no filter of MQTT 3.1.1 (4.7) with # anywhere."""
        expected = "an MQTT topic, with + or # only as a whole level, and # only once"
        if not isinstance(text, str) or not 0 < len(text.encode(errors="replace")) <= _MAX_LENGTH:
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
