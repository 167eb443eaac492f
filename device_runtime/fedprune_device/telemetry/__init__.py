"""Logs and crash reports that a board sends."""
