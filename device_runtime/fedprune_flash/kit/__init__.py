"""The kit that installs the runtime: wheels, settings, services."""
