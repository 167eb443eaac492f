"""Putting the runtime on boards: kits, and images of Raspberry Pi OS."""

from typing import TYPE_CHECKING

from fedprune.core.imports import lazy_attributes

if TYPE_CHECKING:  # a command that only parses its options doesn't load cryptography
    from fedprune_flash.kit.board_settings import BoardSettings
    from fedprune_flash.kit.kit import Kit, build_kit, open_kit
    from fedprune_flash.kit.target import BoardTarget

__all__ = ["BoardSettings", "BoardTarget", "Kit", "build_kit", "open_kit"]

_MODULES = {
    "BoardSettings": "fedprune_flash.kit.board_settings",
    "BoardTarget": "fedprune_flash.kit.target",
    **dict.fromkeys(("Kit", "build_kit", "open_kit"), "fedprune_flash.kit.kit"),
}

__getattr__ = lazy_attributes(__name__, _MODULES)
