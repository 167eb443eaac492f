"""A broker that died is started again, and the server's loop waits for nothing of that."""

import threading
from pathlib import Path

import pytest

from fedprune.core.errors import BrokerError
from fedprune_server.messaging.broker.embedded import BrokerSupervisor
from support.fakes.fleet import Fleet
from support.waiting import until


class Slow:
    """A broker whose restart takes until it is let go on, and fails at first."""

    def __init__(self) -> None:
        self.is_alive = False
        self.restarts = 0
        self.go = threading.Event()

    def stop(self) -> None:
        pass

    def start(self) -> None:
        self.restarts += 1
        assert self.go.wait(30)
        if self.restarts == 1:
            raise BrokerError("the port is taken")
        self.is_alive = True


def test_a_restart_is_not_waited_for_and_one_that_fails_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    broker = Slow()
    supervisor = BrokerSupervisor(broker)
    for _ in range(50):
        supervisor.tick()  # at once, though the restart hangs
    assert broker.restarts == 1
    broker.go.set()
    until(lambda: (supervisor.tick(), broker.is_alive)[1])  # type: ignore[func-returns-value]
    supervisor.close()
    assert broker.restarts == 2
    assert "the port is taken" in caplog.text
    assert [r.levelname for r in caplog.records if "has died" in r.message] == ["WARNING"] * 2


def test_a_loop_turns_while_its_broker_is_started_again(tmp_path: Path) -> None:
    fleet, broker = Fleet(tmp_path), Slow()
    daemon = fleet.daemon(broker=broker)
    for device in fleet.air.devices.values():
        device.send_birth()
    fleet.daemon = lambda **options: daemon  # type: ignore[method-assign]
    threading.Timer(2.0, broker.go.set).start()
    assert len(fleet.run().history) == fleet.job.rounds
    assert broker.restarts >= 1
