"""A broker that runs beside the server and is started again where it dies."""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from fedprune.core.errors import BrokerError, reason

log = logging.getLogger("fedprune.server")


class Supervised(Protocol):
    """A broker that the server looks after."""

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        ...

    def restart(self) -> None:
        """Run it again at the same address.

        Raises:
            BrokerError: It doesn't start.
        """
        ...


class Supervisor:
    """Starts a dead broker again, on a thread of its own: the server's loop doesn't wait for it.

    Args:
        broker: The embedded broker; None for an external broker.
    """

    def __init__(self, broker: Supervised | None) -> None:
        self._broker = broker
        self._thread: threading.Thread | None = None

    def tick(self) -> None:
        """Begin a restart if the broker is dead and none is under way; one that failed is tried again."""
        broker = self._broker
        if broker is None or (self._thread is not None and self._thread.is_alive()) or broker.alive:
            return
        log.warning("the embedded broker has died and is started again")
        self._thread = threading.Thread(target=self._restart, args=(broker,), name="fedprune-broker", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait for a restart that is under way, so that the broker that is stopped next is the last one."""
        if self._thread is not None:
            self._thread.join()

    def _restart(self, broker: Supervised) -> None:
        try:
            broker.restart()
        except BrokerError as error:
            log.error("%s", error)
        except Exception as error:
            log.error("the embedded broker: %s: %s", type(error).__name__, reason(error), exc_info=error)
