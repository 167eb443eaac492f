"""A Raspberry Pi OS image changed in place, without root or a mount: partitions, FAT, first-boot files."""
