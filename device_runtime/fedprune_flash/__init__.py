"""Putting the runtime on boards: kits, and images of Raspberry Pi OS."""

from fedprune_flash.kit.board_settings import BoardSettings
from fedprune_flash.kit.kit import Kit, build_kit, open_kit
from fedprune_flash.kit.target import BoardTarget

__all__ = ["BoardSettings", "BoardTarget", "Kit", "build_kit", "open_kit"]
