"""`fedprune-device sensors`: hand the messages of sensors to the board as samples."""

from __future__ import annotations

import argparse
import logging
import signal
import threading

from fedprune_device.cli.options import log_handler
from fedprune_device.sensors.bridge import run_sensors
from fedprune_device.sensors.config import read_sensor_config


def hand_in_sensors(arguments: argparse.Namespace) -> None:
    logging.basicConfig(level="INFO", handlers=[log_handler()])
    config = read_sensor_config(arguments.config)
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    run_sensors(config, stopping, patient=arguments.patient)
