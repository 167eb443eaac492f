"""Real brokers for the tests of the toolkit."""

from support.processes.mosquitto import mosquitto, start_mosquitto

__all__ = ["mosquitto", "start_mosquitto"]
