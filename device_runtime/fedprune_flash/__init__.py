"""Putting the runtime on boards: kits, and images of Raspberry Pi OS."""

from fedprune_flash.kit.board_settings import BoardSettings
from fedprune_flash.kit.kit import Kit, build_kit, open_kit
from fedprune_flash.kit.target import Target

__all__ = ["BoardSettings", "Kit", "Target", "build_kit", "open_kit"]
