"""Writes files of data sets, as others do, and watches what reading them takes."""

import gzip
import struct
import tracemalloc

import numpy as np


def images(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def labels(n, classes=10):
    return np.arange(n) % classes


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder, *, packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    x, y = images(30, 28, 28), labels(30)
    for prefix, rows in (("train", slice(0, 20)), ("t10k", slice(20, 30))):
        for name, array in (("images-idx3-ubyte", x[rows]), ("labels-idx1-ubyte", y[rows].astype(np.uint8))):
            raw = idx_bytes(array)
            path = folder / f"{prefix}-{name}{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(raw) if packed else raw)
    return x, y


CIFAR10 = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def write_cifar10(folder):
    """Six batches of seven images; returns their rows, a label and the pixels each."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = [np.concatenate([labels(7).astype(np.uint8)[:, None], images(7, 3072, seed=i)], 1) for i in range(6)]
    for name, rows in zip(CIFAR10, whole, strict=True):
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    return whole


def write_images(folder, names, side=6, colour=True):
    from PIL import Image

    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = images(1, side, side, 3, seed=number)[0]
        (Image.fromarray(pixels) if colour else Image.fromarray(pixels[..., 0])).save(path)


def most_memory(action):
    """Bytes that were allocated at once while it ran, beyond those before."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
