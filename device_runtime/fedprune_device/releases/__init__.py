"""Releases of the runtime on a board: downloaded, checked, installed, tried, reported.

Not here: starting a slot and rolling back (`launcher`).
"""
