"""A configuration and its job, as a server that starts reads them."""

from pathlib import Path

from fedprune_server.config.layers import errors_with_origin, file_layer
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.config.tables import parse_config
from fedprune_server.engine.state_folder import OpenJob, StateFolder


def read_config(path: Path) -> ServerConfig:
    """A `fleet.toml`, whose paths count from its folder."""
    layer = file_layer(path)
    with errors_with_origin([layer]):
        return parse_config(layer.tables, path.parent)


def open_job(folder: StateFolder, config: ServerConfig) -> OpenJob:
    """The job of a folder, which remembers it."""
    opened = folder.read_job(config)
    folder.save_job(opened)
    return opened
