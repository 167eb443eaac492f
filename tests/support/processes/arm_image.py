"""An image for arm64 as boards have them: MBR, FAT boot partition, ext4 root with Debian, systemd and cloud-init.

A plain user can build it; where root does, the tools that make file systems run as `nobody`. A virtual machine has no
firmware that would read the boot partition, so kernel and initrd lie beside the image.
"""

import compileall
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from support.processes.arm_board import Board
from support.processes.arm_userland import BOOKWORM, tool, userland

PACKAGES = (
    *(
        "busybox-static",
        "cloud-init",
        "dbus",
        "findutils",
        "gzip",
        "hostname",
        "init-system-helpers",
        "iproute2",
        "kmod",
    ),
    *("libc-bin", "linux-image-cloud-arm64", "mount", "ncurses-base", "perl-base", "systemd-resolved", "systemd-sysv"),
    *("sysvinit-utils", "tar", "udev", "util-linux"),
)
BOOT_MB, ROOT_MB = 192, 1400
MOUNT = "/boot/firmware"

_UNITS = {
    "cloud-init.target.wants": ("cloud-init-local", "cloud-init", "cloud-config", "cloud-final"),
    "multi-user.target.wants": ("systemd-networkd", "systemd-resolved"),
    "network-online.target.wants": ("systemd-networkd-wait-online",),
}
_MODULES = ("virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk")
_CLOUD = f"""\
# As Raspberry Pi OS has it: settings lie on the boot partition.
datasource_list: [NoCloud, None]
datasource:
  NoCloud:
    seedfrom: {MOUNT}/
# What belongs to programs that this root is without.
growpart: {{mode: off}}
locale: false
ssh_genkeytypes: []
"""
_CMDLINE = "console=ttyAMA0 root=LABEL=rootfs rootfstype=ext4 rootwait systemd.journald.forward_to_console=1"
_INIT = """\
#!/bin/busybox sh
# A virtual machine's disk, mounted; what an initrd made for this kernel does, and no more.
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sysfs /sys; $b mount -t devtmpfs dev /dev
for m in MODULES; do $b insmod /$m.ko; done
while ! root=$($b findfs LABEL=rootfs); do $b sleep 1; done
$b mount -t ext4 $root /root
$b mount --move /dev /root/dev; $b umount /sys; $b umount /proc
exec $b switch_root /root /sbin/init
"""


@dataclass(frozen=True)
class Image:
    """An image, and what a virtual machine needs beside it."""

    disk: Path
    kernel: Path
    initrd: Path
    release: str


def make_arm_image(folder: Path, samples: Path) -> Image:
    """Build an image in a folder; `samples` lie as the board's samples on its root partition."""
    folder.mkdir(parents=True)
    root = folder / "rootfs"
    shutil.copytree(userland(BOOKWORM, PACKAGES), root, symlinks=True)
    release = _finish(root, samples)
    image = Image(folder / "plain.img", folder / "vmlinuz", folder / "initrd", release)
    shutil.copyfile(root / f"boot/vmlinuz-{release}", image.kernel)
    image.initrd.write_bytes(_initrd(root, release))
    boot = folder / "boot"
    boot.mkdir()
    (boot / "cmdline.txt").write_text(f"{_CMDLINE} ds=nocloud;i=image\n")
    (boot / "user-data").write_text("#cloud-config\n")
    (boot / "meta-data").write_text("dsmode: local\ninstance-id: image\n")
    _hand_over(folder)
    _build(folder, image.disk, root, boot)
    return image


def plain(*command: str | Path) -> list[str]:
    """A command as a plain user."""
    words = [str(word) for word in command]
    if os.geteuid() != 0:
        return words
    return [
        tool("setpriv", "util-linux"),
        "--reuid=nobody",
        "--regid=nogroup",
        "--clear-groups",
        "--no-new-privs",
        *words,
    ]


def _finish(root: Path, samples: Path) -> str:
    """What maintainer scripts and Raspberry Pi OS's own settings would have done; returns the kernel's release."""
    etc = root / "etc"
    (release,) = (p.name for p in (root / "usr/lib/modules").iterdir())
    subprocess.run([tool("systemd-sysusers", "systemd"), f"--root={root}"], check=True, capture_output=True)
    done = Board(root).run("/usr/sbin/depmod", "-a", release)
    assert done.returncode == 0, done.stderr
    for name in ("shadow", "gshadow"):  # without a mode that lets their owner read them they couldn't be copied
        (etc / name).chmod(0o600)
    (etc / "machine-id").write_text("")
    (etc / "hostname").write_text("board\n")
    (etc / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 board\n")
    (etc / "resolv.conf").unlink()
    (etc / "resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    (etc / "fstab").write_text(f"LABEL=rootfs / ext4 defaults 0 1\nLABEL=BOOTFS {MOUNT} vfat defaults 0 2\n")
    (root / MOUNT[1:]).mkdir(parents=True)
    (etc / "cloud/cloud.cfg.d/99_boot.cfg").write_text(_CLOUD)
    early = etc / "systemd/system/cloud-init-local.service.d"
    early.mkdir(parents=True)
    (early / "boot.conf").write_text(f"[Unit]\nRequiresMountsFor={MOUNT}\n")
    for target, units in _UNITS.items():
        wants = etc / "systemd/system" / target
        wants.mkdir(parents=True, exist_ok=True)
        for unit in units:
            (wants / f"{unit}.service").symlink_to(f"/usr/lib/systemd/system/{unit}.service")
    if f"{sys.version_info[0]}.{sys.version_info[1]}" == BOOKWORM.python:  # the same bytecode, made faster
        for place in ("usr/lib/python3", f"usr/lib/python{BOOKWORM.python}"):
            compileall.compile_dir(root / place, quiet=2, stripdir=str(root), prependdir="/")
    place = root / "srv/fedprune"
    place.mkdir(parents=True)
    shutil.copyfile(samples, place / "samples.npz")
    return release


def _initrd(root: Path, release: str) -> bytes:
    modules = {p.name: p for p in (root / f"usr/lib/modules/{release}/kernel/drivers").rglob("virtio*.ko")}
    files = {f"{name}.ko": modules[f"{name}.ko"].read_bytes() for name in _MODULES}
    files["bin/busybox"] = (root / "usr/bin/busybox").read_bytes()
    files["init"] = _INIT.replace("MODULES", " ".join(_MODULES)).encode()
    return _archive(files, ("bin", "dev", "proc", "root", "sys"))


def _archive(files: dict[str, bytes], folders: Iterable[str]) -> bytes:
    """Files as the kernel unpacks them (cpio, newc: Documentation/driver-api/early-userspace/buffer-format.rst)."""
    rows = [(name, 0o40755, b"") for name in folders] + [(name, 0o100755, body) for name, body in files.items()]
    out = b""
    for number, (name, mode, body) in enumerate([*rows, ("TRAILER!!!", 0, b"")], 1):
        numbers = (number, mode, 0, 0, 1, 0, len(body), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + "".join(f"{n:08x}" for n in numbers).encode() + name.encode() + b"\0"
        out += head + bytes(-len(head) % 4) + body + bytes(-len(body) % 4)
    return out


def _hand_over(folder: Path) -> None:
    """Give all to the plain user who builds."""
    if os.geteuid() == 0:
        user = pwd.getpwnam("nobody")
        for parent in folder.parents:  # pytest's are for their owner alone, which is root here
            parent.chmod(parent.stat().st_mode | 0o001)
        for path in (folder, *folder.rglob("*")):
            os.lchown(path, user.pw_uid, user.pw_gid)


def _build(folder: Path, disk: Path, root: Path, boot: Path) -> None:
    first, sector = 2048, 512
    second = first + BOOT_MB * 2048
    table = f"label: dos\nlabel-id: 0x5eedf00d\nstart={first},size={BOOT_MB * 2048},type=c,bootable\n"
    table += f"start={second},size={ROOT_MB * 2048},type=83\n"
    at = f"{disk}@@{first * sector}"
    _run(folder, "truncate", "-s", (second + ROOT_MB * 2048) * sector, disk)
    _run(folder, "sfdisk", "-q", disk, text=table)
    _run(folder, "mformat", "-i", at, "-F", "-T", BOOT_MB * 2048, "-h", 64, "-s", 32, "-v", "BOOTFS", "::")
    _run(folder, "mcopy", "-i", at, *sorted(boot.iterdir()), "::")
    # All files are root's in it: fakeroot says so of those that are the builder's own.
    ext4 = ("mke2fs", "-q", "-t", "ext4", "-L", "rootfs", "-d", root, "-E", f"offset={second * sector}", disk)
    _run(folder, "fakeroot", *ext4, f"{ROOT_MB * 1024}k")


def _run(folder: Path, name: str, *arguments: object, text: str = "") -> None:
    environment = os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "MTOOLS_SKIP_CHECK": "1"}
    command = plain(tool(name, name), *(a if isinstance(a, Path) else str(a) for a in arguments))
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, f"{command}: {done.stderr}"
