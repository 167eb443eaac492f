"""A broker that runs beside the server and is started again where it dies."""

from __future__ import annotations

import logging
from typing import Protocol

from fedprune.errors import BrokerError

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


def revive(broker: Supervised | None) -> None:
    """Start a dead broker again; where it doesn't start, that is said, and the next call tries again.

    Args:
        broker: The embedded broker, if there is one.
    """
    if broker is None or broker.alive:
        return
    log.warning("the embedded broker has died and is started again")
    try:
        broker.restart()
    except BrokerError as error:
        log.error("%s", error)
