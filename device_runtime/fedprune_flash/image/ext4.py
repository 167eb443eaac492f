"""Reading a few small files of an ext4 file system: the system in an image, and where it mounts its boot partition.

Nothing is ever written. What this reader doesn't know (encryption, journals to replay, files without extents) raises
`ImageError`. Layout: https://docs.kernel.org/filesystems/ext4/.
"""

from __future__ import annotations

import struct

from fedprune.core.errors import ImageError
from fedprune_flash.image.partitions import Region

_MAGIC = 0xEF53
_EXTENT_MAGIC = 0xF30A
# Features that change nothing of what is read here: file types in folders, extents, 64-bit numbers, flexible groups, a
# checksum's seed, large folders, inline data (whose files are refused one by one), multiple mount protection.
_KNOWN = 0x2 | 0x40 | 0x80 | 0x100 | 0x200 | 0x2000 | 0x4000 | 0x8000
_EXTENTS, _INLINE, _ENCRYPTED = 0x80000, 0x10000000, 0x800
_FOLDER, _FILE, _LINK = 0x4, 0x8, 0xA
_ROOT = 2
_MAX_LINKS = 16
_MAX_FOLDER = 4 * 2**20


class Ext4:
    """An ext4 file system. `read` and `real` raise `ImageError` if there is no such file, or it can't be read."""

    def __init__(self, region: Region) -> None:
        self._region = region
        raw = region.read(1024, 1024)
        (magic,) = struct.unpack_from("<H", raw, 0x38)
        if magic != _MAGIC:
            raise ImageError(f"{region.name} holds no ext4 file system")
        (log_block,) = struct.unpack_from("<I", raw, 0x18)
        (self._per_group,) = struct.unpack_from("<I", raw, 0x28)
        (self._inodes,) = struct.unpack_from("<I", raw, 0)
        (self._inode_size,) = struct.unpack_from("<H", raw, 0x58)
        (features,) = struct.unpack_from("<I", raw, 0x60)
        (self._group_size,) = struct.unpack_from("<H", raw, 0xFE)
        if features & ~_KNOWN or log_block > 6 or not self._per_group or self._inode_size < 128:
            raise ImageError(f"the ext4 file system of {region.name} can't be read", got=f"features {features:#x}")
        self._block = 1024 << log_block
        self._wide = bool(features & 0x80)
        if not self._wide:
            self._group_size = 32
        elif self._group_size < 64:
            raise ImageError(f"the ext4 file system of {region.name} contradicts itself")

    def exists(self, path: str) -> bool:
        try:
            self._resolve(path)
        except ImageError:
            return False
        return True

    def real(self, path: str) -> str:
        """A path without symbolic links."""
        return "/" + "/".join(self._resolve(path)[1])

    def read(self, path: str, limit: int = 2**20) -> bytes:
        number, _ = self._resolve(path)
        inode = self._inode(number)
        if _kind(inode) != _FILE:
            raise ImageError(f"{path} of {self._region.name} is no file")
        return self._content(inode, limit)

    def _resolve(self, path: str) -> tuple[int, list[str]]:
        todo = [p for p in path.split("/") if p]
        done: list[tuple[str, int]] = []
        links = 0
        while todo:
            part = todo.pop(0)
            if part in (".", ".."):
                done = done[:-1] if part == ".." else done
                continue
            inside = done[-1][1] if done else _ROOT
            number = self._folder(inside).get(part.encode())
            if number is None:
                raise ImageError(f"{self._region.name} has no {path}")
            inode = self._inode(number)
            if _kind(inode) != _LINK:
                done.append((part, number))
                continue
            links += 1
            if links > _MAX_LINKS:
                raise ImageError(f"{path} of {self._region.name}: too many links")
            target = self._target(inode)
            done = [] if target.startswith("/") else done
            todo = [p for p in target.split("/") if p] + todo
        return (done[-1][1] if done else _ROOT), [name for name, _ in done]

    def _target(self, inode: bytes) -> str:
        (size,) = struct.unpack_from("<I", inode, 4)
        (flags,) = struct.unpack_from("<I", inode, 0x20)
        raw = inode[0x28 : 0x28 + size] if size < 60 and not flags & _EXTENTS else self._content(inode, 4096)
        return raw.decode("utf-8", "replace")

    def _folder(self, number: int) -> dict[bytes, int]:
        inode = self._inode(number)
        if _kind(inode) != _FOLDER:
            raise ImageError(f"a path of {self._region.name} leads through a file")
        raw = self._content(inode, _MAX_FOLDER)
        found: dict[bytes, int] = {}
        at = 0
        while at + 8 <= len(raw):
            inside, length, name_length = struct.unpack_from("<IHB", raw, at)
            if length < 8 or length % 4:
                raise ImageError(f"a folder of {self._region.name} is damaged")
            if inside:
                found[raw[at + 8 : at + 8 + name_length]] = inside
            at += length
        return found

    def _inode(self, number: int) -> bytes:
        if not 1 <= number <= self._inodes:
            raise ImageError(f"{self._region.name} names a file {number}, which it can't have")
        group, index = divmod(number - 1, self._per_group)
        first = 2 if self._block == 1024 else 1  # the block behind the superblock's
        row = self._region.read(first * self._block + group * self._group_size, self._group_size)
        (table,) = struct.unpack_from("<I", row, 8)
        if self._wide:
            table |= struct.unpack_from("<I", row, 0x28)[0] << 32
        return self._region.read(table * self._block + index * self._inode_size, 128)

    def _content(self, inode: bytes, limit: int) -> bytes:
        (size,) = struct.unpack_from("<I", inode, 4)
        (flags,) = struct.unpack_from("<I", inode, 0x20)
        if not flags & _EXTENTS or flags & (_INLINE | _ENCRYPTED):
            raise ImageError(f"a file of {self._region.name} can't be read", got=f"flags {flags:#x}")
        size = min(size, limit)
        raw = bytearray(size)
        for logical, physical, count in self._extents(inode[0x28 : 0x28 + 60], 5):
            start = logical * self._block
            if start >= size:
                continue
            length = min(count * self._block, size - start)
            raw[start : start + length] = self._region.read(physical * self._block, length)
        return bytes(raw)

    def _extents(self, node: bytes, depth_left: int) -> list[tuple[int, int, int]]:
        magic, entries, _, depth = struct.unpack_from("<HHHH", node, 0)
        if magic != _EXTENT_MAGIC or depth > depth_left or 12 + 12 * entries > len(node):
            raise ImageError(f"a file of {self._region.name} is damaged")
        found = []
        for index in range(entries):
            at = 12 + 12 * index
            if depth:
                _, low, high = struct.unpack_from("<IIH", node, at)
                below = self._region.read((low | high << 32) * self._block, self._block)
                found += self._extents(below, depth - 1)
            else:
                logical, count, high, low = struct.unpack_from("<IHHI", node, at)
                if count <= 32_768:  # above that: room that was never written, which reads as zeros
                    found.append((logical, low | high << 32, count))
        return found


def _kind(inode: bytes) -> int:
    return int(struct.unpack_from("<H", inode, 0)[0]) >> 12
