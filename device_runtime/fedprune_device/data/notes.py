"""What a source chose where its samples can be read in several ways: said in the board's log once, kept for a check."""

from __future__ import annotations

import logging
from collections.abc import Iterable

_LOG = logging.getLogger("fedprune.device")


class Notes:
    """Sentences about a source, without any of its numbers or names. Each is logged when it is new."""

    def __init__(self, source: object) -> None:
        self._source = source
        self.texts: tuple[str, ...] = ()
        self._warnings: tuple[str, ...] = ()

    def replace(self, texts: Iterable[str], warnings: Iterable[str] = ()) -> None:
        """State what holds now, in place of all earlier notes. Warnings are problems of the samples, and no notes."""
        old_warnings, self._warnings = self._warnings, tuple(warnings)
        for text in self._warnings:
            if text not in old_warnings:
                _LOG.warning("%s: %s", self._source, text)
        old, self.texts = self.texts, tuple(texts)
        for text in self.texts:
            if text not in old:
                _LOG.info("%s: %s", self._source, text)
