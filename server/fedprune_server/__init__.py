"""The conductor: daemon, storage, broker link, simulation."""
