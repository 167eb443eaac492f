"""Silences other libraries while a model is exported: their progress lines, logs and deprecation warnings."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Suppress the progress lines, logs and deprecation warnings of other libraries."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch logs the graphs of a failed export as errors
    try:
        silent = contextlib.redirect_stderr(_OtherThreads(sys.stderr, threading.get_ident()))
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), silent:
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class _OtherThreads:
    """A stream that drops what one thread writes; another one may draw a progress line."""

    def __init__(self, stream: Any, thread: int) -> None:
        self._stream, self._thread = stream, thread

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
