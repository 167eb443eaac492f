"""Sensors of a home: MQTT messages that are joined into rows, and handed to the board's local interface as samples.

Not here: samples that are kept. The local interface's store decides which of them are.
"""
