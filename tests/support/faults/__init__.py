"""Failing disks, power cuts, killed processes, hostile inputs and connections."""
