"""Whose fault it is when something fails while a round closes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from fedprune.core.errors import FedpruneError, StorageError
from fedprune.core.text import one_line

T = TypeVar("T")

log = logging.getLogger("fedprune.server")


class AtFaultError(Exception):
    """An update that can't be used.

    Attributes:
        device: Whose it is.
        reason: Why, on one line.
    """

    def __init__(self, device: str, reason: str) -> None:
        super().__init__(device, reason)
        self.device = device
        self.reason = reason


class Suspect:
    """The device whose update is being looked at; nobody at first.

    Attributes:
        device: Its name; empty for nobody.
    """

    def __init__(self) -> None:
        self.device = ""

    def each(self, updates: Iterable[tuple[str, Callable[[], T]]]) -> Iterator[T]:
        """Read updates one after the other; whoever sent one is suspected until the next is asked for.

        Args:
            updates: Names of devices, and what reads their updates.
        """
        for self.device, read in updates:
            yield read()
        self.device = ""

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Let whatever fails inside be the suspect's fault; a lost blob and too little memory are the server's own.

        Raises:
            AtFaultError: Something failed while somebody was suspected; what fails otherwise is raised as it is.
        """
        try:
            yield
        except (StorageError, MemoryError):
            raise
        except Exception as error:
            if not self.device:
                raise
            reason = str(error)
            if not isinstance(error, FedpruneError):
                log.warning("update of %s: our own code failed on it", self.device, exc_info=True)
                reason = f"update can't be read ({type(error).__name__}: {error})"
            raise AtFaultError(self.device, one_line(reason)) from error
        finally:
            self.device = ""
