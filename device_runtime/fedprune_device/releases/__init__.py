"""Releases of the runtime: asked for, checked, installed, tried."""
